"""The token stream: a bijection, pure, gapless, and cheap on a file of any size."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from orchestrate.data.stream import (
    Cursor,
    Stream,
    TokenFile,
    eval_windows,
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


def test_remapping_files(tmp_path):
    np.save(tmp_path / "r.npy", np.array([0, 1, 1, 2]))
    assert read_remap(tmp_path / "r.npy", 4, 3).tolist() == [0, 1, 1, 2]
    (tmp_path / "r.json").write_text("[0, 5]")
    with pytest.raises(ValueError, match="allowed 0 to 2"):
        read_remap(tmp_path / "r.json", 2, 3)
    with pytest.raises(ValueError, match="2 entries for a vocabulary of 9"):
        read_remap(tmp_path / "r.json", 9, 6)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        read_remap(tmp_path / "o.npy", 1, 3)
