"""OpenWebText (Gokaslan and Cohen 2019): the pages behind links of Reddit, as GPT-2 was trained on.

    python data/openwebtext/prepare.py --workers 8                     # 54 GB of cache, 17 GB of tokens (9 billion)
    python data/openwebtext/prepare.py --input corpus.jsonl            # local files, as data/text/prepare.py takes them

A row is a document and ends with <|endoftext|>; 0.05 % of them are for validation, told by a hash of their content.
Where the command was interrupted, the same command goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.hub import Hub  # noqa: E402
from orchestrate.data.prepare import prepare_texts, run  # noqa: E402

HUB = Hub("Skylion007/openwebtext", licence="CC0-1.0 (the packaging; the texts are their authors')")


def main() -> None:
    prepare_texts(__doc__, Path(__file__).parent, HUB, val=0.0005)


if __name__ == "__main__":
    run(main)
