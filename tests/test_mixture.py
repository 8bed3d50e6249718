"""Mixtures: exact shares, a place for each source, the same bits on any split; what is refused; what is measured."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, assert_same_tensors, events, lines, on_ranks, tensors, write_data

import train_orchestrated
from orchestrate.data import stream
from orchestrate.data.conversations import chat
from orchestrate.data.mixture import Sources, extends
from orchestrate.data.prepare import Reading, prepare
from orchestrate.data.proportions import UNITS, in_units, turns
from orchestrate.data.stream import Cursor, Meta, Source, open_data, windows_per_pass
from orchestrate.data.tokenizer import CharTokenizer, _fingerprint
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store.run_folder import METRICS


def drawn(weights: list[float], count: int) -> np.ndarray:
    """How often each source has been drawn after each sample, (count, sources)."""
    units = in_units(weights)
    return np.cumsum(np.eye(len(weights), dtype=int)[turns(units, (0,) * len(weights), count)], axis=0)


def test_weights_become_whole_numbers_by_largest_remainders():
    assert in_units([1, 1]) == (UNITS // 2, UNITS // 2) and in_units([0.0, 5.0]) == (0, UNITS)
    third = UNITS // 3  # UNITS = 3 * third + 1
    assert in_units([1, 1, 1]) == (third + 1, third, third)
    assert in_units([1, 2]) == (third, 2 * third + 1), "0.33 and 0.67 are left over: the larger is rounded up"
    for bad in ([0.0, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="at least 0"):
            in_units(bad)


def test_turns_by_hand():
    assert turns(in_units([3, 1]), (0, 0), 8).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert turns(in_units([1, 1]), (0, 0), 4).tolist() == [0, 1, 0, 1]
    assert turns(in_units([1, 1]), (-UNITS // 4, UNITS // 4), 4).tolist() == [1, 0, 1, 0], "who is behind comes first"
    assert turns(in_units([0, 1, 0]), (0, 0, 0), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("k", [2, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(8))
def test_shares_are_exact_over_any_window(seed, k):
    """Tijdeman's bound from the start on; between any two samples within one for two sources, within two for more."""
    some, count = random.Random(f"{seed} {k}"), 400
    weights = [some.random() ** some.choice([1, 4, 9]) for _ in range(k)]
    total = sum(map(Fraction, weights))
    shares = np.array([float(Fraction(weight) / total) for weight in weights])
    ahead = np.concatenate([np.zeros((1, k)), drawn(weights, count) - np.arange(1, count + 1)[:, None] * shares])
    assert np.abs(ahead).max() <= 1 - 1 / (2 * k - 2) + 1e-6
    spread = (ahead[:, None] - ahead[None]).reshape(-1, k)
    assert np.abs(spread).max() <= (1 if k == 2 else 2 - 1 / (k - 1)) + 1e-5


def test_of_three_sources_a_stretch_may_be_more_than_one_off_and_of_two_never():
    """By hand: three samples with the second twice, where 0.9 is due; 0.7 of any three is 2.1, and 2 or 3 are drawn."""
    three = turns(in_units([0.5, 0.3, 0.2]), (0, 0, 0), 400)
    assert three[8:13].tolist() == [0, 1, 0, 1, 0]
    ahead = drawn([0.5, 0.3, 0.2], 400) - np.arange(1, 401)[:, None] * [0.5, 0.3, 0.2]
    assert np.abs(ahead[:, None] - ahead[None]).max() == pytest.approx(1.1)
    two = turns(in_units([0.7, 0.3]), (0, 0), 400)
    firsts = [int((two[i : i + 3] == 0).sum()) for i in range(397)]
    assert set(firsts) == {2, 3} and np.mean(firsts) == pytest.approx(2.1, abs=0.01)


def test_weights_that_move_at_every_step_lose_nobody():
    """Four samples a step: begun anew each time, a source of a tenth would never have a turn."""
    cursor, due = Cursor(16, 16), np.zeros(2)
    for step in range(200):
        share = 0.05 + 0.0005 * step
        cursor = cursor.mixed({"a": 1 - share, "b": share}, only="a").skip(4)
        due += [4 * (1 - share), 4 * share]
        assert np.abs([source.sample - d for source, d in zip(cursor.sources, due, strict=True)]).max() <= 0.5 + 1e-6
    assert cursor.sources[1].sample == 80, "four times the sum of 0.05 + 0.0005 n is 79.8"


def test_a_source_that_goes_is_drawn_no_more_and_comes_back_where_it_was():
    cursor = Cursor(16, 16, 5).mixed({"a": 0.5, "b": 0.5}, only="a").skip(7)
    assert cursor.sources == (Source("a", UNITS // 2, 9, -UNITS // 2), Source("b", UNITS // 2, 3, UNITS // 2))
    alone = cursor.mixed({"a": 1.0}, only="?").skip(10)
    assert [(s.sample, s.debt) for s in alone.sources] == [(19, 0), (3, 0)] and alone.sample == 22
    assert alone.mixed({"b": 1.0}, only="?").skip(1).sources[1].sample == 4
    assert cursor.mixed({"b": 0.5, "a": 0.5}, only="?") == cursor, "the same weights open no segment"
    assert Cursor(16, 16, 5).mixed({"a": 1.0}, only="a") == Cursor(16, 16, 5), "one data set is no mixture"


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Two data sets of one tokenizer: the tests' text, and the same words in another order."""
    folders = [write_data(tmp_path / name) for name in ("one", "two")]
    for split in ("train", "val"):
        path = folders[1] / f"{split}.bin"
        np.fromfile(path, dtype=np.uint16)[::-1].copy().tofile(path)
    return [str(folder) for folder in folders]


def opened(two) -> Sources:
    return Sources({name: open_data(name, 16) for name in two}).agreed()


def test_batches_are_those_of_the_sources_in_turn(two):
    data = opened(two)
    stream = data.stream(7)
    start = Cursor(16, 8).mixed({two[0]: 0.7, two[1]: 0.3}, only=two[0])
    x, y = stream.batch(start, 20)
    whose = start.turns(20)
    for number, name in enumerate(two):
        count = int((whose == number).sum())
        own = stream.streams[name].batch(Cursor(16, 8), count)
        assert np.array_equal(x[whose == number], own[0]) and np.array_equal(y[whose == number], own[1])
    assert (whose == 1).sum() == 6
    for sizes in ([1] * 20, [7, 13], [5, 0, 15]):
        parts, cursor = [], start
        for size in sizes:
            parts.append(stream.batch(cursor, size)[0])
            cursor = cursor.skip(size)
        assert np.array_equal(np.concatenate(parts), x) and cursor == start.skip(20)
    with pytest.raises(ValueError, match=f"data set three is not open; there are {two[0]}, {two[1]}"):
        stream.batch(start.mixed({"three": 1.0}, only="?"), 1)
    stream.batch(start.mixed({"three": 0.0, two[0]: 1.0}, only="?"), 1)
    keys = {stream.streams[name].seed for name in two}
    assert keys > {7} and len(keys) == 2, "the first has the run's own seed, each other one of its own"


def test_other_lengths_go_on_in_every_source_without_a_repeat():
    cursor = Cursor(16, 8).mixed({"a": 2, "b": 1}, only="a").skip(10)
    assert [source.sample for source in cursor.sources] == [7, 3]
    longer = cursor.cut(16, 16)
    assert [source.sample for source in longer.sources] == [4, 2], "windows that were begun are passed over"
    again = longer.cut(32, 32)
    assert [source.sample for source in again.sources] == [2, 1] and again.sample == 3


def test_passes_and_coverage_are_by_source_and_together(two):
    data = opened(two)
    stream, windows = data.stream(1), windows_per_pass(len(data.first.train), 16)
    cursor = Cursor(16, 16).mixed({two[0]: 3, two[1]: 1}, only=two[0]).skip(800)
    assert [stream.streams[n].passes(stream.own(n, cursor)) for n in two] == [600 / windows, 200 / windows]
    assert stream.passes(cursor) == pytest.approx(800 / (2 * windows))
    assert stream.coverage(cursor) == pytest.approx((windows + 200) / (2 * windows))


# ---------------------------------------------------------------------------------------------- runs

RAMP = [
    {"name": "set_data_mixture", "value": None, "at_iter": 2, "over": 6, "style": "cosine"},
    {"name": "set_batch_size", "value": 6, "at_iter": 5},
]


def ramp(two) -> list[dict]:
    return [{**RAMP[0], "value": {two[0]: 0.2, two[1]: 0.8}}, RAMP[1]]


def test_one_data_set_as_a_mixture_is_the_run_that_it_is_alone(tiny, two):
    _, alone = tiny(out="alone", dataset=two[0], max_iters=6)
    _, mixed = tiny(out="mixed", dataset={two[0]: 3.0}, max_iters=6)
    assert_same_tensors(tensors(mixed), tensors(alone))
    assert not any("/" in key for line in lines(mixed / METRICS) for key in line)
    state = json.loads((alone / "checkpoints" / "latest" / "state.json").read_text())
    assert set(state["progress"]["cursor"]) == {"block_size", "length", "sample"}, "as in a checkpoint of one data set"


def test_a_ramp_is_resumed_in_its_middle_to_the_bit(tiny, two, resume):
    keys = {"dataset": {two[0]: 1.0, two[1]: 0.0}}
    _, whole = tiny(ramp(two), out="whole", **keys)
    _, out = tiny(ramp(two), out="cut", max_iters=5, **keys)
    assert resume(out, max_iters=12) == 0
    assert_same_tensors(tensors(out), tensors(whole))
    (done,) = [e for e in events(whole, "operation") if e["name"] == "set_data_mixture"]
    assert done["settings_after"]["mixture"] == {two[0]: 0.2, two[1]: 0.8}
    state = json.loads((whole / "checkpoints" / "latest" / "state.json").read_text())
    assert state["settings"]["mixture"] == {two[0]: 0.2, two[1]: 0.8}, "the end is exact"
    samples = {source["name"]: source["sample"] for source in state["progress"]["cursor"]["sources"]}
    # 8 samples an iteration, 12 from the fifth on; the share of the second after n of 6 iterations by the cosine.
    shares = [0.0, 0.0, *(0.8 * 0.5 * (1 - np.cos(np.pi * n / 6)) for n in range(6)), *[0.8] * 4]
    due = sum(share * (8 if i < 5 else 12) for i, share in enumerate(shares))
    assert sum(samples.values()) == 5 * 8 + 7 * 12 and abs(samples[two[1]] - due) <= 0.51


def _mixture_run(rank: int, two: list[str], out: str, folder: str, keys: dict):
    values = {**TINY, "dataset": {two[0]: 0.7, two[1]: 0.3}, "out_dir": out, "schedule": f"{folder}/s.json", **keys}
    return train_orchestrated.run([f"--{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_reads_the_same_samples(tmp_path, two, processes):
    (tmp_path / "s.json").write_text(json.dumps(ramp(two)))
    keys = {"gradient_accumulation_steps": 4, "batch_size": 2}

    def place(name: str) -> dict:
        return json.loads((tmp_path / name / "checkpoints" / "latest" / "state.json").read_text())["progress"]["cursor"]

    found = on_ranks(_mixture_run, two, str(tmp_path / "many"), str(tmp_path), keys, world_size=processes)
    assert found == [0] * processes and _mixture_run(0, two, str(tmp_path / "alone"), str(tmp_path), keys) == 0
    assert place("many") == place("alone")
    losses = [
        [line["val_loss"] for line in lines(tmp_path / name / METRICS) if line["kind"] == "eval"]
        for name in ("many", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_what_is_measured_of_each_source(tiny, two):
    """val_loss is that of the weights at the start, however the mixture moves; triggers and guards know the parts."""
    one, other = (f"val_loss/{name}" for name in two)
    schedule = [
        {"name": "set_dataset", "value": two[1], "trigger": {"metric": one, "below": 99.0}},
        {"name": "set_lr", "value": 1e-3, "trigger": {"metric": f"passes/{two[1]}", "above": 0.05},
         "guard": {"metric": other, "max_increase": 5.0, "within_iters": 2, "then": "keep"}},
    ]  # fmt: skip
    keys = dict(dataset={two[0]: 0.25, two[1]: 0.75}, early_stopping_metric=other, early_stopping_patience=99)
    _, out = tiny(schedule, **keys)
    evaluations = [line for line in lines(out / METRICS) if line["kind"] == "eval"]
    for line in evaluations:
        assert line["val_loss"] == pytest.approx(0.25 * line[one] + 0.75 * line[other])
    assert [e["name"] for e in events(out, "operation")] == ["set_dataset", "set_lr"]
    fired = [e for e in events(out, "decision") if e["name"] == "set_lr"]
    assert fired[0]["iter"] == 2 and "within the limit" in fired[-1]["reason"], "16 of 293 windows are 0.0546"
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    falls = [line[other] for line in evaluations if "why" not in line]
    lowest, waited = falls[0], 0
    for value in falls[1:]:
        lowest, waited = (value, 0) if value < lowest else (lowest, waited + 1)
    assert (state["progress"]["stopping_best"], state["progress"]["evals_without_gain"]) == (lowest, waited)
    _, only = tiny(out="only", eval_mixture={two[1]: 5}, **keys)
    assert all(line["val_loss"] == line[other] for line in lines(only / METRICS) if line["kind"] == "eval")


@pytest.mark.parametrize(
    "keys, entry, message",
    [
        ({}, {"name": "set_dataset", "value": "nowhere"}, "entry 1: set_dataset \"nowhere\": dataset nowhere: no"),
        ({}, {"name": "set_lr", "value": 1, "trigger": {"metric": "val_loss/x", "below": 1}}, "val_loss/x is of no"),
        ({"early_stopping_metric": "passes/x", "early_stopping_patience": 1}, None, "early_stopping_metric: passes/x"),
        ({"dataset": {"ONE": -1}}, None, "--dataset: dataset"),
        ({"dataset": {"ONE": 0, "TWO": 0}}, None, "must have a weight above 0"),
        ({"dataset": {}}, None, "must name a data set"),
        ({"eval_mixture": {"ONE": "x"}}, None, "--eval_mixture"),
    ],
)  # fmt: skip
def test_what_is_refused(tiny, two, keys, entry, message):
    named = json.loads(json.dumps(keys).replace("ONE", two[0]).replace("TWO", two[1]))
    with pytest.raises(Refused, match=re.escape(message)):
        tiny([entry] if entry else None, **{"dataset": {two[0]: 1, two[1]: 1}, **named})
    assert not tiny.folder("run").exists()


def test_sources_share_a_tokenizer_or_one_begins_with_the_other(tiny, two, tmp_path):
    meta = json.loads((tmp_path / "two" / "meta.json").read_text())
    (tmp_path / "two" / "meta.json").write_text(json.dumps({**meta, "itos": [*meta["itos"][1:], "ß"]}))
    with pytest.raises(Refused, match="the sources of a mixture share one tokenizer"):
        tiny(dataset={two[0]: 1, two[1]: 1})
    wider = {**meta, "itos": [*meta["itos"], "<|im_start|>"], "vocab_size": meta["vocab_size"] + 1}
    (tmp_path / "two" / "meta.json").write_text(json.dumps(wider))
    assert tiny(dataset={two[0]: 1, two[1]: 1}, max_iters=1)[0] == 0, "the model has all tokens from the start"
    size = meta["vocab_size"]
    too_early = [{"name": "set_dataset", "value": two[1]}]
    told = f"entry 1: .*: dataset {two[1]} has a vocabulary of {size + 1}, more than the {size} of the model"
    with pytest.raises(Refused, match=told):
        tiny(too_early, out="early", dataset=two[0])
    with pytest.raises(Refused, match=f"dataset {two[1]} has a vocabulary of {size + 1}, more than the {size}"):
        tiny(too_early, out="early", dataset=two[0], eval_mixture={two[1]: 1})
    grown = [{"name": "resize_vocabulary", "value": {"add": 1}, "at_iter": 4}, *too_early]
    code, out = tiny(grown, out="grown", dataset=two[0])
    measured = [(f"val_loss/{two[1]}" in line) for line in lines(out / METRICS) if line["kind"] == "eval"]
    assert code == 0 and measured == [False, False, True, True], "evaluated once the model has its tokens"


def test_tokens_that_name_no_vocabulary_are_gpt2s(two, monkeypatch):
    """As prepare.py writes GPT-2's: a chat set that adds tokens behind the last one goes on from it."""
    assert (Meta().tokens, Meta(7).tokens, Meta(tokenizer="huggingface").tokens) == (50257, 7, 0)
    data = open_data(two[1], 16)
    known = data.meta.itos
    plain = Meta(None, tokenizer="gpt2", fingerprint=CharTokenizer(known[:-1]).fingerprint)
    assert not extends(data, plain), "50257 are more"
    monkeypatch.setattr(stream, "GPT2_TOKENS", len(known) - 1)
    assert extends(data, plain) and not extends(data, replace(plain, fingerprint="0" * 64))
    of_none = _fingerprint([], CharTokenizer(known).encode_plain)
    assert not extends(data, Meta(None, tokenizer="huggingface", fingerprint=of_none)), "how many it has nobody says"


def test_a_resume_keeps_its_sources(tiny, two, resume):
    _, out = tiny(dataset={two[0]: 0.5, two[1]: 0.5}, max_iters=4)
    with pytest.raises(Refused, match="each data set of a mixture has its place in the run by its name"):
        resume(out, dataset={two[0]: 0.5}, max_iters=6)
    assert resume(out, dataset={two[0]: 0.25, two[1]: 0.75}, max_iters=8) == 0
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert [s["sample"] for s in state["progress"]["cursor"]["sources"]] == [16 + 8, 16 + 24]
    tokens = np.fromfile(f"{two[1]}/train.bin", dtype=np.uint16)
    tokens[0] += 1
    tokens.tofile(f"{two[1]}/train.bin")
    with pytest.raises(Refused, match=f"{two[1]}/train.bin is not what the checkpoint was trained on"):
        resume(out, max_iters=9)


def test_a_run_begins_with_the_weights_of_another(tiny, two):
    _, parent = tiny(out="parent", dataset=two[0], eval_interval=2)
    keys = {"dataset": two[1], "init_from": parent}
    code, out = tiny(out="child", checkpoint="best", max_iters=0, **keys)
    assert code == 0
    (start,) = events(out, "start")
    best = (parent / "checkpoints" / "best").resolve().name
    assert start["parent"]["run"] == str(parent) and start["parent"]["checkpoint"] == best
    theirs, ours = tensors(parent, "best"), tensors(out)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours) and not any("|" in name for name in ours)
    assert tiny(out="other", max_iters=1, n_embd=16, **keys)[0] == 0, "what the weights say may be said"
    for more, message in (
        ({"n_embd": 32}, f"n_embd: got 32, but the weights of {parent} have n_embd 16"),
        ({"checkpoint": "iter_7"}, "there is no checkpoint 'iter_7'"),
        ({"checkpoint": "best", "init_from": "scratch"}, "init_from scratch is no run folder"),
    ):
        with pytest.raises(Refused, match=message):
            tiny(out="no", **{**keys, **more})


def test_from_pretraining_to_conversations(tiny, two, tmp_path):
    """The shipped schedule on a tiny set of each kind: masks come in with the second, and two words."""
    talks = tmp_path / "talks.jsonl"
    turns_ = [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not to be"}]
    talks.write_text("".join(json.dumps({"messages": turns_, "number": i}) + "\n" for i in range(80)))
    chat_folder = tmp_path / "chat"
    reading = Reading(render=chat, sources=("messages",))
    prepare([talks], chat_folder, two[0], reading=reading, val=0.5)
    name = str(chat_folder)
    text = (ROOT / "schedules" / "pretrain_midtrain_chat.yaml").read_text()
    schedule = yaml.safe_load(text.replace("fineweb_edu", two[0]).replace("task_mixture", name))
    for entry in schedule:
        entry |= {"over": 3} if "over" in entry else {}
        entry |= {"max_wait_iters": 2} if "max_wait_iters" in entry else {}
    code, out = tiny(schedule, dataset=two[0], max_iters=20, eval_interval=4, decay_lr=False)
    assert code == 0 and len(events(out, "operation")) == 5
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["settings"]["mixture"] == {two[0]: 0.0, name: 1.0}
    assert state["settings"]["model"]["vocab_size"] == 25 and state["tokenizer"]["vocab_size"] == 25
    evaluations = [line for line in lines(out / METRICS) if line["kind"] == "eval" and "why" not in line]
    assert evaluations[0].keys() & {f"val_loss/{name}"} == set()
    late = [line for line in evaluations if f"val_loss/{name}" in line]
    assert late[-1][f"val_loss/{name}"] < late[0][f"val_loss/{name}"]
    assert all(line["val_loss"] == line[f"val_loss/{two[0]}"] for line in evaluations)
