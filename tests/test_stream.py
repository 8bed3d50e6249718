"""The token stream: a bijection, pure, gapless, and cheap on a file of any size."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_data

from orchestrate.data.stream import (
    Cursor,
    Meta,
    Stream,
    TokenFile,
    eval_windows,
    find_folder,
    gather,
    open_data,
    permute,
    read_meta,
    read_remap,
    window_starts,
    windows_per_pass,
)


def token_file(folder, count: int, **keys) -> TokenFile:
    path = folder / "t.bin"
    (np.arange(count) % 60000).astype(np.uint16).tofile(path)
    return TokenFile(path, **keys)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4096, 4097])
def test_permutation_is_a_bijection(n):
    orders = [permute(np.arange(n), n, seed, number).tolist() for seed, number in [(1, 0), (1, 1), (2, 0)]]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 16:
        assert len({tuple(order) for order in orders}) == 3 and orders[0] != list(range(n))


def test_the_order_looks_random():
    order = permute(np.arange(10000), 10000, 3, 0)
    assert abs(np.corrcoef(np.arange(10000), order)[0, 1]) < 0.03
    assert 0.45 < np.mean(np.diff(order) > 0) < 0.55
    assert np.histogram(order[:1000], 10, (0, 10000))[0].min() > 60


@pytest.mark.parametrize(
    "n_tokens, block_size", [(17, 16), (18, 16), (32, 16), (33, 16), (48, 16), (49, 16), (1000, 16), (65, 1)]
)
def test_every_window_once_per_pass_and_within_the_file(n_tokens, block_size):
    n = windows_per_pass(n_tokens, block_size)
    for number in range(5):
        starts = window_starts(9, number * n, n, n_tokens, block_size)
        assert len(set(starts.tolist())) == n
        assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
        phases = set((starts % block_size).tolist())
        assert len(phases) == 1 and (number > 0 or phases == {0})
    assert n >= (n_tokens - 2 * block_size) // block_size


def test_any_split_and_any_order_give_the_same_stream():
    whole = window_starts(4, 0, 200, 700, 16)
    for sizes in ([50] * 4, [1] * 200, [7, 93, 60, 40]):
        firsts = np.cumsum([0, *sizes[:-1]])
        parts = [window_starts(4, int(first), size, 700, 16) for first, size in zip(firsts, sizes, strict=True)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert window_starts(4, 137, 1, 700, 16)[0] == whole[137]
    assert not np.array_equal(window_starts(5, 0, 200, 700, 16), whole)


def test_batches_are_the_tokens_and_what_follows(tmp_path):
    stream = Stream(token_file(tmp_path, 1000), seed=1)
    x, y = stream.batch(Cursor(16, 16, 55), 8)
    assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == np.int64
    assert np.array_equal(x[:, 1:], y[:, :-1]) and np.array_equal(y, x + 1)
    places = [Cursor(16, 16, sample) for sample in (61, 30, 99)]
    assert stream.passes(places[0]) == 1.0 and stream.passes(places[1]) == 30 / 61
    assert [stream.coverage(place) for place in places] == [1.0, 30 / 61, 1.0]


MASK = 2**64 - 1


def mix(x: int) -> int:
    """The finaliser of SplitMix64 on one Python integer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def keys_of(seed: int, number: int) -> list[int]:
    start = mix(mix((seed + 0x632BE59BD9B4E019) & MASK) ^ number)
    return [mix((start + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, 6)]


def image(index: int, n: int, seed: int, number: int) -> int:
    """Where a Feistel network of four rounds with cycle walking sends one index."""
    if n == 1:
        return 0
    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = index >> half, index % 2**half
        for key in keys_of(seed, number)[:4]:
            left, right = right, left ^ mix((right + key) & MASK) % 2**half
        index = left << half | right
        if index < n:
            return index


def start_of(seed: int, sample: int, n_tokens: int, block_size: int) -> int:
    """The first token of one sample: the window's place in its pass, behind a phase that only the first has not."""
    n = max(1, (n_tokens - block_size) // block_size)
    number, place = divmod(sample, n)
    phase = keys_of(seed, number)[4] % min(block_size, n_tokens - n * block_size) if number else 0
    return phase + block_size * image(place, n, seed, number)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 61, 64, 65, 300])
def test_the_permutation_is_that_of_one_integer_at_a_time(n):
    """The order of the data is part of a seed's meaning: a resumed run of an older version goes on in it."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "SplitMix64's first output for seed 0"
    for seed, number in [(0, 0), (1337, 3), (-1, 2), (2**70 + 5, 0)]:
        assert permute(np.arange(n), n, seed, number).tolist() == [image(i, n, seed & MASK, number) for i in range(n)]


@pytest.mark.parametrize("n_tokens, block_size", [(17, 16), (31, 16), (33, 16), (700, 16), (701, 7), (65, 1)])
def test_windows_start_where_one_sample_at_a_time_does(n_tokens, block_size):
    expected = [start_of(4, sample, n_tokens, block_size) for sample in range(150)]
    assert window_starts(4, 0, 150, n_tokens, block_size).tolist() == expected
    assert window_starts(4, 67, 29, n_tokens, block_size).tolist() == expected[67:96]


def test_every_pass_has_an_order_of_its_own():
    """42 windows; not the order of pass 1 behind another phase."""
    passes = [window_starts(4, 42 * p, 42, 700, 16) // 16 for p in range(4)]
    assert len({tuple(order.tolist()) for order in passes}) == 4
    for one, other in zip(passes, passes[1:], strict=False):
        assert np.mean(one == other) < 0.2


@pytest.mark.parametrize(
    "samples, before, after, expected",
    [
        # (block_size, length): a window that is begun counts as seen.
        (5, (16, 4), (16, 16), 2),
        (8, (16, 4), (16, 16), 2),
        (9, (16, 4), (16, 8), 6),
        (0, (16, 4), (16, 16), 0),
        (3, (16, 16), (16, 4), 12),
        # Another block_size: the same share of the data, rounded up.
        (3, (16, 16), (32, 32), 2),
        (3, (16, 16), (24, 24), 2),
        (3, (32, 32), (16, 16), 6),
        (7, (16, 8), (32, 16), 4),
        (9, (16, 4), (24, 8), 6),
    ],
)
def test_the_next_sample_after_a_change_of_length(samples, before, after, expected):
    assert Cursor(*before, samples).cut(*after) == Cursor(*after, expected)


@pytest.mark.parametrize("before, after", [(16, 4), (4, 16), (8, 2), (2, 8), (4, 8)])
def test_nothing_seen_comes_again_and_less_than_a_window_is_left_out(tmp_path, before, after):
    """Whatever the number of samples; the file is a pass of 61 windows whose tokens are their own places."""
    stream = Stream(token_file(tmp_path, 1000), seed=1)
    for samples in (1, 2, 3, 7, 8, 13, 22):
        start = Cursor(16, before)
        seen = set(stream.batch(start, samples)[0].flatten().tolist())
        cursor = start.skip(samples).cut(16, after)
        come = set(stream.batch(cursor, 61 * (16 // after) - cursor.sample)[0].flatten().tolist())
        assert not seen & come
        assert len(seen) + len(come) > 60 * 16


@pytest.mark.parametrize("first, count", [(0, 5), (3, 1), (5, 9), (7, 2)])
def test_pieces_are_cut_from_their_windows_in_turn(tmp_path, first, count):
    stream = Stream(token_file(tmp_path, 1000), seed=1)
    x, y = stream.batch(Cursor(16, 4, first), count)
    starts = window_starts(1, 0, 10, 1000, 16)
    expected = [[int(starts[s // 4]) + 4 * (s % 4) + i for i in range(4)] for s in range(first, first + count)]
    assert x.tolist() == expected and np.array_equal(y, x + 1)
    assert stream.passes(Cursor(16, 4, 61 * 4)) == 1.0 and stream.coverage(Cursor(16, 4, 61)) == 0.25


def test_evaluation_windows_are_fixed_and_extend(tmp_path):
    tokens = token_file(tmp_path, 1000)
    few, many, all_ = (eval_windows(tokens, count, 16) for count in (10, 30, 10**6))
    assert np.array_equal(few, many[:10]) and sorted(all_.tolist()) == list(range(0, 62 * 16, 16))
    assert len(eval_windows(token_file(tmp_path, 17), 5, 16)) == 1


def test_a_file_larger_than_memory_costs_nothing(tmp_path):
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        file.truncate(200 * 2**30)  # sparse
    x, _ = Stream(TokenFile(path), 1).batch(Cursor(1024, 1024, 10**12), 12)
    assert x.shape == (12, 1024)
    assert TokenFile(path).fingerprint()


def test_remapped_tokens(tmp_path):
    remap = np.arange(60000) % 7
    x, _ = gather(token_file(tmp_path, 100, remap=remap), np.array([3]), 10)
    assert x[0].tolist() == [t % 7 for t in range(3, 13)]


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        TokenFile(tmp_path / "none.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes are not a whole number"):
        TokenFile(tmp_path / "odd.bin")
    with pytest.raises(ValueError, match="16 tokens are too few for block_size 16"):
        token_file(tmp_path, 16).require(16)
    with pytest.raises(ValueError, match="python data/openwebtext/prepare.py"):
        open_data("openwebtext", 16)
    one, two = token_file(tmp_path, 1000).fingerprint(), token_file(tmp_path, 999).fingerprint()
    assert one != two


def test_nanogpt_meta_is_read_without_running_it(tmp_path):
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert read_meta(tmp_path).itos == ("a", "b", "c")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": Evil()}))
    with pytest.raises(ValueError, match="not a plain nanoGPT meta.pkl"):
        read_meta(tmp_path)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "meta.json").write_text(json.dumps({"format": 1, "tokenizer": "char", "vocab_size": -1}))
    with pytest.raises(ValueError, match="vocab_size"):
        read_meta(tmp_path)


def write_meta(folder, **values) -> None:
    (folder / "meta.json").write_text(json.dumps({"format": 1, "tokenizer": "gpt2", **values}))


def test_a_meta_goes_through_json(tmp_path):
    meta = Meta(3, "uint8", "char", ("a", "b", "\n"))
    assert Meta.from_json(json.loads(json.dumps(meta.to_json()))) == meta
    assert read_meta(tmp_path) == Meta() and Meta().dtype == "uint16", "without one it is GPT-2's, as in nanoGPT"
    write_meta(tmp_path, vocab_size=1, dtype="uint32")
    (tmp_path / "meta.pkl").write_bytes(b"not looked at")
    assert read_meta(tmp_path) == Meta(1, "uint32", "gpt2")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"format": 2}, "not a meta of format 1"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 16777216, got 0"),
        ({"vocab_size": "65"}, "got '65'"),
        ({"vocab_size": True}, "got True"),
        ({"dtype": "int64"}, "dtype must be uint8, uint16 or uint32, got 'int64'"),
        ({"tokenizer": "words"}, "got 'words'"),
        ({"itos": "abc"}, "itos must be a list of texts"),
        ({"itos": ["a", 1]}, "itos must be a list of texts"),
    ],
)
def test_what_is_no_meta_is_refused(tmp_path, values, message):
    write_meta(tmp_path, **values)
    with pytest.raises(ValueError, match=f"meta.json: .*{message}"):
        read_meta(tmp_path)


def test_files_that_are_too_long_are_not_read(tmp_path):
    """To the byte: 4 MiB of meta.json, 2 of meta.pkl, 8 of a map, and 2 ** 24 words."""
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 16_777_216}).ljust(2 * 2**20))
    assert read_meta(tmp_path) == Meta(16_777_216)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}).ljust(2 * 2**20 + 1))
    with pytest.raises(ValueError, match="meta.pkl.*longer than 2,097,152 bytes"):
        read_meta(tmp_path)
    text = json.dumps({"format": 1, "tokenizer": "gpt2", "vocab_size": 16_777_216})
    (tmp_path / "meta.json").write_text(text.ljust(4 * 2**20))
    assert read_meta(tmp_path) == Meta(16_777_216)
    for wrong, message in [
        (text.ljust(4 * 2**20 + 1), "longer than 4,194,304 bytes"),
        (text.replace("16777216", "16777217"), "from 1 to 16777216, got 16777217"),
        (text[:-1], "meta.json: not JSON"),
        ("[" * 100_000, "meta.json: not JSON"),
    ]:
        (tmp_path / "meta.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_meta(tmp_path)
    (tmp_path / "r.json").write_text("[0]".ljust(8 * 2**20))
    assert read_remap(tmp_path / "r.json", None, 1).tolist() == [0]
    (tmp_path / "r.json").write_text("[0]".ljust(8 * 2**20 + 1))
    with pytest.raises(ValueError, match="longer than 8,388,608 bytes"):
        read_remap(tmp_path / "r.json", None, 1)
    np.save(tmp_path / "r.npy", np.zeros(2**24, np.uint8))
    assert len(read_remap(tmp_path / "r.npy", None, 1)) == 2**24
    np.save(tmp_path / "r.npy", np.zeros(2**24 + 1, np.uint8))
    with pytest.raises(ValueError, match="at most 16777216 entries, got 16777217"):
        read_remap(tmp_path / "r.npy", None, 1)


@pytest.mark.parametrize("values", [{"vocab_size": 0}, {"vocab_size": "3"}, {}, [3]])
def test_a_meta_of_nanogpt_needs_a_size(tmp_path, values):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(values))
    with pytest.raises(ValueError, match="needs a vocab_size"):
        read_meta(tmp_path)


def test_a_meta_of_nanogpt_with_and_without_characters(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1}))
    assert read_meta(tmp_path) == Meta(1)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "a", 2: "c"}}))
    assert read_meta(tmp_path) == Meta(3, tokenizer="char", itos=("a", "\ufffd", "c"))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Stream))
    with pytest.raises(ValueError, match="it names orchestrate.data.stream.Stream"):
        read_meta(tmp_path)


@pytest.mark.parametrize("missing", ["train.bin", "val.bin"])
def test_a_data_set_has_both_files(tmp_path, missing):
    for name in {"train.bin", "val.bin"} - {missing}:
        np.arange(40, dtype=np.uint16).tofile(tmp_path / name)
    with pytest.raises(ValueError, match="no train.bin and val.bin in .*; a data set has both"):
        open_data(str(tmp_path), 16)
    np.arange(20, dtype=np.uint16).tofile(tmp_path / missing)
    data = open_data(str(tmp_path), 19)
    assert {len(data.train), len(data.val)} == {40, 20} and data.name == str(tmp_path)
    with pytest.raises(ValueError, match=f"{missing}: 20 tokens are too few for block_size 20 .at least 21."):
        open_data(str(tmp_path), 20)


def test_a_data_set_is_read_through_one_map_after_the_other(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(40, dtype=np.uint16).tofile(tmp_path / name)
    data = open_data(str(tmp_path), 16, np.arange(40) // 2)
    assert data.remapped(None) is data
    twice = data.remapped(np.arange(20) % 5)
    for file in (twice.train, twice.val):
        assert gather(file, np.array([7]), 8)[0][0].tolist() == [t // 2 % 5 for t in range(7, 15)]
    once = open_data(str(tmp_path), 16).remapped(np.arange(40) % 3)
    assert gather(once.val, np.array([7]), 8)[1][0].tolist() == [t % 3 for t in range(8, 16)]


@pytest.mark.parametrize("tokens, dtype", [(5, "uint16"), (200_000, "uint8"), (10_000_000, "uint16")])
def test_a_fingerprint_samples_a_file_evenly(tmp_path, tokens, dtype):
    """64 pieces of 64 KiB from the first token to the last; in a file smaller than that every token counts."""
    values = (np.arange(tokens) % 251).astype(dtype)
    values.tofile(tmp_path / "t.bin")
    file = TokenFile(tmp_path / "t.bin", dtype)
    expected = hashlib.sha256(f"{tokens} {dtype}".encode())
    piece = 65536 // values.itemsize
    places = sorted({max(0, tokens - piece) * i // 63 for i in range(64)})
    for start in places:
        expected.update(values[start : start + piece].tobytes())
    assert file.fingerprint() == expected.hexdigest()
    mapped = TokenFile(tmp_path / "t.bin", dtype, np.arange(300) % 7)
    expected.update((np.arange(300) % 7).tobytes())
    assert mapped.fingerprint() == expected.hexdigest()


@pytest.mark.parametrize("tokens, windows", [(17, 1), (32, 1), (33, 2), (48, 2), (49, 3)])
def test_an_evaluation_has_every_window_that_has_a_token_after_it(tmp_path, tokens, windows):
    starts = eval_windows(token_file(tmp_path, tokens), 10, 16)
    assert sorted(starts.tolist()) == [16 * n for n in range(windows)]


def test_the_windows_of_an_evaluation_stay_what_they_are(tmp_path):
    """A loss trigger of an older run is compared with losses over the same windows."""
    assert eval_windows(token_file(tmp_path, 1000), 9, 16).tolist() == [
        16 * image(i, 62, 0x5EED0FE7A1, 0) for i in range(9)
    ]


def test_remapping_files(tmp_path):
    np.save(tmp_path / "r.npy", np.array([0, 1, 1, 2]))
    assert read_remap(tmp_path / "r.npy", 4, 3).tolist() == [0, 1, 1, 2]
    (tmp_path / "r.json").write_text("[0, 5]")
    with pytest.raises(ValueError, match="allowed 0 to 2"):
        read_remap(tmp_path / "r.json", 2, 3)
    with pytest.raises(ValueError, match="2 entries for a vocabulary of 9"):
        read_remap(tmp_path / "r.json", 9, 6)
    for bad, message in [
        ([0, -1], "from -1 to 0"),
        ([3], "from 3 to 3, allowed 0 to 2"),
        ([[0]], "one list"),
        ([], "one list"),
        ([0.5], "one list"),
    ]:
        (tmp_path / "r.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            read_remap(tmp_path / "r.json", None, 3)
    (tmp_path / "r.json").write_text("[2, 0]")
    assert read_remap(tmp_path / "r.json", None, 3).tolist() == [2, 0] == read_remap(tmp_path / "r.json", 1, 3).tolist()
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        read_remap(tmp_path / "o.npy", 1, 3)


def test_a_data_set_is_found_where_one_works(tmp_path, monkeypatch):
    """Beside an installed command there is no data/: the project's own comes first, then a path, then ./data/NAME."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data" / "mine")
    assert find_folder("mine") == Path("data/mine") and open_data("mine", 16).meta.tokenizer == "char"
    write_data(tmp_path / "mine")
    assert find_folder("mine") == Path("mine"), "a path means what it meant"
    (tmp_path / "data" / "shakespeare_char").mkdir()
    assert find_folder("shakespeare_char") == ROOT / "data" / "shakespeare_char"
    with pytest.raises(ValueError) as missing:
        open_data("nowhere", 16)
    for place in (str(ROOT / "data" / "nowhere"), " nowhere or data/nowhere; a data set has both"):
        assert place in str(missing.value)
