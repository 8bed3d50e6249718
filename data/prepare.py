"""What the prepare.py scripts share: options, a checked download, and writing token files that are whole or absent."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from orchestrate.data.stream import Meta
from orchestrate.data.tokenizer import BpeTokenizer, CharTokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9


def options(description: str, default_out: Path) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=default_out, help="folder for train.bin, val.bin, meta.json")
    return parser


def run(main: Callable[[], None]) -> None:
    """Run a script's main; bad input is one message on standard error and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read_text(path: Path, expected_sha256: str = "") -> str:
    """A UTF-8 text. A checksum that differs is said, not refused: a text of one's own is welcome."""
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"{path}: is empty")
    if expected_sha256 and hashlib.sha256(raw).hexdigest() != expected_sha256:
        print(f"note: {path} is not the original text (another SHA-256); it is used as it is")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def download(url: str, sha256: str, path: Path) -> str:
    """A text from the network, kept at `path` once its checksum is right. Raises ValueError."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path.read_text("utf-8")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            raw = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{url}: cannot be downloaded ({error}); give a local copy with --input FILE") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ValueError(f"{url}: SHA-256 is {found}, expected {sha256}; nothing was written")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, raw)
    return raw.decode("utf-8")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_tokens(path: Path, ids: Sequence[int] | np.ndarray, vocab_size: int) -> str:
    """Write token ids; returns the type, uint16 where the vocabulary fits."""
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    write_whole(path, np.asarray(ids).astype(dtype).tobytes())
    return dtype


def write_meta(folder: Path, meta: Meta) -> None:
    write_whole(folder / "meta.json", json.dumps(meta.to_json(), ensure_ascii=False).encode("utf-8"))


def prepare_characters(text: str, out: Path) -> None:
    """A character-level data set: the first 90 % of the text to train on, the rest to validate."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = CharTokenizer.of(text)
    cut = int(len(text) * TRAIN_SHARE)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        dtype = write_tokens(out / f"{name}.bin", tokenizer.encode(part), len(tokenizer.itos))
        print(f"{name}.bin: {len(part):,} characters")
    write_meta(out, Meta(len(tokenizer.itos), dtype, "char", tokenizer.itos))
    print(f"{len(text):,} characters, vocabulary of {len(tokenizer.itos)}, in {out}")


def prepare_bpe(text: str, out: Path, tokenizer: BpeTokenizer) -> None:
    """A byte-pair encoded data set: the first 90 % of the text to train on, the rest to validate."""
    out.mkdir(parents=True, exist_ok=True)
    cut = int(len(text) * TRAIN_SHARE)
    vocab_size = tokenizer.encoding.n_vocab
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = tokenizer.encode_plain(part)
        dtype = write_tokens(out / f"{name}.bin", ids, vocab_size)
        print(f"{name}.bin: {len(ids):,} tokens")
    # No vocabulary size: models for GPT-2 tokens have it rounded up, as in nanoGPT.
    write_meta(out, Meta(None, dtype, "gpt2"))
