"""Masks, several files as one, reading ahead: a batch is the same however its tokens lie and whoever reads them."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch
from conftest import arguments, state_of, write_data
from test_operations import live_run

import train_orchestrated
from orchestrate.data.files import Bits, Joined, packed
from orchestrate.data.mixture import Sources
from orchestrate.data.stream import Cursor, Meta, Stream, TokenFile, eval_windows, gather, open_data, read_meta
from orchestrate.training.run.batches import Batches
from orchestrate.training.settings.errors import Refused


def masked_folder(folder, counts, lengths=(), masks=("train",), **meta):
    """tokens 100, 101 .. cut into files of these lengths, and a mask of each."""
    folder.mkdir(exist_ok=True)
    ids, counts, names, start = np.arange(100, 100 + len(counts), dtype=np.uint16), np.array(counts, bool), [], 0
    for i, length in enumerate(lengths or [len(counts)]):
        names.append(f"train_{i:03d}.bin" if lengths else "train.bin")
        ids[start : start + length].tofile(folder / names[-1])
        if "train" in masks:
            (folder / f"{names[-1][:-4]}.mask.bin").write_bytes(packed(counts[start : start + length]))
        start += length
    ids.tofile(folder / "val.bin")
    if "val" in masks:
        (folder / "val.mask.bin").write_bytes(packed(counts))
    values = {"format": 1, "tokenizer": "gpt2", "files": {"train": names}, "masks": list(masks), **meta}
    (folder / "meta.json").write_text(json.dumps(values))
    return folder


def test_a_mask_is_a_bit_a_token_the_lowest_first(tmp_path):
    (tmp_path / "m").write_bytes(bytes([0b00000101, 0b10]))
    bits = Bits(tmp_path / "m", 10)
    assert bits[:].tolist() == [True, False, True] + [False] * 6 + [True] and len(bits) == 10
    assert bits[np.array([[9, 8], [0, 1]])].tolist() == [[True, False], [True, False]]
    assert packed(bits[:]) == (tmp_path / "m").read_bytes()


def test_targets_that_do_not_count_are_minus_one(tmp_path):
    counts = [0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0]
    data = open_data(str(masked_folder(tmp_path / "d", counts)), 5)
    x, y = gather(data.train, np.array([0, 5]), 5)
    assert x.tolist() == [[100, 101, 102, 103, 104], [105, 106, 107, 108, 109]], "what is read is whole"
    assert y.tolist() == [[101, 102, -1, -1, -1], [106, -1, 108, 109, -1]]
    x, y = gather(data.train, np.array([5]), 5)
    assert (x.tolist(), y.tolist()) == ([[105, 106, 107, 108, 109]], [[106, -1, 108, 109, -1]]), "they share nothing"
    assert gather(data.val, np.array([0]), 2)[1].tolist() == [[101, 102]] and data.val.mask is None
    assert Stream(data.train, 1).masks and not Stream(data.val, 1).masks
    assert not Stream(TokenFile(tmp_path / "d" / "train.bin"), 1).masks
    mapped = data.remapped(np.arange(200)[::-1].copy())
    assert gather(mapped.train, np.array([0]), 5)[1].tolist() == [[98, 97, -1, -1, -1]], "a map moves ids, not the mask"


@pytest.mark.parametrize("lengths", [(1000,), (1, 999), (333, 7, 8, 652), (64,) * 15 + (40,)])
def test_files_are_one_sequence_however_they_are_cut(tmp_path, lengths):
    counts = np.random.default_rng(0).random(1000) < 0.5
    whole = open_data(str(masked_folder(tmp_path / "whole", counts)), 16)
    cut = open_data(str(masked_folder(tmp_path / "cut", counts, lengths)), 16)
    assert len(cut.train) == 1000 and np.array_equal(cut.train.tokens, whole.train.tokens)
    assert cut.train.tokens[330:345].tolist() == list(range(430, 445))
    for sample in (0, 55, 700):
        for one, other in zip(
            *(Stream(d.train, 3).batch(Cursor(16, 16, sample), 7) for d in (whole, cut)), strict=True
        ):
            assert np.array_equal(one, other)
    assert np.array_equal(eval_windows(cut.train, 9, 16), eval_windows(whole.train, 9, 16))
    assert np.array_equal(cut.train.sampled(), whole.train.sampled())
    with pytest.raises(IndexError, match="there are 1000 tokens"):
        Joined([np.arange(400), np.arange(600)])[np.array([1000])]
    with pytest.raises(IndexError):
        Joined([np.arange(400), np.arange(600)])[np.array([-1])]


def test_a_fingerprint_covers_files_and_masks(tmp_path):
    n = 400_000  # more than is sampled of the first file
    counts = np.ones(n, bool)

    def made(name, counts=counts, lengths=(n - 50_000, 50_000), masks=("train",)):
        return open_data(str(masked_folder(tmp_path / name, counts, lengths, masks)), 16).train.fingerprint()

    first = made("a")
    assert made("b") == first
    other = counts.copy()
    other[-3] = False
    assert made("c", other) != first and made("d", masks=()) != first
    assert made("e", lengths=(50_000, n - 50_000)) != first
    (tmp_path / "a" / "train_001.bin").write_bytes(b"\0\0" + (tmp_path / "a" / "train_001.bin").read_bytes()[2:])
    assert open_data(str(tmp_path / "a"), 16).train.fingerprint() != first
    plain = open_data(str(masked_folder(tmp_path / "f", counts, masks=())), 16)
    assert plain.train.fingerprint() == plain.val.fingerprint(), "as it always was"


@pytest.mark.parametrize("break_it, message", [
    (lambda d: (d / "train.mask.bin").unlink(), r"train.mask.bin: cannot be read"),
    (lambda d: (d / "train.mask.bin").write_bytes(b"\xff"), r"k.bin: 1 bytes are no mask of 11 tokens .2 bytes"),
    (lambda d: (d / "train.mask.bin").write_bytes(b"\xff" * 3), r"3 bytes are no mask of 11 tokens"),
    (lambda d: (d / "train.mask.bin").write_bytes(b"\xff\x0f"), r"bits are set behind the last of 11 tokens"),
    (lambda d: (d / "val.mask.bin").write_bytes(b"\xff\x07"), r"val.mask.bin: a mask that meta.json does not name"),
    (lambda d: (d / "train.bin").unlink(), r"no train.bin and val.bin in"),
])  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused(tmp_path, break_it, message):
    folder = masked_folder(tmp_path / "d", [1] * 11)
    open_data(str(folder), 2)
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        open_data(str(folder), 2)


def test_the_highest_bits_of_a_mask_may_be_set(tmp_path):
    assert open_data(str(masked_folder(tmp_path / "d", [1] * 8)), 2).train.mask[:].all()
    assert open_data(str(masked_folder(tmp_path / "e", [1] * 9)), 2).train.mask[:].all()


@pytest.mark.parametrize("values, message", [
    ({"masks": "train"}, "masks must be a list of train or val"),
    ({"masks": ["test"]}, "masks must be a list"),
    ({"masks": [["train"]]}, "masks must be a list"),
    ({"files": ["train.bin"]}, "files must give under train and val"),
    ({"files": {"test": ["t.bin"]}}, "files must give"),
    ({"files": {"train": []}}, "files must give"),
    ({"files": {"train": "train.bin"}}, "files must give"),
    ({"files": {"train": ["a.bin", "a.bin"]}}, "none twice"),
    ({"files": {"train": ["../a.bin"]}}, "beside it"),
    ({"files": {"train": ["/a.bin"]}}, "beside it"),
    ({"files": {"train": ["..bin"]}}, "beside it"),
    ({"files": {"train": ["a.npy"]}}, "ending in .bin"),
    ({"files": {"train": ["a.mask.bin"]}}, "token files"),
    ({"files": {"train": ["val.bin"]}}, "named for train and for val"),
])  # fmt: skip
def test_what_a_meta_says_of_files_is_checked(tmp_path, values, message):
    (tmp_path / "meta.json").write_text(json.dumps({"format": 1, "tokenizer": "gpt2", **values}))
    with pytest.raises(ValueError, match=message):
        read_meta(tmp_path)


def test_a_meta_says_of_files_only_what_is_special():
    assert not {"files", "masks"} & set(Meta().to_json())
    files = {"train": ("a.bin", "b.bin"), "val": ("c.bin",)}
    meta = Meta(files=files, masks=("val",))
    assert Meta.from_json(json.loads(json.dumps(meta.to_json()))) == meta
    assert meta.of_tokens() == Meta()


def test_a_file_that_a_meta_names_and_that_is_missing(tmp_path):
    folder = masked_folder(tmp_path / "d", [1] * 30, (10, 20))
    (folder / "train_001.bin").unlink()
    with pytest.raises(ValueError, match=r"no train_001.bin .meta.json names it. in .*d; a data set has both"):
        open_data(str(folder), 2)


def train(data, out, **keys) -> tuple[int, list[dict]]:
    code = train_orchestrated.main(arguments(data, out, max_iters=4, eval_interval=2, **keys))
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return code, [json.loads(line) for line in lines]


def with_mask(folder, **shares):
    """The tests' text, of which only so large a share of the tokens counts."""
    write_data(folder)
    meta = json.loads((folder / "meta.json").read_text())
    for name, share in shares.items():
        n = (folder / f"{name}.bin").stat().st_size // 2
        (folder / f"{name}.mask.bin").write_bytes(packed(np.random.default_rng(1).random(n) < share))
    (folder / "meta.json").write_text(json.dumps(meta | {"masks": list(shares)}))
    return folder


def test_a_run_trains_and_resumes_on_a_masked_folder(tmp_path):
    plain, half = write_data(tmp_path / "plain"), with_mask(tmp_path / "half", train=0.5, val=0.5)
    whole = with_mask(tmp_path / "all", train=1.1, val=1.1)

    def losses(data, out):
        code, lines = train(data, tmp_path / out)
        assert code == 0
        return [line.get("loss", line.get("val_loss")) for line in lines]

    first, same, masked = losses(plain, "p"), losses(whole, "w"), losses(half, "h")
    assert first == pytest.approx(same, abs=1e-6) and all(a != b for a, b in zip(first, masked, strict=True))
    assert train(half, tmp_path / "h", init_from="resume")[0] == 0
    (half / "train.mask.bin").write_bytes(bytes([255 - (half / "train.mask.bin").read_bytes()[0]])
                                          + (half / "train.mask.bin").read_bytes()[1:])  # fmt: skip
    with pytest.raises(Refused, match="the content of train.bin is not what the checkpoint was trained on"):
        train(half, tmp_path / "h", init_from="resume")


def test_an_evaluation_of_which_nothing_counts_is_refused(tmp_path):
    with pytest.raises(Refused, match="its mask leaves out every target of an evaluation"):
        train(with_mask(tmp_path / "d", val=0.0), tmp_path / "run")


class Counting:
    """Tokens that tell who reads them, and can be slow."""

    def __init__(self, tokens, seconds=0.0):
        self.tokens, self.seconds, self.readers, self.dtype = tokens, seconds, [], tokens.dtype

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, where):
        self.readers.append(threading.current_thread().name)
        time.sleep(self.seconds)
        return self.tokens[where]


def batches(folder, seconds=0.0) -> tuple[Batches, Counting]:
    data = open_data(str(folder), 4)
    data.train.tokens = Counting(data.train.tokens, seconds)
    return Batches(Sources(d=data), 1337, torch.device("cpu"), state_of().settings), data.train.tokens


def test_a_batch_is_read_ahead_by_a_thread(tmp_path):
    folder = masked_folder(tmp_path / "d", np.arange(400) % 3 > 0)
    ours, seen = batches(folder, 0.2)
    wanted = Stream(open_data(str(folder), 4).train, 1337).batch(Cursor(4, 4, 8), 3)
    begin = time.perf_counter()
    ours.read_ahead(Cursor(4, 4, 8), 3, 600)
    assert time.perf_counter() - begin < 0.1, "nobody waits"
    batch = ours.read(Cursor(4, 4, 8), 3, 600)
    assert all(np.array_equal(a, b) for a, b in zip(batch[:2], wanted, strict=True)) and batch.targets < 12
    assert len(seen.readers) == 1 and seen.readers[0].startswith("read-ahead")
    ours.read(Cursor(4, 4, 8), 3, 600)
    assert seen.readers[1:] == ["MainThread"], "it is used once"


@pytest.mark.parametrize("other", [(Cursor(4, 4, 9), 3, 600), (Cursor(4, 4, 8), 2, 600), (Cursor(4, 4, 8), 3, 601)])
def test_what_was_read_ahead_for_something_else_is_not_used(tmp_path, other):
    folder = masked_folder(tmp_path / "d", np.ones(400))
    ours, _ = batches(folder)
    ours.read_ahead(Cursor(4, 4, 8), 3, 600)
    wanted = Stream(open_data(str(folder), 4).train, 1337).batch(*other)
    assert all(np.array_equal(a, b) for a, b in zip(ours.read(*other)[:2], wanted, strict=True))
    ours.read_ahead(Cursor(4, 4, 8), 3, 600)
    with pytest.raises(Refused, match="beyond the model's vocabulary of 101"):
        ours.read(Cursor(4, 4, 8), 3, 101)
    ours.read_ahead(Cursor(4, 4, 8), 3, 600)
    ours.stream = Stream(ours.data.first.train, 7)
    wanted = ours.stream.batch(Cursor(4, 4, 8), 3)
    assert np.array_equal(ours.read(Cursor(4, 4, 8), 3, 600).x, wanted[0]), "of another stream"


def test_a_fault_in_what_was_read_ahead_is_told_by_who_asks_for_it(tmp_path):
    ours, _ = batches(masked_folder(tmp_path / "d", np.ones(400)))
    ours.read_ahead(Cursor(4, 4, 8), 3, 101)
    ours.read(Cursor(4, 4, 0), 3)
    ours.read_ahead(Cursor(4, 4, 8), 3, 101)
    with pytest.raises(Refused, match="is beyond the model's vocabulary of 101"):
        ours.read(Cursor(4, 4, 8), 3, 101)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_batch_of_a_run_but_the_first_is_read_ahead(data, accumulation, monkeypatch):
    run = live_run(data, steps=0, gradient_accumulation_steps=accumulation)
    kind, readers = type(run.stream), []
    real = kind.batch

    def batch(self, *args):
        if self is run.stream:
            readers.append(threading.current_thread().name)
        return real(self, *args)

    monkeypatch.setattr(kind, "batch", batch)
    for _ in range(4):
        run.step()
    run.batches._ahead[1].result()
    names = [name.partition("_")[0] for name in readers]
    assert names == ["MainThread"] + ["read-ahead"] * (4 * accumulation)
