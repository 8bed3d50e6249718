"""The data sets' own scripts, run as a user runs them, on small texts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, TEXT

from orchestrate.data.prepare import SHAKESPEARE_URL, prepare, prepare_shakespeare
from orchestrate.data.stream import TokenFile, open_data, read_meta
from orchestrate.data.tokenizer import BpeTokenizer, CharTokenizer, RemappedTokenizer, tokenizer_of


def script(name: str, *arguments, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def small_encoding() -> BpeTokenizer:
    """Bytes and one special token: an encoding that needs no download."""
    ranks = {bytes([i]): i for i in range(256)}
    return BpeTokenizer(
        tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    )


def test_python_docs_needs_no_download(tmp_path):
    said = script("python_docs", "--out", tmp_path)
    assert "1 document, vocabulary of" in said
    data = open_data(str(tmp_path), 64)
    total = len(data.train) + len(data.val)
    assert total > 300_000 and len(data.train) == int(total * 0.9)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"].startswith("pydoc_data of Python 3.") and meta["licence"] == "PSF-2.0"
    assert "statement" in tokenizer_of(data.meta).decode(data.train.tokens[:2000].tolist())


def test_shakespeare_char_from_a_local_text(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT)
    said = script("shakespeare_char", "--input", tmp_path / "in.txt", "--out", tmp_path / "d")
    assert "not the original text" in said
    data = open_data(str(tmp_path / "d"), 16)
    tokenizer = tokenizer_of(data.meta)
    text = tokenizer.decode(data.train.tokens.tolist() + data.val.tokens.tolist())
    assert text == TEXT and sorted(p.name for p in (tmp_path / "d").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare", "openwebtext"])
def test_bad_input_is_one_message(name, tmp_path):
    said = script(name, "--input", tmp_path / "none.txt", "--out", tmp_path / "d", code=2)
    assert said.startswith("error: ") or "\nerror: " in said
    assert not (tmp_path / "d" / "train.bin").exists()


def test_byte_pair_encoding(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT)
    prepare([tmp_path / "in.txt"], tmp_path, small_encoding())
    ids = np.concatenate([TokenFile(tmp_path / f"{part}.bin").tokens for part in ("train", "val")])
    assert small_encoding().decode(ids.tolist()) == TEXT + "<|endoftext|>"
    assert read_meta(tmp_path).tokenizer == "tiktoken:bytes"


def test_tokenizers():
    tokenizer = CharTokenizer.of("hello")
    assert tokenizer.decode(tokenizer.encode("hole")) == "hole" and tokenizer.decode([99]) == "\ufffd"
    with pytest.raises(ValueError, match="character 'z' \\(position 2\\)"):
        tokenizer.encode("hoz")
    bpe = small_encoding()
    assert bpe.decode([104, 105, 999, 33]) == "hi\ufffd!" and bpe.encode("a<|endoftext|>") == [97, 256]
    assert len(bpe.encode_plain("<|endoftext|>")) == 13
    shrunk = RemappedTokenizer(tokenizer, np.array([0, 1, 2, 2]))  # e h l o -> l and o share an id
    assert shrunk.encode("helo") == [1, 0, 2, 2] and shrunk.decode([1, 0, 2]) == "hel"


def test_source_and_licence_are_those_of_the_original(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text(TEXT)
    given = ["prepare.py", "--input", str(tmp_path / "in.txt"), "--workers", "1", "--tokenizer", "char"]
    own, original = hashlib.sha256(TEXT.encode()).hexdigest(), (SHAKESPEARE_URL, "public domain")
    for number, (sha256, told) in enumerate([("0" * 64, (None, None)), (own, original)]):
        monkeypatch.setattr("orchestrate.data.prepare.SHAKESPEARE_SHA256", sha256)
        monkeypatch.setattr(sys, "argv", [*given, "--out", str(tmp_path / str(number))])
        prepare_shakespeare("", tmp_path, "gpt2")
        meta = json.loads((tmp_path / str(number) / "meta.json").read_text())
        assert (meta.get("source"), meta.get("licence")) == told and meta["sources"][0]["sha256"] == own
