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
    note_if_changed,
    options,
    parsed,
    prepare,
    run,
)


def main() -> None:
    given = parsed(options(__doc__, Path(__file__).parent, tokenizer="char"))
    for path in given.input:
        note_if_changed(path, SHAKESPEARE_SHA256)
    inputs = given.input or [download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, given.out / "input.txt")]
    prepare(inputs, given.out, given.tokenizer, limit=given.limit, workers=given.workers)


if __name__ == "__main__":
    run(main)
