"""Sums and products as data sets: their lines, their masks, what is held back, and windows that begin with a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from orchestrate.data.arithmetic import ADDER, MULTIPLIER, Problems, Split, all_pairs, prepare
from orchestrate.data.stream import Cursor, Meta, Stream, TokenFile, eval_windows, gather, open_data, window_starts


def texts(kind, problems, width, reverse):
    """Lines as texts, and the characters that the loss counts."""
    lines, counts = kind.lines(Problems(*np.array(problems).T), width, reverse)
    whole = ["".join(map(chr, line)) for line in lines]
    return whole, ["".join(c for c, counted in zip(line, one, strict=True) if counted)
                   for line, one in zip(whole, counts, strict=True)]  # fmt: skip


def test_lines_by_hand():
    lines, counted = texts(ADDER, [(12, 345), (999, 999), (0, 7)], 3, reverse=True)
    assert lines == ["012+345=7530\n", "999+999=8991\n", "000+007=7000\n"]
    assert counted == ["7530\n", "8991\n", "7000\n"]
    assert texts(ADDER, [(12, 345)], 3, reverse=False)[0] == ["012+345=0357\n"]
    assert texts(MULTIPLIER, [(12, 34), (99, 99)], 2, reverse=True)[0] == ["12*34=8040\n", "99*99=1089\n"]
    assert texts(MULTIPLIER, [(7, 9)], 2, reverse=False) == (["07*09=0063\n"], ["0063\n"])
    nines = 10**9 - 1
    assert texts(MULTIPLIER, [(nines, nines)], 9, False)[0] == [f"{nines}*{nines}={nines * nines}\n"]


@pytest.fixture(scope="module")
def adder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic") / "adder"
    prepare(ADDER, folder, digits=2, limit=4000, test=60, val=0.2, seed=5)
    return folder


def problems(folder, split: str, sign: str = "+") -> list[tuple[int, int]]:
    """What a set asks; every line of it is right, and the mask counts its result."""
    data = open_data(str(folder), 4)
    file = getattr(data, split)
    text = "".join(data.meta.itos[i] for i in file.tokens[:])
    mask, found, place = file.mask[:], [], 0
    for line in text.splitlines(keepends=True):
        a, b, result = re.fullmatch(rf"(\d+)\{sign}(\d+)=(\d+)\n", line).groups()
        assert len(a) == len(b) and len(line) == data.meta.row
        assert int(result[::-1]) == (int(a) + int(b) if sign == "+" else int(a) * int(b)), line
        start = line.index("=") + 1
        assert mask[place : place + len(line)].tolist() == [i >= start for i in range(len(line))]
        found.append((int(a), int(b)))
        place += len(line)
    return found


def length(pair) -> int:
    return len(str(max(pair)))


def test_no_pair_is_on_both_sides_in_whatever_order_and_set(adder):
    sets = [adder, *(adder / str(n) for n in (1, 2, 3))]
    train = {tuple(sorted(pair)) for one in sets for pair in problems(one, "train")}
    held = {tuple(sorted(pair)) for one in sets for pair in problems(one, "val")}
    assert not train & held and len(train) > 3000 and len(held) > 100
    assert {tuple(sorted(pair)) for pair in problems(adder, "val")} == {
        tuple(sorted(pair)) for n in (1, 2) for pair in problems(adder / str(n), "val")
    }
    for n in (1, 2, 3):
        assert {length(pair) for split in ("train", "val") for pair in problems(adder / str(n), split)} == {n}
    one, two = (sum(length(pair) == n for pair in problems(adder, "train")) for n in (1, 2))
    assert two == 2667 and one == 1334, "each length twice as often as the one before"
    orders = {a < b for a, b in problems(adder / "2", "val") if a != b}
    assert orders == {True, False}


def test_the_share_that_is_held_back():
    split = Split(3, 0.1)
    pairs = all_pairs(3)
    assert len(pairs.a) == 500500 - 5050 and len(all_pairs(1).a) == 55 and len(all_pairs(2).a) == 5050 - 55
    held = split.held_back(pairs)
    assert abs(held.mean() - 0.1) < 0.003
    assert (held == split.held_back(Problems(pairs.b, pairs.a))).all()
    assert (held != Split(4, 0.1).held_back(pairs)).any()
    for seed in range(20):  # a share so small that chance would give no pair of single digits
        assert Split(seed, 1e-6).held_back(all_pairs(1)).sum() == 1


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(adder, tmp_path):
    def content(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for name, seed in (("again", 5), ("other", 6)):
        prepare(ADDER, tmp_path / name, digits=2, limit=4000, test=60, val=0.2, seed=seed)
    assert content(tmp_path / "again") == content(adder) and len(content(adder)) == 20
    assert content(tmp_path / "other")["3/train.bin"] != content(adder)["3/train.bin"]


def test_the_script(tmp_path):
    """And products, with the first digit first; longer ones are sets of their own."""
    script = [sys.executable, str(ROOT / "data/multiplier/prepare.py"), "--out", str(tmp_path / "m")]
    some = ["--digits", "2", "--longer", "2", "--limit", "1000", "--test", "5", "--plain"]
    done = subprocess.run([*script, *some], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "m/meta.json").read_text())
    assert meta["arithmetic"]["reverse"] is False and meta["row"] == 11 and meta["masks"] == ["train", "val"]
    data = open_data(str(tmp_path / "m/4"), 8)
    line = "".join(data.meta.itos[i] for i in data.val.tokens[:19])
    a, b, result = re.fullmatch(r"(\d{4})\*(\d{4})=(\d{8})\n", line).groups()
    assert int(a) * int(b) == int(result)
    done = subprocess.run([*script, "--digits", "0", "--limit", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--digits must be from 1 to 9, got 0" in done.stderr and "--limit must be from 1000" in done.stderr
    done = subprocess.run([*script, "--digits", "9"], capture_output=True, text=True, check=False)
    assert "--longer must be from 0 to 0, got 1" in done.stderr


# ---------------------------------------------------------------------------------------------- windows of whole lines


def test_windows_begin_with_a_line_in_every_pass(adder):
    """And what the loss counts of them are results."""
    data = open_data(str(adder), 20)
    row = data.meta.row
    assert row == 10 and len(data.train) % row == 0
    stream = Stream(data.train, 7)
    per_pass = (len(data.train) - 20) // 20
    x, y = stream.batch(Cursor(20, 20, per_pass - 3), 2 * per_pass)
    assert (x[:, 2] == data.meta.itos.index("+")).all() and (x[:, 15] == data.meta.itos.index("=")).all()
    counted = y != -1
    assert (counted == np.tile([False] * 5 + [True] * 4 + [False], 2)).all()
    starts = [window_starts(7, number * per_pass, per_pass, len(data.train), 20, row) for number in range(4)]
    assert {int(some.min()) for some in starts} == {0, 10}, "a pass is cut at either of the two lines"
    evaluated, _ = gather(data.val, eval_windows(data.val, 5, 20), 20)
    assert (evaluated[:, 2] == data.meta.itos.index("+")).all()


@pytest.mark.parametrize(
    "n_tokens, block_size, row", [(61, 20, 10), (60, 20, 10), (59, 20, 5), (21, 20, 20), (200, 18, 10)]
)
def test_windows_fit_and_overlap_nowhere(n_tokens, block_size, row):
    n = max(1, (n_tokens - block_size) // block_size)
    for number in range(6):
        starts = np.sort(window_starts(1, number * n, n, n_tokens, block_size, row))
        assert starts[0] >= 0 and starts[-1] + block_size + 1 <= n_tokens
        assert (np.diff(starts) == block_size).all()
        if block_size % row == 0:
            assert not (starts % row).any()
    if block_size % row:  # as if there were no lines
        assert (starts == np.sort(window_starts(1, 5 * n, n, n_tokens, block_size))).all()


def test_row_in_the_meta():
    meta = Meta(14, row=13)
    assert Meta.from_json(meta.to_json()) == meta and "row" not in Meta(14).to_json() and meta.of_tokens().row == 1
    for row in (0, -1, 2**32 + 1, "13", 1.0, True):
        with pytest.raises(ValueError, match="row must be a whole number from 1 to 4294967296"):
            Meta.from_json({"format": 1, "tokenizer": "gpt2", "row": row})


def test_lines_are_read_through_a_map(adder):
    data = open_data(str(adder), 20)
    mapped = data.remapped(np.arange(14)[::-1].copy())
    assert isinstance(mapped.train, TokenFile) and mapped.train.row == 10
