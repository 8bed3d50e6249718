"""data/text/prepare.py: text of one's own becomes the same data set however it is made, or one message says why not."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, TEXT
from test_prepare import script, small_encoding
from test_tokenizers import byte_level, saved

from orchestrate.data import corpus, prepare
from orchestrate.data.keeping import kept_with_data, of_data
from orchestrate.data.stream import open_data, read_meta
from orchestrate.data.tokenizer import CharTokenizer, HuggingFaceTokenizer

EOT = "<|endoftext|>"
DOCUMENTS = [f"Document {i} says {'ünïcode ' * (i % 5)}to be, 你好.\n" for i in range(60)]


def lines(path, documents, key="text"):
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in documents))
    return path


def decoded(folder) -> dict[str, str]:
    """The text of both files."""
    data, tokenizer = open_data(str(folder), 1), of_data(str(folder))
    return {name: tokenizer.decode(getattr(data, name).tokens[:].tolist()) for name in ("train", "val")}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_documents_are_separated_and_split_by_their_content(tmp_path):
    documents = [*DOCUMENTS, DOCUMENTS[0], "", DOCUMENTS[7]]  # some twice, one empty
    prepare.prepare([lines(tmp_path / "d.jsonl", documents)], tmp_path / "out", small_encoding(), val=0.2)
    texts = {name: text.split(EOT) for name, text in decoded(tmp_path / "out").items()}
    assert texts["train"].pop() == texts["val"].pop() == "", "each ends with its end"
    assert sorted(texts["train"] + texts["val"]) == sorted(text for text in documents if text)
    assert not set(texts["train"]) & set(texts["val"]), "what is there twice is on one side"
    held = [t for t in documents if t and int(hashlib.blake2b(t.encode(), digest_size=8).hexdigest(), 16) < 2**64 / 5]
    assert texts["val"] == held and 3 < len(held) < 25
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["documents"] == 62 and meta["sources"][0]["documents"] == 63
    assert meta["sources"][0]["sha256"] == hashlib.sha256((tmp_path / "d.jsonl").read_bytes()).hexdigest()
    assert meta["tokens"]["val"] == len(open_data(str(tmp_path / "out"), 1).val)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "meta.json",
        "tokenizer",
        "train.bin",
        "val.bin",
    ]


@pytest.mark.parametrize("val, sides", [(1e-9, (59, 1)), (1 - 1e-9, (1, 59))])
def test_neither_side_is_empty(val, sides, tmp_path):
    prepare.prepare([lines(tmp_path / "d.jsonl", DOCUMENTS)], tmp_path / "out", small_encoding(), val=val)
    assert tuple(text.count(EOT) for text in decoded(tmp_path / "out").values()) == sides


def test_a_single_document_is_cut(tmp_path):
    (tmp_path / "in.txt").write_text("\ufeff" + TEXT[:101])
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", "char", val=0.25)
    assert decoded(tmp_path / "out") == {"train": TEXT[:75], "val": TEXT[75:101]}
    meta = read_meta(tmp_path / "out")
    assert meta.itos == tuple(sorted(set(TEXT[:101]))) and meta.fingerprint == CharTokenizer(meta.itos).fingerprint
    lines(tmp_path / "same.jsonl", [TEXT[:50]] * 3)
    prepare.prepare([tmp_path / "same.jsonl"], tmp_path / "same", "char")
    texts = decoded(tmp_path / "same")
    assert texts["train"] + texts["val"] == (TEXT[:50] + EOT) * 3 and len(texts["train"]) > 100


def test_what_a_text_says_is_no_control_token(tmp_path):
    said = f"it says {EOT} twice {EOT}"
    lines(tmp_path / "d.jsonl", [said, "b " * 20, "c " * 20])
    for name, tokenizer in (("bpe", small_encoding()), ("char", "char"), ("own", "train:300")):
        prepare.prepare([tmp_path / "d.jsonl"], tmp_path / name, tokenizer)
        data, end = open_data(str(tmp_path / name), 1), of_data(str(tmp_path / name)).end_of_text
        ids = np.concatenate([data.train.tokens, data.val.tokens])
        assert (ids == end).sum() == 3, name
        assert said + EOT in "".join(decoded(tmp_path / name).values())


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text(DOCUMENTS[0])
    lines(folder / "b" / "c.jsonl", DOCUMENTS[1:3], key="body")
    table = pyarrow.table({"n": [1, 2, 3], "body": [DOCUMENTS[3], None, DOCUMENTS[4]]})
    pyarrow.parquet.write_table(table, folder / "b" / "d.parquet", row_group_size=2)
    (folder / "e.txt.gz").write_bytes(gzip.compress(DOCUMENTS[5].encode()))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(json.dumps({"body": DOCUMENTS[6]}).encode() + b"\n\n"))
    (folder / "notes.json").write_text("not read in a folder")
    (folder / "picture.png").write_bytes(b"\xff")
    prepare.prepare([folder], tmp_path / "out", small_encoding(), reading=prepare.Reading("body"), val=0.3)
    texts = decoded(tmp_path / "out")
    assert sorted((texts["train"] + texts["val"]).split(EOT)[:-1]) == sorted(DOCUMENTS[:7])
    sources = json.loads((tmp_path / "out" / "meta.json").read_text())["sources"]
    assert [(source["file"].rpartition("/")[2], source["documents"]) for source in sources] == [
        ("a.txt", 1), ("c.jsonl", 2), ("d.parquet", 3), ("e.txt.gz", 1), ("f.jsonl.gz", 1)
    ]  # fmt: skip


def test_limit_takes_the_first_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one " * 9)
    lines(tmp_path / "b.jsonl", DOCUMENTS[:5])
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS[5:9]}), tmp_path / "c.parquet", row_group_size=3)
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"]
    for limit, expected in ((1, ["one " * 9]), (4, ["one " * 9, *DOCUMENTS[:3]]), (9, ["one " * 9, *DOCUMENTS[:8]])):
        prepare.prepare(inputs, tmp_path / "out", small_encoding(), limit=limit)
        texts = decoded(tmp_path / "out")
        assert sorted((texts["train"] + texts["val"]).split(EOT)[:-1]) == sorted(expected)
        assert len(json.loads((tmp_path / "out" / "meta.json").read_text())["sources"]) == {1: 1, 4: 2, 9: 3}[limit]


def test_large_files_are_cut_into_parts(tmp_path, monkeypatch):
    """Behind a word, else between characters; what is read is the whole."""
    monkeypatch.setattr(corpus, "UNIT", 200)
    monkeypatch.setattr(corpus, "PIECE", 50)
    (tmp_path / "a.txt").write_text(TEXT[:3000])
    (tmp_path / "b.txt").write_text("你好" * 1000)
    lines(tmp_path / "c.jsonl", [*DOCUMENTS, TEXT[:500]])
    for name in ("a.txt", "b.txt", "c.jsonl"):
        source, parts = corpus.scan(str(tmp_path / name), "text")
        assert len(parts) > 9 and parts[0].start == 0 and parts[-1].stop == source.bytes
        assert all(one.stop == other.start for one, other in zip(parts, parts[1:], strict=False))
        read = [text for part in parts for text in corpus.texts(part, "text")]
        assert sum(text.ends for text in read) == source.documents == (61 if name == "c.jsonl" else 1)
        whole = "".join(text.text + "|" * text.ends for text in read)
        assert whole == {"a.txt": TEXT[:3000] + "|", "b.txt": "你好" * 1000 + "|",
                         "c.jsonl": "|".join([*DOCUMENTS, TEXT[:500], ""])}[name]  # fmt: skip
        assert all(len(text.text) <= 100 for text in read)
        if name == "a.txt":
            assert all(text.text[-1].isalnum() and not text.ends for text in read[:-1])
            assert len({text.document for text in read}) == 1
    prepare.prepare([tmp_path / name for name in ("a.txt", "c.jsonl")], tmp_path / "cut", small_encoding())
    texts = decoded(tmp_path / "cut")
    assert sorted((texts["train"] + texts["val"]).split(EOT)[:-1]) == sorted([TEXT[:3000], *DOCUMENTS, TEXT[:500]])
    (tmp_path / "bad.jsonl").write_text((tmp_path / "c.jsonl").read_text() + "[]\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:62: not a JSON object"):
        prepare.prepare([tmp_path / "bad.jsonl"], tmp_path / "out", small_encoding())


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    lines(tmp_path / "in.jsonl", DOCUMENTS * 2)
    (tmp_path / "in.txt").write_text(TEXT)
    inputs = [tmp_path / "in.jsonl", tmp_path / "in.txt"]
    saved(byte_level(), tmp_path / "hf", eos_token=EOT, chat_template="{{ messages }}")
    for tokenizer in ("char", "train:300", str(tmp_path / "hf")):
        for workers in (1, 2):
            prepare.prepare(inputs, tmp_path / str(workers), tokenizer, workers=workers)
        assert files(tmp_path / "1") == files(tmp_path / "2"), tokenizer
    kept = HuggingFaceTokenizer(kept_with_data(tmp_path / "2"))
    assert (
        kept.fingerprint == read_meta(tmp_path / "2").fingerprint == HuggingFaceTokenizer(tmp_path / "hf").fingerprint
    )
    assert kept.files["chat_template.jinja"] == b"{{ messages }}"


def test_the_tokenizer_of_another_data_set(tmp_path):
    lines(tmp_path / "in.jsonl", DOCUMENTS)
    (tmp_path / "more.txt").write_text("to be, 你好 ünïcode says to be" * 3)
    for name in ("char", "train:300"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "one", name)
        prepare.prepare([tmp_path / "more.txt"], tmp_path / "two", str(tmp_path / "one"))
        assert read_meta(tmp_path / "two").fingerprint == read_meta(tmp_path / "one").fingerprint
        texts = decoded(tmp_path / "two")
        assert texts["train"] + texts["val"] == "to be, 你好 ünïcode says to be" * 3 + EOT
    (tmp_path / "odd.txt").write_text("Q")
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "one", "char")
    with pytest.raises(ValueError, match=r"odd.txt: the character 'Q' \(position 0\) is not among"):
        prepare.prepare([tmp_path / "odd.txt"], tmp_path / "three", str(tmp_path / "one"))


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = CharTokenizer([chr(0x10000 + i) for i in range(2**16)] + ["a"])
    (tmp_path / "in.txt").write_text("aaaa" * 5)
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", tokenizer)
    assert read_meta(tmp_path / "out").dtype == "uint32" and prepare.dtype_of(2**16) == "uint16"
    assert open_data(str(tmp_path / "out"), 1).train.tokens.tolist() == [2**16] * 18


_KILLED = """
import os, runpy, signal, sys
from orchestrate.data import corpus, prepare
where, after = sys.argv.pop(1), int(sys.argv.pop(1))
corpus.UNIT = 5_000

def ends_the_process(original, calls=[]):
    def call(*given, **keys):
        calls.append(0)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **keys)
    return call

owner, _, name = where.rpartition(".")
owner = prepare if not owner else getattr(prepare, owner)
setattr(owner, name, ends_the_process(getattr(owner, name)))
sys.argv[0] = "data/text/prepare.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_and_called_again_gives_the_same_bytes(tmp_path):
    """SIGKILL while it reads, encodes and joins; each call goes on with the shards that are there."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text((TEXT + f"number {i} ") * 8)
    inputs = ["--input", *(str(tmp_path / f"{i}.txt") for i in range(3))]

    def called(out, where, after):
        given = [sys.executable, "-c", _KILLED, where, str(after), *inputs, "--tokenizer=train:300", "--workers=1"]
        return subprocess.run([*given, f"--out={out}"], cwd=ROOT, timeout=100, capture_output=True).returncode

    out = tmp_path / "part"
    assert called(tmp_path / "whole", "_encode", 1000) == 0
    shards = []
    for where, after in (
        ("trained_tokenizer", 0),
        ("_encode", 3),
        ("np.save", 7),
        ("write_meta", 0),
        ("os.replace", 1),
    ):
        if where == "os.replace":  # what is there of a data set that was whole is not taken for one
            (out / "train.bin").write_bytes(b"of an earlier call")
        assert called(out, where, after) == -signal.SIGKILL, where
        shards.append(len(list(out.glob("shards/encoded-*/*.npy"))))
        assert not (out / "train.bin").exists() or where == "trained_tokenizer"
    assert shards[:3] == [0, 3, 10] and shards[3] == shards[4] > 20
    assert called(out, "_encode", 1000) == 0
    assert files(out) == files(tmp_path / "whole")


def test_workers_end_with_a_killed_parent():
    code = "import time; from orchestrate.data import prepare\n"
    code += "with prepare._mapping(2) as mapped: list(mapped(time.sleep, [99] * 2))"
    parent = psutil.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 90
    while len(workers := parent.children()) < 3 and time.monotonic() < deadline:  # and the resource tracker
        time.sleep(0.1)
    time.sleep(1)
    parent.kill()
    parent.wait()
    assert len(workers) == 3 and not psutil.wait_procs(workers, timeout=30)[1]


def test_shards_of_another_input_are_not_taken(tmp_path, monkeypatch):
    lines(tmp_path / "in.jsonl", DOCUMENTS)
    join = prepare._join
    monkeypatch.setattr(prepare, "_join", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", "train:300")
    left = {path.name for path in (tmp_path / "out" / "shards").iterdir()}
    assert len(left) == 2 and not (tmp_path / "out" / "train.bin").exists()
    monkeypatch.setattr(prepare, "_join", join)
    for tokenizer in ("train:290", "char", small_encoding()):
        if tokenizer != "train:290":
            lines(tmp_path / "in.jsonl", DOCUMENTS[:30])
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer)
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "fresh", tokenizer)
        assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = lines(tmp_path / "in.jsonl", DOCUMENTS)
    encode = prepare._encode

    def changes(*given, **keys):
        encode(*given, **keys)
        path.write_text("{}\n")

    monkeypatch.setattr(prepare, "_encode", changes)
    with pytest.raises(ValueError, match="in.jsonl: changed while it was read"):
        prepare.prepare([path], tmp_path / "out", small_encoding())
    assert not (tmp_path / "out" / "train.bin").exists()


BAD = {
    "nothing.txt": (None, "there is no such file or folder"),
    "empty.txt": (b"", "there is no text in it"),
    "latin.txt": (b"abc\xe9 def", r"latin.txt: not UTF-8 text \(byte 3\)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin.jsonl:2: not UTF-8 text"),
    "key.jsonl": (b'{"text": "a"}\n\n{"body": "b", "n": 1}\n', r"key.jsonl:3: has no 'text' \(--key\); there are"),
    "type.jsonl": (b'{"text": 5}\n', r"type.jsonl:1: 'text' must be text, got 5"),
    "json.jsonl": (b'{"text": "a"}\n{"text":\n', r"json.jsonl:2: not JSON"),
    "deep.jsonl": (b"[" * 100_000, r"deep.jsonl:1: not JSON"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half.jsonl:1: 'text' holds half a character"),
    "broken.parquet": (b"PAR1 and no more", "broken.parquet: not a whole parquet file"),
    "broken.txt.gz": (gzip.compress(b"hello" * 99)[:-9], "broken.txt.gz: not a whole gzip file"),
    "plain.jsonl.gz": (b"{}", "plain.jsonl.gz: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_with_its_place(name, tmp_path):
    content, said = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        prepare.prepare([tmp_path / name], tmp_path / "out", small_encoding())
    assert "\n" not in str(refused.value) and not (tmp_path / "out" / "train.bin").exists()


def test_bad_tables_and_options(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), tmp_path / "t.parquet")
    for key, said in (
        ("text", r"has no column 'text' \(--key\); there are \['n', 'body'\]"),
        ("n", "holds int64, not text"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare.prepare([tmp_path / "t.parquet"], tmp_path / "out", "char", reading=prepare.Reading(key))
    pyarrow.parquet.write_table(pyarrow.table({"body": DOCUMENTS}), tmp_path / "t.parquet", use_dictionary=False)
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    raw[20:36] = b"\xff" * 16
    (tmp_path / "t.parquet").write_bytes(raw)
    with pytest.raises(ValueError, match="t.parquet: row 1: cannot be read"):
        prepare.prepare([tmp_path / "t.parquet"], tmp_path / "out", "char", reading=prepare.Reading("body"))
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "none").mkdir()
    for inputs, keys, said in (
        (["a.txt"], {"tokenizer": "train:256"}, "from 257 to"),
        (["a.txt"], {"tokenizer": "train:x"}, "from 257 to"),
        (["a.txt"], {"tokenizer": "none"}, "no tokenizer can be read"),
        (["a.txt"], {"tokenizer": "cl100k"}, "--tokenizer cl100k: no such folder and no data set; tiktoken has"),
        (["a.txt"], {"val": 1.0}, "--val must be above 0 and below 1"),
        (["none"], {}, "there is no text in this folder"),
        (["a.txt", "a.txt"], {}, "given twice"),
    ):  # fmt: skip
        given = {"tokenizer": "char", **keys}
        given["tokenizer"] = str(tmp_path / "none") if given["tokenizer"] == "none" else given["tokenizer"]
        with pytest.raises(ValueError, match=said):
            prepare.prepare([tmp_path / name for name in inputs], tmp_path / "out", **given)


def test_without_pyarrow_there_is_one_message(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="t.parquet: parquet files need pyarrow: pip install pyarrow"):
        prepare.prepare([tmp_path / "t.parquet"], tmp_path / "out", "char")


def test_the_command(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT)
    said = script("text", "--input", tmp_path / "in.txt", "--tokenizer", "train:290", "--out", tmp_path / "d")
    assert said.startswith("1 document, vocabulary of 290; train.bin ")
    texts = decoded(tmp_path / "d")
    assert texts["train"] + texts["val"] == TEXT + EOT and len(texts["val"]) < len(TEXT) / 8
    said = script("text", "--out", tmp_path / "e", code=2)
    assert said == "error: --input: files or folders of documents are needed\n"
    said = script("text", "--input", tmp_path / "in.txt", "--workers", 0, code=2)
    assert said == "error: --workers must be at least 1, --limit and --shard_tokens at least 0\n"


def test_of_a_message_of_many_lines_the_first_is_told(monkeypatch):
    def refused(path):
        raise pyarrow.ArrowInvalid("first\nsecond")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refused)
    with pytest.raises(ValueError, match=r"^x.parquet: not a whole parquet file \(first\)$"):
        corpus._parquet("x.parquet")
