"""Tiny Shakespeare, character level: 1,115,394 characters, 65 different ones.

python data/shakespeare_char/prepare.py                   # downloads the text and checks its SHA-256
python data/shakespeare_char/prepare.py --input FILE      # any text of your own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.prepare import (  # noqa: E402
    SHAKESPEARE_SHA256,
    SHAKESPEARE_URL,
    download,
    options,
    prepare_characters,
    read_text,
    run,
)


def main() -> None:
    parser = options(__doc__, Path(__file__).parent)
    parser.add_argument("--input", type=Path, help="a local text instead of the download")
    arguments = parser.parse_args()
    if arguments.input:
        text = read_text(arguments.input, SHAKESPEARE_SHA256)
    else:
        text = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, arguments.out / "input.txt")
    prepare_characters(text, arguments.out)


if __name__ == "__main__":
    run(main)
