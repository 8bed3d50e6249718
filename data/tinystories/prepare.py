"""TinyStories (Eldan and Li 2023): some two million short stories in the words of small children.

    python data/tinystories/prepare.py --tokenizer train:8000          # 1 GB of download, 0.5 billion tokens of GPT-2
    python data/tinystories/prepare.py --input TinyStoriesV2-GPT4-train.txt --limit 20000

Local files are .txt with <|endoftext|> between the stories, as the data set has them, or .parquet or .jsonl with a
column text. A story is a document and ends with the tokenizer's end-of-text; 0.5 % of them are for validation, told by
a hash of their content. --pack best-fit puts whole stories into rows, with a mask (docs/data.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.hub import Hub  # noqa: E402
from orchestrate.data.prepare import prepare_texts, run  # noqa: E402

HUB = Hub("roneneldan/TinyStories", licence="CDLA-Sharing-1.0")


def main() -> None:
    prepare_texts(__doc__, Path(__file__).parent, HUB, val=0.005, separator="<|endoftext|>")


if __name__ == "__main__":
    run(main)
