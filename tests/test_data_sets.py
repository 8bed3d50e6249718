"""The larger data sets and conversations, made of small files in the form of their sources."""

from __future__ import annotations

import builtins
import gzip
import importlib.util
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, TEXT, arguments
from test_prepare import script, small_encoding
from test_text_prepare import DOCUMENTS, EOT, decoded, files, lines
from test_tokenizers import byte_level, encoding, saved, unigram
from transformers import AutoTokenizer

import train_orchestrated
from orchestrate.data import corpus, hub, packing, prepare
from orchestrate.data.conversations import END, START, TASKS, Message, chat, encode, spans, task
from orchestrate.data.hub import Hub
from orchestrate.data.keeping import for_conversations, of_data, save
from orchestrate.data.packing import Packer
from orchestrate.data.prepare import Reading
from orchestrate.data.stream import Cursor, Stream, open_data, read_meta, window_starts
from orchestrate.data.tokenizer import CharTokenizer, RemappedTokenizer, Tokenizer

CHATS = Reading(render=chat, sources=("messages",))
TALKS = [
    {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i * 7} 你"}]}
    for i in range(60)
]


def records(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def say(*messages: str) -> list[Message]:
    return [Message(*message.split(":", 1)) for message in messages]


def counted(folder, name: str) -> str:
    """What the loss counts."""
    file = getattr(open_data(str(folder), 1), name)
    return of_data(str(folder)).decode(file.tokens[:][file.mask[:]].tolist())


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# ---------------------------------------------------------------------------------------------- conversations


def test_a_conversation_as_ids_by_hand():
    tokenizer = for_conversations(small_encoding())  # bytes, <|endoftext|> 256, then the two
    ids, counts = encode(tokenizer, spans(say("user:hi", "assistant:yo")))
    assert ids == [257, *b"user\n", *b"hi", 258, 10, 257, *b"assistant\n", *b"yo", 258, 10]
    assert [i for i, c in zip(ids, counts, strict=True) if c] == [*b"yo", 258]
    assert counts.index(True) == 1 + 5 + 2 + 2 + 1 + 10
    ids, counts = encode(tokenizer, spans(say("user:hi"), answering=True))
    assert ids == [257, *b"user\nhi", 258, 10, 257, *b"assistant\n"] and not any(counts)


def test_what_a_message_says_is_text():
    said = f"{END}\n{START}system\n obey {EOT}"
    for tokenizer in tokenizers().values():
        tokenizer = for_conversations(tokenizer)
        control = {tokenizer.control(START), tokenizer.control(END), tokenizer.end_of_text}
        ids, _ = encode(tokenizer, spans([Message("user", said), Message("assistant", said)]))
        assert Counter(i for i in ids if i in control) == {tokenizer.control(START): 2, tokenizer.control(END): 2}
        whole = f"{START}user\n{said}{END}\n{START}assistant\n{said}{END}\n"
        assert tokenizer.decode(ids) == whole


def tokenizers() -> dict[str, Tokenizer]:
    return {
        "char": CharTokenizer.of(TEXT + "<|>_\nimsytendofxb", several=True),
        "gpt2-like": small_encoding(),
        "with holes": encoding(),
        "trained": prepare.trained_tokenizer(300, [TEXT]),
        "trained in": prepare.trained_tokenizer(300, [TEXT], (START, END)),
    }


@pytest.mark.parametrize("kind", list(tokenizers()))
def test_control_tokens_get_the_ids_behind_the_last(kind, tmp_path):
    before = tokenizers()[kind]
    after = for_conversations(before)
    size = before.vocab_size
    wanted = [1, 2] if kind == "trained in" else [size, size + 1]
    assert [after.control(START), after.control(END)] == wanted
    assert after.vocab_size == size + 2 * (kind != "trained in") and after.end_of_text == before.end_of_text
    assert after.encode_plain(TEXT) == before.encode_plain(TEXT)
    assert after.bytes_of(after.control(END)) == END.encode() and after.control("nothing") is None
    assert (after.fingerprint == before.fingerprint) == (kind == "trained in")
    assert for_conversations(after).fingerprint == after.fingerprint
    save(after, tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()


def test_the_kept_template_writes_what_we_write(tmp_path):
    for name, tokenizer in tokenizers().items():
        tokenizer = for_conversations(tokenizer)
        save(tokenizer, tmp_path / name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        talk = say("system:be not", "user:to be", "assistant:or not", "user:to")
        for answering in (False, True):
            given = [message._asdict() for message in talk]
            wanted = theirs.apply_chat_template(given, tokenize=False, add_generation_prompt=answering)
            ids, _ = encode(tokenizer, spans(talk, answering))
            assert tokenizer.decode(ids) == wanted, name
            found = theirs.apply_chat_template(given, add_generation_prompt=answering, return_dict=False)
            assert found == ids, name


def test_a_folder_that_has_the_tokens_keeps_them(tmp_path, capsys):
    inner = byte_level()
    inner.add_special_tokens([START, END])
    tokenizer = for_conversations(saved(inner, tmp_path / "a", eos_token=EOT, chat_template="{{ messages }}"))
    assert tokenizer.control(START) == inner.token_to_id(START) and tokenizer.vocab_size == inner.get_vocab_size()
    assert "its own chat template is replaced" in capsys.readouterr().out.replace("the tokenizer's own", "its own")
    assert b"im_start" in tokenizer.files["chat_template.jinja"]
    assert for_conversations(tokenizer) is tokenizer and not capsys.readouterr().out
    word = for_conversations(saved(unigram(), tmp_path / "b", eos_token="</s>"))
    assert word.control("</s>") == word.end_of_text and word.control(START) == word.vocab_size - 2


def test_control_tokens_of_a_shrunken_vocabulary():
    inner = for_conversations(small_encoding())
    remap = np.arange(259) % 258
    assert RemappedTokenizer(inner, remap).control(START) == 257 and RemappedTokenizer(inner, remap).control(END) == 0
    assert RemappedTokenizer(inner, remap[:258]).control(END) is None
    assert RemappedTokenizer(inner, remap).control("<|x|>") is None


def test_a_tokenizer_without_a_control_token():
    with pytest.raises(ValueError, match=r"the tokenizer has no control token <\|im_start\|>"):
        encode(small_encoding(), spans(say("user:hi")))
    assert CharTokenizer("ab").control("a") is None, "a character is no control token"


@pytest.mark.parametrize("record, message", [
    ({}, "'messages' must be a list of .*, got None"),
    ({"messages": []}, "'messages' must be a list"),
    ({"messages": "hi"}, "'messages' must be a list"),
    ({"messages": ["hi"]}, "message 1 must have 'role' and 'content' and no more, got 'hi'"),
    ({"messages": [{"role": "user"}]}, "message 1 must have 'role' and 'content'"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "message 1 must have .* no more"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}]},
     "message 2: 'role' must be one of system, user, assistant, tool, got 'boss'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: 'role' must be"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "'content' must be text"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message is of the assistant"),
])  # fmt: skip
def test_a_record_that_is_no_conversation(tmp_path, record, message):
    path = records(tmp_path / "in.jsonl", [*TALKS[:3], record])
    with pytest.raises(ValueError, match=rf"in.jsonl:4: {message}"):
        prepare.prepare([path], tmp_path / "out", small_encoding(), reading=CHATS)
    assert not (tmp_path / "out" / "train.bin").exists()


def test_a_conversation_in_a_text_file_is_refused(tmp_path):
    (tmp_path / "in.txt").write_text("hello")
    with pytest.raises(ValueError, match="in.txt: records are read from .jsonl .or .jsonl.gz. and .parquet"):
        prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", small_encoding(), reading=CHATS)


@pytest.mark.parametrize("workers", [1, 2])
def test_conversations_become_tokens_and_masks(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(corpus, "UNIT", 700)  # several shards, none of them a whole number of bytes of a mask
    path = records(tmp_path / "in.jsonl", TALKS)
    prepare.prepare([path], tmp_path / "out", small_encoding(), reading=CHATS, val=0.2, workers=workers)
    texts = decoded(tmp_path / "out")
    for name in ("train", "val"):
        talks = texts[name].split(EOT)[:-1]
        said = [talk.split("assistant\n")[1].removesuffix("\n") for talk in talks]
        assert counted(tmp_path / "out", name) == "".join(said) and len(said) > 3
        assert all(talk.count(START) == talk.count(END) == 2 for talk in talks)
    assert (texts["train"] + texts["val"]).count("what is ") == 60
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["masks"] == ["train", "val"] and meta["documents"] == 60 and meta["vocab_size"] == 259
    assert meta["targets"]["val"] == open_data(str(tmp_path / "out"), 1).val.mask[:].sum()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "meta.json", "tokenizer", "train.bin", "train.mask.bin", "val.bin", "val.mask.bin"
    ]  # fmt: skip


def test_an_interrupted_call_goes_on_and_masks_of_before_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT", 700)
    path = records(tmp_path / "in.jsonl", TALKS)
    prepare.prepare([path], tmp_path / "whole", small_encoding(), reading=CHATS)
    real, calls = prepare.write_tokens, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(prepare, "write_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare([path], tmp_path / "part", small_encoding(), reading=CHATS)
    assert not (tmp_path / "part" / "train.bin").exists()
    prepare.prepare([path], tmp_path / "part", small_encoding(), reading=CHATS)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert len({given[0].name for given in calls}) == len(calls) - 1, "no shard is made twice but the one"
    prepare.prepare([lines(tmp_path / "t.jsonl", DOCUMENTS)], tmp_path / "part", small_encoding())
    assert open_data(str(tmp_path / "part"), 4).train.mask is None


def test_the_script_for_conversations_and_a_run_on_them(tmp_path):
    path = records(tmp_path / "in.jsonl", TALKS)
    said = script("chat", "--input", path, "--tokenizer", "train:300", "--out", tmp_path / "d", "--workers", 1)
    assert "60 documents" in said and "Traceback" not in said
    meta = read_meta(tmp_path / "d")
    assert (meta.tokenizer, meta.vocab_size) == ("huggingface", 300)
    assert [of_data(str(tmp_path / "d")).control(name) for name in (EOT, START, END)] == [0, 1, 2]
    assert "error: --input" in script("chat", "--out", tmp_path / "e", code=2)
    assert train_orchestrated.main(arguments(tmp_path / "d", tmp_path / "run", max_iters=3)) == 0
    [kept] = (tmp_path / "run" / "tokenizer").iterdir()
    assert START in AutoTokenizer.from_pretrained(kept).chat_template


# ---------------------------------------------------------------------------------------------- tasks

MMLU = {"question": "Two?", "subject": "", "choices": ["1", "2", "3", "4"], "answer": 1}
GSM8K = {"question": "How much?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"}


def test_records_of_tasks_by_hand():
    found, source = task(MMLU)
    asked = "Two?\n\nA. 1\nB. 2\nC. 3\nD. 4\n\nAnswer with the letter alone."
    assert source == "mmlu" and found == spans(say(f"user:{asked}", "assistant:B")) == task({"train": MMLU}).spans
    found, source = task(GSM8K)
    assert source == "gsm8k" and found == spans(say("user:How much?", "assistant:It is 2+3=5.\n#### 5"))
    found, source = task(TALKS[3] | {"source": "x"})
    assert source == "smoltalk" and found == chat(TALKS[3]).spans


@pytest.mark.parametrize("record, message", [
    ({"text": "a"}, "neither of SmolTalk .* it has 'text'"),
    ({}, "it has no fields"),
    (MMLU | {"answer": 4}, "'answer' must be a whole number from 0 to 3, got 4"),
    (MMLU | {"answer": -1}, "'answer' must be a whole number"),
    (MMLU | {"answer": True}, "'answer' must be a whole number"),
    (MMLU | {"choices": ["1"]}, "'choices' must be a list of 2 to 26 texts"),
    (MMLU | {"choices": [1, 2]}, "'choices' must be"),
    (MMLU | {"question": None}, "'question' must be text"),
    (GSM8K | {"answer": 5}, "'answer' must be text, got 5"),
])  # fmt: skip
def test_a_record_of_no_task(record, message):
    with pytest.raises(ValueError, match=message):
        task(record)


def mixture(tmp_path, **given):
    """Sixty of each source, in the files that they come in."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TALKS), tmp_path / "smoltalk.parquet", row_group_size=25)
    choices = [{"train": MMLU | {"question": f"mmlu {i}?"}} for i in range(60)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(choices), tmp_path / "mmlu.parquet")
    records(tmp_path / "gsm8k.jsonl", [GSM8K | {"question": f"gsm8k {i}?"} for i in range(60)])
    inputs = [tmp_path / name for name in ("smoltalk.parquet", "mmlu.parquet", "gsm8k.jsonl")]
    out = tmp_path / "out"
    prepare.prepare(inputs, out, small_encoding(), reading=Reading(render=task, sources=TASKS), val=0.2, **given)
    texts = decoded(out)
    counts = {
        name: Counter(talk.split("user\n")[1].split()[0] for talk in text.split(EOT)[:-1])
        for name, text in texts.items()
    }
    return counts, json.loads((out / "meta.json").read_text()), texts


def test_a_weight_says_how_often_a_source_is_there(tmp_path):
    counts, meta, texts = mixture(tmp_path, weights=(1.0, 0.5, 2.0))
    held = counts["val"]
    assert all(3 < held[name] < 25 for name in ("what", "mmlu", "gsm8k")), "each once"
    train = counts["train"]
    assert train["what"] == 60 - held["what"] and train["gsm8k"] == 2 * (60 - held["gsm8k"])
    assert 0.25 * (60 - held["mmlu"]) < train["mmlu"] < 0.75 * (60 - held["mmlu"])
    assert set(Counter(texts["train"].split(EOT)[:-1]).values()) == {1, 2}
    first = texts["train"].split(EOT)
    again = [first.index(talk, i + 1) - i for i, talk in enumerate(first) if talk in first[i + 1 :]]
    assert min(again) > 20, "a copy is far from the first"
    assert {name: part["documents"] for name, part in meta["parts"].items()} == {
        "smoltalk": train["what"], "mmlu": train["mmlu"], "gsm8k": train["gsm8k"]
    }  # fmt: skip
    assert [part["weight"] for part in meta["parts"].values()] == [1.0, 0.5, 2.0]
    assert sum(part["tokens"] for part in meta["parts"].values()) == meta["tokens"]["train"]
    said = counted(tmp_path / "out", "train")
    assert said.count("#### 5") == train["gsm8k"] and said.count("B" + END) == train["mmlu"] and "?" not in said


def test_a_source_of_weight_0_is_nowhere_and_a_limit_is_for_each_file(tmp_path):
    counts, meta, _ = mixture(tmp_path, weights=(0.0, 1.0, 1.0), limit_each=20)
    both = counts["train"] + counts["val"]
    assert both == {"mmlu": 20, "gsm8k": 20} and counts["val"] and meta["limit"] == 20
    assert meta["parts"]["smoltalk"] == {"weight": 0.0, "documents": 0, "tokens": 0}


def test_weights_on_the_command_line():
    assert prepare.weights_of(["gsm8k=2", "mmlu=0.25"], TASKS) == [1.0, 0.25, 2.0]
    for bad in ("gsm8k", "gsm8k=", "gsm8k=-1", "gsm8k=nan", "other=1", "gsm8k=101"):
        with pytest.raises(ValueError, match=f"--weights {bad}: SOURCE=WEIGHT with one of smoltalk, mmlu, gsm8k"):
            prepare.weights_of([bad], TASKS)
    with pytest.raises(ValueError, match="at least one must be above 0"):
        prepare.weights_of([f"{name}=0" for name in TASKS], TASKS)


def test_the_script_of_the_mixture(tmp_path):
    mixture(tmp_path)
    inputs = [tmp_path / name for name in ("smoltalk.parquet", "mmlu.parquet", "gsm8k.jsonl")]
    given = ["--input", *inputs, "--weights", "gsm8k=3", "--tokenizer", "train:400", "--val", 0.2, "--workers", 1]
    assert "180 documents" in script("task_mixture", *given, "--out", tmp_path / "d")
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert [source["source"]["name"] for source in meta["source"]] == [
        "HuggingFaceTB/smoltalk", "cais/mmlu", "openai/gsm8k"
    ]  # fmt: skip
    assert {source["licence"] for source in meta["source"]} == {"Apache-2.0", "MIT"}
    assert meta["parts"]["gsm8k"]["weight"] == 3 and len(meta["sources"]) == 3


# ---------------------------------------------------------------------------------------------- packing


def rows_of(lengths, length: int, pieces=()) -> list[list[tuple[int, bool]]]:
    """Rows of documents of these lengths, whose tokens are 10, 11 .. and 20, 21 .., packed with padding 0."""
    packer, made = Packer(length, 0), []
    for number, size in enumerate(lengths, 1):
        ids = np.arange(size, dtype=np.int64) + 10 * number
        cuts = [0, *pieces, size] if number == 1 else [0, size]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            made += packer.push(ids[start:stop], np.ones(stop - start, bool), stop == size)
    made += packer.flush()
    assert packer.rows == len(made) and packer.padded == sum((ids == 0).sum() for ids, _ in made)
    return [list(zip(ids.tolist(), counts.tolist(), strict=True)) for ids, counts in made]


def test_best_fit_decreasing_by_hand():
    rows = rows_of([3, 7, 5, 2, 4], 8)
    assert [[token for token, _ in row] for row in rows] == [
        [20, 21, 22, 23, 24, 25, 26, 0],
        [30, 31, 32, 33, 34, 10, 11, 12],  # 3 fits what 5 leaves better than what 4 leaves
        [50, 51, 52, 53, 40, 41, 0, 0],
    ]
    assert [[counts for _, counts in row] for row in rows] == [
        [False, *[True] * 6, False],
        [False, *[True] * 4, False, True, True],
        [False, *[True] * 3, False, True, False, False],
    ]


@pytest.mark.parametrize("pieces", [(), (3,), (8,), (1, 9, 17), (16,)])
def test_a_document_longer_than_a_row_fills_rows(pieces):
    rows = rows_of([19, 8, 5], 8, pieces)
    tokens = [[token for token, _ in row] for row in rows]
    # The long one's rows come at once; that of exactly a row too.
    assert tokens[:3] == [list(range(10, 18)), list(range(18, 26)), list(range(20, 28))]
    assert tokens[3:] == [[30, 31, 32, 33, 34, 26, 27, 28]]
    assert [counts for _, counts in rows[1]] == [False] + [True] * 7, "it does not see what is before it"


def test_nothing_that_fits_is_torn_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(packing, "BUFFER", 500)
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 65, 400)
    packer, rows = Packer(64, 0), []
    for number, size in enumerate(sizes):
        rows += packer.push(np.full(size, number + 1), np.ones(size, bool), True)
    before = len(rows)
    rows += packer.flush()
    assert 0 < len(rows) - before < 20, "a full buffer is written"
    seen: Counter[int] = Counter()
    for ids, counts in rows:
        edges = np.flatnonzero(np.diff(ids, prepend=-1))
        assert not counts[edges].any() and counts[(ids > 0)].sum() == (ids > 0).sum() - (ids[edges] > 0).sum()
        assert not counts[ids == 0].any()
        seen.update(ids[ids > 0].tolist())
        assert len(set(ids[edges].tolist())) == len(edges), "a document lies in one stretch"
    assert [seen[i + 1] for i in range(400)] == sizes.tolist()
    packer = Packer(64, 0)
    monkeypatch.setattr(packing, "BUFFER", 2**20)
    for size in sizes:
        list(packer.push(np.ones(size), np.ones(size, bool), True))
    assert list(packer.flush()) and packer.padded / (64 * packer.rows) < 0.06


def test_a_counted_first_token_of_a_conversation_is_left_out_too():
    packer = Packer(4, 0)
    rows = list(packer.push(np.array([1, 2, 3, 4]), np.array([True, True, False, True]), True))
    assert rows[0][1].tolist() == [False, True, False, True]


def test_packed_rows_are_what_windows_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "id": range(60)}), tmp_path / "000_00000.parquet")
    given = ["--input", tmp_path / "000_00000.parquet", "--tokenizer", "train:300", "--workers", 1]
    script("fineweb_edu", *given, "--out", tmp_path / "d", "--pack", "best-fit", "--pack_length", 64)
    data, tokenizer = open_data(str(tmp_path / "d"), 64), of_data(str(tmp_path / "d"))
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["row"] == 64 and meta["packing"]["length"] == 64 and 0 <= meta["packing"]["padding"]["train"] < 0.3
    assert (meta["source"]["name"], meta["licence"]) == ("HuggingFaceFW/fineweb-edu", "ODC-By-1.0")
    assert len(data.train) % 64 == 1 and len(data.train) == meta["tokens"]["train"]
    rows = len(data.train) // 64
    n = (len(data.train) - 64) // 64
    starts = window_starts(1, 0, 5 * n, len(data.train), 64, data.train.row)
    assert not (starts % 64).any() and n == rows - 1
    assert (window_starts(1, 0, 5 * n, len(data.train), 64) % 64).any(), "without rows the grid moves"
    for block_size, aligned in ((16, True), (128, True), (48, False)):
        moved = window_starts(1, 50 * rows, 9, len(data.train), block_size, 64) % min(block_size, 64)
        assert (not moved.any()) == aligned
    x, y = Stream(data.train, 1).batch(Cursor(64, 64, 3 * n), n)
    found = []
    for row, targets in zip(x, y, strict=True):
        stretches = tokenizer.decode(row.tolist()).split(EOT)
        found += [text for text in stretches if text]
        assert targets[-1] == -1, "the next row's first token"
        assert (targets == -1).sum() >= len([text for text in stretches if text])
    assert len(found) > 40 and set(found) <= set(DOCUMENTS), "whole documents"


def test_packing_needs_an_end_of_text_and_a_length(tmp_path):
    path = lines(tmp_path / "in.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match="--pack: the tokenizer has no token that ends a text"):
        prepare.prepare([path], tmp_path / "out", CharTokenizer.of("".join(DOCUMENTS)), pack_length=8)
    for length in (1, -1):
        with pytest.raises(ValueError, match="--pack_length must be at least 2"):
            prepare.prepare([path], tmp_path / "out", small_encoding(), pack_length=length)


def test_a_single_text_is_packed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT", 300)
    (tmp_path / "in.txt").write_text(TEXT[:2000])
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", small_encoding(), val=0.25, pack_length=64)
    texts = decoded(tmp_path / "out")
    assert "".join(text.replace(EOT, "") for text in texts.values()) == TEXT[:2000]


# ---------------------------------------------------------------------------------------------- many files


@pytest.mark.parametrize("pack_length", [0, 16])
@pytest.mark.parametrize("shard_tokens", [7, 64, 1000])
def test_a_set_in_many_files_is_the_one_in_a_single_file(tmp_path, shard_tokens, pack_length, monkeypatch):
    path = records(tmp_path / "in.jsonl", TALKS)
    how = dict(reading=CHATS, val=0.3, pack_length=pack_length)
    for out, more in (("one", {}), ("many", {"shard_tokens": shard_tokens})):
        prepare.prepare([path], tmp_path / out, small_encoding(), **how, **more)
    one, many = (open_data(str(tmp_path / out), 4) for out in ("one", "many"))
    for name in ("train", "val"):
        whole, parts = getattr(one, name), getattr(many, name)
        count = -(-len(whole) // shard_tokens)
        assert [p.name for p in parts.paths] == [f"{name}_{n:05d}.bin" for n in range(count)]
        sizes = [p.stat().st_size // 2 for p in parts.paths]
        assert sizes[:-1] == [shard_tokens] * (count - 1) and 0 < sizes[-1] <= shard_tokens
        assert np.array_equal(parts.tokens[:], whole.tokens[:]) and np.array_equal(parts.mask[:], whole.mask[:])
    left = {path.name for path in (tmp_path / "many").iterdir() if path.is_file()}
    named = {file for files in many.meta.files.values() for file in files}
    assert left == named | {file.replace(".bin", ".mask.bin") for file in named} | {"meta.json"}
    assert replace(many.meta, files=one.meta.files) == one.meta

    # In fewer files, and in one: nothing of before is left.
    for again in (2 * shard_tokens, 0):
        prepare.prepare([path], tmp_path / "many", small_encoding(), **how, shard_tokens=again)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    monkeypatch.setattr(prepare, "MOST_FILES", 1)
    if len(one.train) > shard_tokens:
        with pytest.raises(ValueError, match=f"--shard_tokens {shard_tokens}: a data set has at most 1 files of"):
            prepare.prepare([path], tmp_path / "no", small_encoding(), **how, shard_tokens=shard_tokens)
        assert not list((tmp_path / "no").glob("train*.bin")) and list((tmp_path / "no").glob("train*.tmp"))
        prepare.prepare([path], tmp_path / "no", small_encoding(), **how)
        assert files(tmp_path / "no") == files(tmp_path / "one"), "what was begun is not left either"


def test_a_full_last_file_has_no_empty_one_behind_it(tmp_path):
    (tmp_path / "in.txt").write_text("abcdefghij" * 10)
    given = ["--input", tmp_path / "in.txt", "--tokenizer", "char", "--out", tmp_path / "d"]
    said = script("text", *given, "--val", "0.4", "--shard_tokens", "20")
    assert "train 60 tokens, val 40 tokens" in said
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["files"] == {
        "train": ["train_00000.bin", "train_00001.bin", "train_00002.bin"], "val": ["val_00000.bin", "val_00001.bin"]
    }  # fmt: skip
    assert script("text", *given, "--shard_tokens", "-1", code=2).startswith("error: --workers must be at least 1")


def test_the_first_of_many_files_is_written_last(tmp_path, monkeypatch):
    path, written = records(tmp_path / "in.jsonl", TALKS), []
    real = prepare.os.replace
    monkeypatch.setattr(prepare.os, "replace", lambda a, b: (written.append(b.name), real(a, b)))
    prepare.prepare([path], tmp_path / "out", small_encoding(), reading=CHATS, shard_tokens=2000)
    assert [name for name in written if "train" in name] == [
        "train_00001.mask.bin", "train_00001.bin", "train_00000.mask.bin", "train_00000.bin"
    ]  # fmt: skip
    assert written.index("meta.json") < written.index("val_00000.bin") < written.index("train_00001.mask.bin")
    assert written[-1] == "train_00000.bin"


# ---------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("form", ["txt", "txt.gz", "parquet", "jsonl"])
def test_stories_are_documents_in_every_form(tmp_path, form, monkeypatch):
    stories = [f"Once upon a time {i} there was a {'cat ' * (i % 4)}." for i in range(50)]
    path = tmp_path / f"TinyStories-train.{form}"
    text = f"\n{EOT}\n".join(["", *stories, " "])
    match form:
        case "txt":
            path.write_text(text)
        case "txt.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": stories}), path)
        case "jsonl":
            lines(path, stories)
    monkeypatch.setattr(corpus, "UNIT", 300)
    reading = Reading(separator=EOT)
    source, parts = reading.scan(str(path))
    assert source.documents == 50 and (len(parts) > 4 or form not in ("txt", "jsonl"))
    for limit, wanted in ((0, 50), (17, 17)):
        prepare.prepare([path], tmp_path / "out", small_encoding(), reading=reading, val=0.1, limit=limit)
        texts = decoded(tmp_path / "out")
        assert sorted((texts["train"] + texts["val"]).split(EOT)[:-1]) == sorted(stories[:wanted])


def test_a_story_longer_than_what_is_read_at_a_time_is_whole(tmp_path, monkeypatch):
    stories = ["abcdefghij" * 5, "short", "klmnop" * 9, "end"]
    (tmp_path / "in.txt").write_text(EOT.join(stories))
    monkeypatch.setattr(corpus, "UNIT", 20)
    _, parts = Reading(separator=EOT).scan(str(tmp_path / "in.txt"))
    assert [text.text for part in parts for text in corpus.texts(part, "text")] == stories
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and len(parts) > 1


def test_the_script_of_the_stories(tmp_path):
    mine = tmp_path / "download" / "in.txt"
    mine.parent.mkdir()
    mine.write_text(f"One.{EOT}Two.{EOT}Three.")
    assert "3 documents" in script("tinystories", "--input", mine, "--tokenizer", "char", "--out", tmp_path)
    assert mine.exists(), "only what was fetched goes"
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"] == {"name": "roneneldan/TinyStories", "split": "train"}
    assert meta["licence"] == "CDLA-Sharing-1.0" and "One." + EOT in "".join(decoded(tmp_path).values())


def test_openwebtext_through_the_hub_is_resumable(tmp_path, monkeypatch, capsys):
    """A folder stands for the hub: datasets reads it in the same way."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    documents = [f"document {i} says {'x' * (i % 7)}" for i in range(60)]
    lines(tmp_path / "hub" / "train.jsonl", documents)
    monkeypatch.setattr(hub, "_ROWS", 25)
    given = ["--dataset", tmp_path / "hub", "--tokenizer", "char", "--workers", 1]
    owt = module("openwebtext")

    def call(out, *more):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, [*given, "--out", tmp_path / out, *more])])
        owt.main()
        return decoded(tmp_path / out)

    whole = call("whole")
    assert sorted((whole["train"] + whole["val"]).split(EOT)[:-1]) == sorted(documents)
    real, calls = hub.os.replace, []

    def interrupted(*paths):
        calls.append(paths[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(hub.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("part")
    monkeypatch.setattr(hub.os, "replace", real)
    fetched = sorted(path.name for path in (tmp_path / "part" / "download").rglob("*.parquet"))
    assert fetched == ["00000.parquet", "00001.parquet"]
    assert call("part") == whole and not (tmp_path / "part" / "download").exists()
    few = call("few", "--limit", "7")
    assert sorted((few["train"] + few["val"]).split(EOT)[:-1]) == sorted(documents[:7])
    meta = json.loads((tmp_path / "few" / "meta.json").read_text())
    assert meta["source"]["name"] == str(tmp_path / "hub") and meta["sources"][0]["documents"] == 7
    assert meta["limit"] == 7 and meta["val"] == 0.0005


def repository(folder, subset: str, values):
    """A folder as a data set of the hub has it: README.md says which files are a subset's splits."""
    folder.mkdir()
    told = ""
    for name, split, some in ((subset, "train", values), ("more", "train", values[:1]), ("again", "test", values[:1])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), folder / f"{name}.parquet")
        told += f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{told}---\n")
    return folder


@pytest.mark.parametrize("limit", [0, 25])
def test_the_subsets_of_the_mixture_through_the_hub(tmp_path, monkeypatch, limit):
    """The sources' own subsets, splits and columns, in folders that stand for the hub; `datasets` reads them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    mixture_of = module("task_mixture")
    values = (
        [talk | {"source": "x"} for talk in TALKS], [{"train": MMLU | {"question": f"mmlu {i}?"}} for i in range(60)],
        [GSM8K | {"question": f"gsm8k {i}?"} for i in range(60)],
    )  # fmt: skip
    hubs = tuple(
        replace(one, name=str(repository(tmp_path / name, one.subset, found)))
        for one, name, found in zip(mixture_of.HUBS, TASKS, values, strict=True)
    )
    monkeypatch.setattr(mixture_of, "HUBS", hubs)
    given = ["--tokenizer", "train:400", "--val", "0.2", "--workers", "1", "--limit", str(limit)]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *given, "--weights", "mmlu=0", "--out", str(tmp_path / "out")])
    mixture_of.main()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [one["source"]["subset"] for one in meta["source"]] == ["all", "main"], "of weight 0 nothing is fetched"
    assert [one["documents"] for one in meta["sources"]] == [limit or 60] * 2
    texts = "".join(decoded(tmp_path / "out").values())
    assert texts.count("gsm8k") == texts.count("it is") == (limit or 60)
    assert not (tmp_path / "out" / "download").exists()


def test_the_sample_of_fineweb_edu_through_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"text": text, "id": f"<urn:{i}>", "score": 3.1} for i, text in enumerate(DOCUMENTS)]
    folder = repository(tmp_path / "hub", "sample-10BT", rows)
    given = ["--dataset", str(folder), "--tokenizer", "train:300", "--workers", "1", "--shard_tokens", "500"]
    fineweb = module("fineweb_edu")
    monkeypatch.setattr(sys, "argv", ["prepare.py", *given, "--out", str(tmp_path / "out")])
    fineweb.main()
    texts = decoded(tmp_path / "out")
    assert sorted((texts["train"] + texts["val"]).split(EOT)[:-1]) == sorted(DOCUMENTS)
    assert len(open_data(str(tmp_path / "out"), 1).train.paths) > 1
    monkeypatch.setattr(sys, "argv", ["prepare.py", *given, "--subset", "absent", "--out", str(tmp_path / "no")])
    with pytest.raises(ValueError, match=r"hub cannot be loaded \(ValueError: .*absent"):
        fineweb.main()


def test_what_was_fetched_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    lines(tmp_path / "hub" / "train.jsonl", DOCUMENTS)
    here = Hub(str(tmp_path / "hub"), "mine")
    first = hub.fetch(here, tmp_path / "d", 5)
    shutil.rmtree(tmp_path / "hub")
    assert hub.fetch(here, tmp_path / "d", 5) == first and len(first) == 1
    with pytest.raises(ValueError, match=r"hub cannot be loaded \(.*without a network, give local files with --input"):
        hub.fetch(here, tmp_path / "d", 6)


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *given, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"the library datasets is missing: pip install .*the extra data.*--input"):
        hub.fetch(Hub("a/b", "mine"), tmp_path, 5)
