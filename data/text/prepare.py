"""Text of your own: .txt, .md, .jsonl or .parquet files, or folders of them; .gz of the first three.

    python data/text/prepare.py --input corpus/ more.jsonl --tokenizer gpt2 --out data/mine
    python data/text/prepare.py --input novel.txt --tokenizer train:8000       # trains byte pairs on the text
    python data/text/prepare.py --input notes/ --tokenizer MODEL_FOLDER        # the tokenizer of a model to fine-tune

A text file is a document, and so is a line of JSON or a row of parquet (--key names the field). Documents end with the
tokenizer's end-of-text; what they say is text, also where it names a control token. --val of the documents is for
validation, told by a hash of their content; of a single document it is the last part. Where the command was
interrupted, the same command goes on; the result is the same, and so it is for any number of workers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.prepare import Reading, options, prepare_own, run  # noqa: E402


def main() -> None:
    parser = options(__doc__, Path(__file__).parent, tokenizer="gpt2")
    parser.add_argument("--key", default="text", help="the field of a JSON line or column of parquet (default text)")
    prepare_own(parser, "documents", lambda given: Reading(given.key))


if __name__ == "__main__":
    run(main)
