"""Sampling by the rarity of tokens, and a vocabulary that is shrunken and restored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import assert_same_tensors, events, lines, tensors, write_data

from orchestrate.data import shrink_vocabulary
from orchestrate.data.curriculum import GROUP, Curriculum
from orchestrate.data.shrink_vocabulary import counts_of, shrunken
from orchestrate.data.stream import Cursor, Stream, TokenFile, open_data, window_starts
from orchestrate.training.store.run_folder import METRICS


@pytest.fixture
def tokens(tmp_path) -> TokenFile:
    """130 windows of 8 and the rest of one: token 1 everywhere, but every tenth window is of token 2."""
    ids = np.ones(8 * 131 + 1, dtype=np.uint16)
    for window in range(0, 130, 10):
        ids[8 * window : 8 * window + 8] = 2
    ids.tofile(tmp_path / "t.bin")
    return TokenFile(tmp_path / "t.bin")


def test_a_little_of_it_is_the_order_without_it(tokens):
    place = Cursor(8, 8, 3)
    plain, near = Stream(tokens, 5).batch(place, 200), Curriculum(tokens, 5, 1e-9).batch(place, 200)
    assert np.array_equal(plain[0], near[0]) and np.array_equal(plain[1], near[1])


def test_windows_come_as_often_as_their_rarity_says(tokens):
    """Of 1049 tokens 104 are twos. At alpha 1 a window of twos weighs 1049 / (2 * 104), one of ones 1049 / (2 * 945);
    a group of 64 windows with k of twos then has 64 * w2 k / (w2 k + w1 (64 - k)) samples of them, rounded."""
    stream, n = Curriculum(tokens, 5, 1.0), 130
    counts = np.bincount(tokens.tokens)
    assert counts.tolist() == [0, 945, 104]
    heavy, light = 1049 / (2 * 104), 1049 / (2 * 945)
    x, _ = stream.batch(Cursor(8, 8), n)
    starts = window_starts(5, 0, n, len(tokens), 8)
    for first in range(0, n, GROUP):
        own = tokens.tokens[starts[first : first + GROUP]] == 2
        due = len(own) * heavy * own.sum() / (heavy * own.sum() + light * (~own).sum())
        got = (x[first : first + GROUP, 0] == 2).sum()
        assert abs(got - due) < 2 and (got > own.sum() + 5 or not own.any()), (got, due)
        drawn = {bytes(row) for row in x[first : first + GROUP]}
        assert len(drawn) == (1 if own.all() or not own.any() else 2)


def test_it_is_a_pure_function_of_the_sample(tokens):
    stream, place = Curriculum(tokens, 5, 0.6), Cursor(8, 4)
    whole = stream.batch(place, 600)[0]
    parts = [stream.batch(place.skip(first), 100)[0] for first in range(0, 600, 100)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(stream.batch(place.skip(431), 1)[0][0], whole[431])
    assert not np.array_equal(Curriculum(tokens, 6, 0.6).batch(place, 600)[0], whole)
    assert not np.array_equal(Curriculum(tokens, 5, 0.2).batch(place, 600)[0], whole)


def test_the_order_stays_what_it_is(tokens):
    """Checkpoints hold a place in it: samples of the seam between two groups, and of the second pass."""
    stream = Curriculum(tokens, 5, 0.6)
    assert (stream._starts(60, 9, 8) // 8).tolist() == [13, 18, 33, 101, 49, 55, 50, 50, 50]
    assert stream._starts(190, 4, 8).tolist() == [274, 850, 658, 730]


def test_it_ramps_and_is_resumed_to_the_bit(tiny, resume):
    schedule = [{"name": "set_curriculum_alpha", "value": 1.0, "at_iter": 2, "over": 6}]
    _, plain = tiny(out="plain")
    _, whole = tiny(schedule, out="whole")
    _, out = tiny(schedule, out="cut", max_iters=5)
    assert resume(out, max_iters=12) == 0
    assert_same_tensors(tensors(out), tensors(whole))
    losses = [[line["loss"] for line in lines(run / METRICS) if line["kind"] == "train"] for run in (plain, whole)]
    assert losses[0][:2] == losses[1][:2] and losses[0] != losses[1]


# ---------------------------------------------------------------------------------------------- vocabularies


def test_the_kept_are_the_most_frequent_in_their_old_order():
    counts = np.array([5, 0, 9, 7, 5, 1])
    assert shrunken(counts, 3).tolist() == [0, 3, 1, 2, 3, 3], "of the two with 5 the smaller id is kept"
    assert shrunken(counts, 3, rare=5).tolist() == [2, 2, 0, 1, 2, 2], "the rare one has a place, and stands for all"
    assert shrunken(counts, 3, rare=2).tolist() == [0, 1, 1, 2, 1, 1]
    for keep, rare, told in ((0, None, "--keep"), (6, None, "--keep must be from 1 to 5"), (3, 6, "--rare")):
        with pytest.raises(ValueError, match=told):
            shrunken(counts, keep, rare)


def test_tokens_are_counted_piece_by_piece(tmp_path, monkeypatch, capsys):
    folders = [write_data(tmp_path / name) for name in ("one", "two")]
    files = [TokenFile(folder / "train.bin") for folder in folders]
    size = open_data(str(folders[0]), 4).meta.vocab_size
    whole = np.bincount(files[0].tokens, minlength=size)
    for piece in (7, 100, len(files[0]) - 1, len(files[0]), 2**24):
        monkeypatch.setattr(shrink_vocabulary, "_PIECE", piece)
        assert np.array_equal(counts_of(files[0], size), whole)
    with pytest.raises(ValueError, match=f"train.bin: token id {size - 1} is beyond the vocabulary of {size - 1}"):
        counts_of(files[0], size - 1)
    (folders[1] / "train.bin").write_bytes(np.full(10_000, 3, np.uint16).tobytes())
    path = tmp_path / "map.npy"
    shrink_vocabulary.main([*map(str, folders), "--keep", "1", "--out", str(path)])
    new_ids = np.ones(size)
    new_ids[3] = 0
    assert np.array_equal(np.load(path), new_ids), "of both together the most frequent is 3"
    share = 100 * (whole.sum() - whole[3]) / (whole.sum() + 10_000)
    told = capsys.readouterr().out
    assert f"2 of {size} ids; {share:.2f} % of the training tokens share the rare one" in told and "rare:" not in told
    shrink_vocabulary.main([*map(str, folders), "--keep", "1", "--rare", "4", "--out", str(path)])
    assert not np.load(path).any() and "value: {rare: 4}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--out must end in .npy"):
        shrink_vocabulary.main([str(folders[0]), "--keep", "5", "--out", str(tmp_path / "map.json")])


def test_from_the_script_to_undone(tiny, resume, tmp_path, capsys):
    """A run on the kept tokens, and in the middle of it each of them at its own id again, with its own row."""
    data, path = write_data(tmp_path / "data"), tmp_path / "map.npy"
    shrink_vocabulary.main([str(data), "--keep", "12", "--out", str(path)])
    told = capsys.readouterr().out
    assert f"--shrunken_vocab_size=13 --vocab_remapping_file={path}" in told and "13 of 23 ids" in told
    schedule = [
        {"name": "save_checkpoint", "at_iter": 6},
        {"name": "disable_vocab_remapping", "value": {"noise": 0.1}},
        {"name": "save_checkpoint"},
    ]
    keys = dict(dataset=data, shrunken_vocab_size=13, vocab_remapping_file=path, keep_last=9)
    _, before = tiny([schedule[0]], out="before", **{**keys, "max_iters": 6})
    code, out = tiny(schedule, out="whole", **keys)
    assert code == 0
    new_ids, wte = np.load(path), "transformer.wte.weight"
    old = tensors(before)[wte]
    _, cut = tiny(schedule, out="cut", **{**keys, "max_iters": 6})
    restored = tensors(cut)
    assert old.shape == (13, 16) and restored[wte].shape == (23, 16)
    kept = [i for i in range(23) if new_ids[i] < 12]
    assert len(kept) == 12 and torch.equal(restored[wte][kept], old[new_ids[kept]]), (
        "no token that stayed was relabelled"
    )
    dropped = [i for i in range(23) if i not in kept]
    assert torch.equal(restored[wte][dropped[0]], old[12]) and not torch.equal(restored[wte][dropped[1]], old[12])
    assert (restored[wte][dropped] - old[12]).abs().max() < 5 * 0.1 * old.std()
    for slot in ("exp_avg", "exp_avg_sq"):
        theirs, ours = (tensors(run)[f"{wte}|{slot}"] for run in (before, cut))
        assert torch.equal(ours[kept], theirs[new_ids[kept]])
    assert resume(cut, max_iters=12) == 0
    assert_same_tensors(tensors(cut), tensors(out))
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["settings"]["vocabulary_map"] == [] and state["settings"]["model"]["vocab_size"] == 23
    (undone,) = [e for e in events(out, "operation") if e["name"] == "disable_vocab_remapping"]
    assert undone["iter"] == 6


def test_the_rare_token_keeps_its_row(tiny, tmp_path):
    data = write_data(tmp_path / "data")
    np.save(tmp_path / "map.npy", new_ids := np.array([4, 0, 4, 1, 4, 2, 3, *[4] * 16]))
    schedule = [{"name": "disable_vocab_remapping", "value": {"noise": 0.5, "rare": 4}, "at_iter": 1}]
    keys = dict(dataset=data, shrunken_vocab_size=5, vocab_remapping_file=tmp_path / "map.npy", max_iters=1)
    (_, before), (_, after) = tiny(out="a", **keys), tiny(schedule, out="b", **keys)
    old, new = (tensors(run)["transformer.wte.weight"] for run in (before, after))
    stays = [1, 3, 4, 5, 6]
    assert torch.equal(new[stays], old[new_ids[stays]]) and not torch.equal(new[0], old[4])
