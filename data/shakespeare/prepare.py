"""Tiny Shakespeare, GPT-2 byte-pair encoding (tiktoken): about 301,966 training tokens.

python data/shakespeare/prepare.py                   # downloads the text and checks its SHA-256
python data/shakespeare/prepare.py --input FILE      # any text of your own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.prepare import prepare_shakespeare, run  # noqa: E402

if __name__ == "__main__":
    run(lambda: prepare_shakespeare(__doc__, Path(__file__).parent, tokenizer="gpt2"))
