"""FineWeb-Edu (Penedo et al. 2024): pages of the web that a classifier found to be of use for learning.

    python data/fineweb_edu/prepare.py --workers 16                 # the sample of 10 billion tokens, 28 GB of parquet
    python data/fineweb_edu/prepare.py --subset sample-100BT --limit 1000000
    python data/fineweb_edu/prepare.py --input 000_00000.parquet --pack best-fit --pack_length 1024

A row is a document and ends with the tokenizer's end-of-text; 0.05 % of them are for validation, told by a hash of
their content. --pack best-fit puts whole documents into rows of --pack_length tokens, and a mask leaves out the loss on
the first token of each; attention still sees what stands before it in the row (docs/data.md). Local files are .parquet
or .jsonl with a column text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.hub import Hub  # noqa: E402
from orchestrate.data.prepare import prepare_texts, run  # noqa: E402

HUB = Hub("HuggingFaceFW/fineweb-edu", licence="ODC-By-1.0", subset="sample-10BT")


def main() -> None:
    prepare_texts(__doc__, Path(__file__).parent, HUB, val=0.0005)


if __name__ == "__main__":
    run(main)
