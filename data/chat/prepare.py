"""Conversations of your own: JSON lines or parquet of {"messages": [{"role": ..., "content": ...}, ...]}.

    python data/chat/prepare.py --input talks.jsonl --tokenizer gpt2 --out data/mine
    python data/chat/prepare.py --input talks.jsonl --tokenizer data/text      # the tokenizer of what came before
    python data/chat/prepare.py --input talks/ --tokenizer train:4000 --pack best-fit --pack_length 512

Roles are system, user, assistant and tool. Conversations are written as <|im_start|>ROLE, a line break, what is said,
<|im_end|>, and each ends with the tokenizer's end-of-text. The loss counts what the assistant says, to its <|im_end|>.
What a message says is text, also where it names a control token. A tokenizer that lacks the two gets them behind its
last id; with train:SIZE they are trained in. The chat template is kept with the tokenizer. See docs/data.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.conversations import chat  # noqa: E402
from orchestrate.data.prepare import Reading, options, prepare_own, run  # noqa: E402


def main() -> None:
    parser = options(__doc__, Path(__file__).parent, tokenizer="gpt2")
    prepare_own(parser, "conversations", lambda _: Reading(render=chat, sources=("messages",)))


if __name__ == "__main__":
    run(main)
