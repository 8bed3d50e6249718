"""SmolTalk, MMLU's auxiliary training set and GSM8K as conversations: for mid-training, between pretraining and chat.

    python data/task_mixture/prepare.py --tokenizer gpt2 --weights smoltalk=1 mmlu=1 gsm8k=2
    python data/task_mixture/prepare.py --input smoltalk.parquet auxiliary_train.parquet gsm8k.jsonl

A weight says how often each conversation of a source is there for training: 2 twice, 0.5 half of them (told by a hash).
For validation each is there once; of a source of weight 0 there is nothing. Local files are .parquet or .jsonl, and a
record's fields tell its source. --limit is for each file. Multiple choice becomes a question with letters, and its
answer is the letter. What GSM8K writes for a calculator (<<2+3=5>>) is left out. Template, mask and control tokens are
those of data/chat/prepare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.conversations import TASKS, task  # noqa: E402
from orchestrate.data.hub import Hub, fetch  # noqa: E402
from orchestrate.data.prepare import (  # noqa: E402
    DOWNLOAD,
    Reading,
    options,
    packing_options,
    parsed,
    prepared,
    run,
    weights_of,
)

HUBS = (
    Hub("HuggingFaceTB/smoltalk", licence="Apache-2.0", subset="all"),
    Hub("cais/mmlu", licence="MIT", subset="auxiliary_train"),
    Hub("openai/gsm8k", licence="MIT", subset="main"),
)
"""In the order of TASKS."""


def main() -> None:
    parser = options(__doc__, Path(__file__).parent, tokenizer="gpt2")
    packing_options(parser)
    parser.add_argument("--weights", nargs="+", default=[], metavar="SOURCE=WEIGHT", help="1 where none is given")
    parser.add_argument("--val", type=float, default=0.01, help="share of the conversations for validation")
    given = parsed(parser)
    weights = weights_of(given.weights, TASKS)
    wanted = [hub for hub, weight in zip(HUBS, weights, strict=True) if weight]
    inputs = given.input or [path for hub in wanted for path in fetch(hub, given.out / DOWNLOAD, given.limit)]
    prepared(
        given,
        inputs,
        fetched=not given.input,
        reading=Reading(render=task, sources=TASKS),
        val=given.val,
        limit=0,
        limit_each=given.limit,
        weights=weights,
        facts={"source": [hub.facts() for hub in wanted]},
    )


if __name__ == "__main__":
    run(main)
