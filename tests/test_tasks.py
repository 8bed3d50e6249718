"""Tasks at evaluations: scores by an oracle, the same on any ranks, in logs, triggers, guards and early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, assert_same_tensors, events, lines, on_ranks, tensors
from test_metrics import Driven, clip, on
from test_sample_prompts import _runs

import train_orchestrated
from orchestrate.data.arithmetic import ADDER, CHARACTERS, MULTIPLIER, prepare
from orchestrate.data.files import packed
from orchestrate.data.stream import Meta, open_data
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.stopwatch import Stopwatch
from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint
from orchestrate.training.store.trackers import About, Branch, Tracker
from orchestrate.training.tasks import TASKS, make
from orchestrate.training.tasks.base import task
from orchestrate.training.tasks.exact_match import wilson


def test_the_interval_by_hand():
    """Of Newcombe 1998, table I: 81 of 263, and none of 20 and of 29 but 1."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=6e-5) and wilson(20, 20)[1] == 1.0


# ---------------------------------------------------------------------------------------------- by an oracle


class Oracle(torch.nn.Module):
    """Answers lines of whole sequences, as `answer(a, b)` says it, then as whoever is at the end of a line."""

    def __init__(self, itos, answer, block_size=40) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(block_size=block_size, cache_length=block_size, n_kv_head=1, head_size=2)
        self.itos, self.answer, self.sizes = itos, answer, []

    def extend(self, idx, counts, cache, first):
        assert not self.training
        self.sizes.append(len(idx))
        logits = torch.zeros(len(idx), len(self.itos))
        for row, (ids, count) in enumerate(zip(idx.tolist(), counts, strict=True)):
            text = "".join(self.itos[i] for i in ids[:count])
            given, _, said = text.partition("=")
            a, b = given.replace("*", "+").split("+")
            wanted = self.answer(a, b)[len(said)]
            if wanted == "?":
                logits[row, 0] = float("nan")
            else:
                logits[row, self.itos.index(wanted)] = 1.0
        return logits


def scored(one, model, data, eval_batch_size=8, poll=lambda: 0, remap=None):
    run = SimpleNamespace(
        ranks=Ranks("cpu"), eval_batch_size=eval_batch_size, stopwatch=Stopwatch(), model=model, autocast=torch.no_grad,
        settings=SimpleNamespace(model=SimpleNamespace(block_size=20)), data=data.remapped(remap),
    )  # fmt: skip
    return one.score(run, poll)


@pytest.fixture(scope="module", params=["adder", "multiplier"])
def made(request, tmp_path_factory):
    """A data set of up to 2 digits, its task, and how a right answer reads."""
    folder, kind = tmp_path_factory.mktemp("tasks") / request.param, {"adder": ADDER, "multiplier": MULTIPLIER}
    prepare(kind[request.param], folder, digits=2, limit=1000, test=40, val=0.3, seed=1)

    def answer(a: str, b: str) -> str:
        if request.param == "adder":
            return str(int(a) + int(b)).zfill(len(a) + 1)[::-1] + "\n" + "0" * 9
        return str(int(a) * int(b)).zfill(2 * len(a))[::-1] + "\n" + "0" * 9

    (one,) = make([f"{request.param}:{folder}"])
    return folder, one, answer


def asked(folder) -> list[tuple[str, str]]:
    data = open_data(str(folder), 4)
    text = "".join(data.meta.itos[i] for i in data.val.tokens[:])
    return [tuple(line.split("=")[0].replace("*", "+").split("+")) for line in text.splitlines()]


def test_scores_of_an_oracle(made):
    folder, one, answer = made
    data, name = open_data(str(folder), 4), one.name
    counts = {n: len(asked(folder / str(n))) for n in (1, 2, 3)}
    metrics = [f"eval/{name}_accuracy{end}" for end in ("", "_low", "_high", "/1", "/2", "/3")]
    assert list(one.metrics) == metrics
    model = Oracle(data.meta.itos, answer)
    found = scored(one, model, data)
    assert [found[metric] for metric in metrics] == [1.0, found[metrics[1]], 1.0, 1.0, 1.0, 1.0]
    assert found[metrics[1]] == pytest.approx(wilson(counts[1] + counts[2], counts[1] + counts[2])[0])
    assert model.training and max(model.sizes) == 8 * 20 // 16, "as many tokens as in a batch of an evaluation"

    # An odd sum of the operands goes wrong, in one of eight ways.
    def odd(a: str, b: str) -> str:
        right = answer(a, b)
        if (int(a) + int(b)) % 2 == 0:
            return right
        end = right.index("\n")
        broken = [
            str((int(right[0]) + 1) % 10) + right[1:], right[: end - 1] + "=" + right[end:], right[:end] + "0" * 9,
            right[: end - 1] + "\n" * 9, "?" + right[1:], "+" + right[1:], "\n" + right[1:],
            right[:end] + "?" + "0" * 9,
        ]  # fmt: skip
        return broken[(int(a) * 7 + int(b)) % len(broken)]

    found = scored(one, Oracle(data.meta.itos, odd), data, eval_batch_size=100)
    shares = {n: [(int(a) + int(b)) % 2 == 0 for a, b in asked(folder / str(n))] for n in (1, 2, 3)}
    for n in (1, 2, 3):
        assert found[f"eval/{name}_accuracy/{n}"] == pytest.approx(np.mean(shares[n]))
    both = shares[1] + shares[2]
    assert found[f"eval/{name}_accuracy"] == pytest.approx(np.mean(both)), "longer ones do not count"
    assert (found[metrics[1]], found[metrics[2]]) == pytest.approx(wilson(sum(both), len(both)))
    assert 0.2 < np.mean(both) < 0.8


def test_scores_through_a_map_and_cut_short(made):
    folder, one, answer = made
    data, flip = open_data(str(folder), 4), np.arange(14)[::-1].copy()
    found = scored(one, Oracle(data.meta.itos[::-1], answer), data, remap=flip)
    assert found[f"eval/{one.name}_accuracy"] == 1.0
    polls = iter([0, 0, 15])
    model = Oracle(data.meta.itos, answer)
    assert scored(one, model, data, poll=lambda: next(polls)) is None and model.training


def test_data_that_is_refused(made, tmp_path):
    folder, one, _ = made
    other = {"adder": "multiplier", "multiplier": "adder"}[one.name]
    for given, message in (
        ([f"{other}:{folder}"], f"names no problems of {other}"),
        ([f"{one.name}:{tmp_path}"], rf"{one.name}: .*no data set; make it with: python data/{one.name}/prepare.py"),
        (["ader"], "there is no task 'ader'; did you mean adder"),
        ([f"{one.name}:{folder}"] * 2, f"{one.name} is there twice"),
    ):
        with pytest.raises(Refused, match=message):
            make(given)
    meta = json.loads((folder / "meta.json").read_text())
    text = (np.fromfile(folder / "val.bin", np.uint16), np.uint16)[0]
    for ids, message in (
        (text[:-1], "begins no line like"), (text[1:], "begins no line"), (np.append(text, 14), "not characters"),
        (np.append(text, text[:5]), "begins no line"),
    ):  # fmt: skip
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        (broken / "meta.json").write_text(json.dumps(meta))
        ids.astype(np.uint16).tofile(broken / "val.bin")
        if message == "begins no line" and len(ids) == len(text) - 1:
            continue  # a shorter number is a line too
        with pytest.raises(Refused, match=message):
            make([f"{one.name}:{broken}"])
    longest = {"adder": 3 + 1 + 3 + 1 + 4, "multiplier": 3 + 1 + 3 + 1 + 6}[one.name]
    assert one.check(open_data(str(folder), 4).meta, longest) == ""
    assert f"takes {longest} tokens, more than block_size {longest - 1}" in one.check(one.meta, longest - 1)
    itos = tuple(sorted(CHARACTERS))
    assert one.check(Meta(15, tokenizer="char", itos=(*itos, "x")), 40) == "", "more words, the same ids"
    assert "written in other tokens" in one.check(Meta(14, tokenizer="char", itos=("?", *itos[1:])), 40)
    assert "written in other tokens" in one.check(Meta(None), 40)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a task adder already"):
        task("adder")(TASKS["adder"])


# ---------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Lines that all say the same, and a test of which 7 of 10 do: so much a model learns in a few steps."""
    folder = tmp_path_factory.mktemp("easy") / "adder"
    folder.mkdir()
    itos = sorted(CHARACTERS)
    for split, text in (("train", "1+2=30\n" * 200), ("val", "1+2=30\n" * 7 + "1+2=40\n1+9=01\n" + "2+2=40\n")):
        ids = np.array([itos.index(c) for c in text], dtype=np.uint16)
        ids.tofile(folder / f"{split}.bin")
        (folder / f"{split}.mask.bin").write_bytes(packed(np.ones(len(ids))))
    meta = {"format": 1, "vocab_size": 14, "tokenizer": "char", "itos": itos, "masks": ["train", "val"], "row": 7}
    (folder / "meta.json").write_text(json.dumps({**meta, "arithmetic": {"kind": "adder"}}))
    return folder


EASY = dict(n_layer=1, block_size=14, max_iters=40, learning_rate=0.05, eval_interval=8, eval_iters=2, dropout=0.1)
ACCURACY = "eval/adder_accuracy"


def keys(easy, **more):
    return {**EASY, "eval_tasks": f"adder:{easy}", **more}


def scores_of(out) -> dict[int, float]:
    return {m["iter"]: m[ACCURACY] for m in lines(out / "metrics.jsonl") if ACCURACY in m and not m.get("void")}


def losses(out) -> list[tuple]:
    return [(m["kind"], m["iter"], m.get("loss", m.get("val_loss"))) for m in lines(out / "metrics.jsonl")]


@pytest.fixture
def trained(easy, tmp_path):
    """trained(schedule, out=..., **keys) is the folder of a run on the easy lines."""

    def launch(schedule=(), out="run", **more):
        path = tmp_path / f"{out}.json"
        path.write_text(json.dumps(list(schedule)))
        assert train_orchestrated.main(arguments(easy, tmp_path / out, schedule=path, **more)) == 0
        return tmp_path / out

    return launch


def test_scores_are_logged_and_the_run_is_the_same_to_the_bit(trained, easy, capsys):
    out = trained(**keys(easy))
    shown = capsys.readouterr().out
    other = trained(out="without", **EASY)
    assert_same_tensors(tensors(out), tensors(other))
    assert losses(out) == losses(other)
    found = scores_of(out)
    assert list(found) == [0, 8, 16, 24, 32, 40] and found[0] == 0.0 and found[40] == 0.7, found
    assert not scores_of(other)
    (last,) = (m for m in lines(out / "metrics.jsonl") if m["kind"] == "eval" and m["iter"] == 40)
    assert last["eval/adder_accuracy/1"] == 0.7
    assert (last[f"{ACCURACY}_low"], last[f"{ACCURACY}_high"]) == wilson(7, 10)
    assert "step 40: eval/adder_accuracy 0.7000, eval/adder_accuracy_low 0.3968, " in shown


def test_they_may_be_scored_less_often(trained, easy, resume):
    out = trained(**keys(easy, eval_tasks_interval=12, max_iters=28))
    assert list(scores_of(out)) == [0, 16, 24, 28], "the first evaluation in each 12 iterations, and the last"
    assert resume(out, max_iters=40) == 0
    assert list(scores_of(out)) == [0, 16, 24, 28, 40]


def test_a_trigger_and_a_resume(trained, easy, resume):
    """An entry fires at the first score that is high enough; so does one in a resumed run."""
    schedule = [clip(0.5, **on(ACCURACY, above=0.69)), clip(0.4, **on(f"{ACCURACY}/1", below=0.7))]
    out = trained(schedule, **keys(easy))
    found = scores_of(out)
    first = next(i for i, value in found.items() if value >= 0.69)
    assert first > 0
    (one, two) = events(out, "operation")
    assert one["iter"] == two["iter"] == first and one["reason"] == f"{ACCURACY} 0.7 >= 0.69"
    cut = trained(schedule, "cut", **keys(easy, max_iters=1))
    assert not events(cut, "operation") and resume(cut, max_iters=40) == 0
    assert [e["iter"] for e in events(cut, "operation")] == [first] * 2


def test_against_recorded_scores(trained, easy, tmp_path, capsys):
    out = trained(**keys(easy))
    first = next(i for i, value in scores_of(out).items() if value >= 0.69)
    path = tmp_path / "s.json"
    path.write_text(json.dumps([clip(0.5, **on(ACCURACY, above=0.69))]))
    capsys.readouterr()
    given = arguments(easy, tmp_path / "new", schedule=path, **keys(easy))
    assert train_orchestrated.main([*given, "--plan", "--wide", f"--against={out}"]) == 0
    assert f"{first}: {ACCURACY} 0.7 >= 0.69" in capsys.readouterr().out


def test_early_stopping_wants_more(trained, easy):
    stopping = dict(early_stopping_metric=ACCURACY, early_stopping_patience=2)
    out = trained(**keys(easy, **stopping, max_iters=200, eval_interval=4, learning_rate=0.02))
    values = list(scores_of(out).values())
    assert values[0] == 0.0 and values[-3:] == [0.7] * 3, "two evaluations without more than 0.7"
    (end,) = events(out, "end")
    assert end["reason"] == f"early stop: no gain in 2 values of {ACCURACY}" and max(values) == 0.7


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(eval_tasks="ader"), "eval_tasks: there is no task 'ader'"),
        (dict(eval_tasks="", early_stopping_metric=ACCURACY, early_stopping_patience=1),
         "early_stopping_metric: eval/adder_accuracy is given by no task; there are none, as eval_tasks is empty"),
        (dict(early_stopping_metric="eval/adder_accuracy/2", early_stopping_patience=1),
         "early_stopping_metric: eval/adder_accuracy/2 is given by no task; did you mean eval/adder_accuracy/1"),
        (dict(schedule=[clip(**on("eval/multiplier_accuracy", above=0.5))]),
         "entry 1: set_grad_clip.*: eval/multiplier_accuracy is given by no task"),
        (dict(schedule=[clip(at_iter=3, guard={"metric": "eval/x", "max_decrease": 0.1})]),
         "entry 1: set_grad_clip.*: eval/x is given by no task"),
        (dict(block_size=5), "a problem of .* takes 6 tokens, more than block_size 5"),
    ],
)  # fmt: skip
def test_what_is_refused(easy, tmp_path, more, message):
    more = keys(easy, **more)
    if schedule := more.pop("schedule", None):
        (tmp_path / "s.json").write_text(json.dumps(schedule))
        more["schedule"] = tmp_path / "s.json"
    for plan in ([], ["--plan"]):
        with pytest.raises(Refused, match=message):
            train_orchestrated.main([*arguments(easy, tmp_path / "run", **more), *plan])
    assert not (tmp_path / "run").exists()


def test_trackers_name_them_as_they_are(tmp_path):
    logged = []

    class Here(Tracker):
        begin, log = (lambda self, goes_on: None), (lambda self, iteration, values: logged.append((values, iteration)))

    tracker = Here(About.of(str(tmp_path), "", "", {}, ""), Branch("a"), False)
    tracker.take({"kind": "eval", "iter": 3, "val_loss": 1.5, ACCURACY: 0.5, f"{ACCURACY}/1": 0.25})
    assert logged == [({"eval/val_loss": 1.5, ACCURACY: 0.5, f"{ACCURACY}/1": 0.25}, 3)]


# ---------------------------------------------------------------------------------------------- on several ranks


def test_ranks_share_the_work(easy, tmp_path, trained):
    """The scores are those of one process; with and without them weights are equal to the bit, with shards too.

    Five batches of two problems for two ranks: the last one has none in the last round.
    """
    some = keys(easy, eval_batch_size=3, max_iters=8)
    assert 3 * EASY["block_size"] // 16 == 2
    commands = {
        (parallel, tasks): arguments(easy, tmp_path / f"{parallel}_{bool(tasks)}", parallel=parallel,
                                     **{**some, "eval_tasks": tasks})
        for parallel in ("ddp", "fsdp") for tasks in ("", some["eval_tasks"])
    }  # fmt: skip
    assert on_ranks(_runs, list(commands.values()), seconds=300) == [[0] * 4] * 2
    alone = scores_of(trained(out="alone", **some))
    assert alone[8] == 0.7
    for parallel in ("ddp", "fsdp"):
        one, other = tmp_path / f"{parallel}_False", tmp_path / f"{parallel}_True"
        assert losses(one) == losses(other) and len(losses(one)) > 8
        assert scores_of(other).keys() == alone.keys() and scores_of(other)[8] == 0.7 and scores_of(other)[0] == 0.0
        loaded = [dict(checkpoint.load(folder / "checkpoints" / "latest").model) for folder in (one, other)]
        assert_same_tensors(*loaded)


# ---------------------------------------------------------------------------------------------- more is better


def test_a_plateau_is_one_below_the_highest():
    run = Driven([clip(**on(ACCURACY, plateau={"evals": 2, "min_delta": 0.1}))])
    fired = [run.boundary(**{ACCURACY: value}) for value in (0.1, 0.5, 0.9, 0.95, 0.2)]
    assert fired[:4] == [[]] * 4
    assert fired[4] == [(1, f"plateau of {ACCURACY}: 0.95 in 2 values, 0.9 before (min_delta 0.1)")]


def test_what_the_oldest_say_is_the_highest_of_them():
    run = Driven([clip(**on(ACCURACY, plateau={"evals": 1, "min_delta": 0.1}))])
    assert [run.boundary(**{ACCURACY: value}) for value in (0.1, 0.3, 0.5, 0.7)] == [[]] * 4
    assert run.orchestrator.position.queues[""].history == {ACCURACY: (0.5, 0.7)}


@pytest.mark.parametrize("after, back", [(0.51, False), (0.5, False), (0.49, True), (0.9, False)])
def test_a_guard_on_a_score(after, back):
    guard = {"metric": ACCURACY, "max_decrease": 0.25, "within_iters": 3}
    run = Driven([clip(at_iter=2, guard=guard)])
    assert run.boundary(iters=2) == [], "there is no score yet to compare with"
    assert run.boundary(**{ACCURACY: 0.75}) == [(1, "iteration 3 (at_iter 2)")]
    run.boundary(iters=3, **{ACCURACY: after})
    if back:
        assert run.reasons("rollback") == [f"guard: {ACCURACY} 0.49 < 0.5"]
    else:
        assert run.reasons("decision")[-1] == f"guard: {ACCURACY} stayed within the limit (revert)"


@pytest.mark.parametrize(
    "guard, message",
    [
        ({"metric": ACCURACY}, "must give max_decrease and no max_increase: more is better"),
        ({"metric": ACCURACY, "max_increase": 0.1}, "must give max_decrease and no max_increase"),
        ({"metric": ACCURACY, "max_increase": 0.1, "max_decrease": 0.1}, "must give max_decrease and no max_increase"),
        ({"metric": "loss", "max_decrease": 0.1}, "max_decrease is for scores of tasks: less is better of loss"),
        ({"metric": "eval/", "max_decrease": 0.1}, "must be the name of a metric"),
        ({"metric": "eval/a/b/c", "max_decrease": 0.1}, "must be the name of a metric"),
    ],
)
def test_guards_that_are_refused(guard, message):
    with pytest.raises(Refused, match=message):
        parse_schedule(json.dumps([clip(at_iter=2, guard=guard)]), "s.json")


def test_the_digits_schedule_moves_on_what_is_mastered(tmp_path, monkeypatch):
    """The shipped schedule and configuration, on the sets of the shipped script, under scores that are made up."""
    folder = tmp_path / "adder"
    prepare(ADDER, folder, digits=3, limit=1000, test=10)
    text = (ROOT / "schedules/curriculum_digits.yaml").read_text().replace("adder/1", f"{folder}/1")
    text = text.replace(f"eval/{folder}/1", "eval/adder/1")
    for n in (2, 3):
        text = text.replace(f" adder/{n}:", f" {folder}/{n}:")
    path = tmp_path / "s.yaml"
    path.write_text(text)
    told = {"": iter([0.3, 0.4, 0.98, 0.985, 0.99, 1.0]), "/1": iter([0.5, 0.99, 0.5, 0.99, 0.99, 0.99]),
            "/2": iter([0.99, 0.9, 0.98, 0.99, 0.99, 0.99])}  # fmt: skip
    seen = []

    def score(one, run, poll):
        seen.append({Path(name).name: share for name, share in run.settings.mixture.items()})
        return {f"{ACCURACY}{which}": next(values) for which, values in told.items()}

    monkeypatch.setattr("orchestrate.training.tasks.exact_match.ExactMatch.score", score)
    given = dict(dataset=folder, out_dir=tmp_path / "run", eval_tasks=f"adder:{folder}", schedule=path, eval_interval=2)
    small = dict(n_layer=1, n_embd=8, n_head=1, batch_size=2, max_iters=20, eval_iters=1)
    config = str(ROOT / "config/adder.py")
    assert train_orchestrated.main([config, *(f"--{key}={value}" for key, value in (given | small).items())]) == 0
    fired = [(e["iter"], e["entry"]) for e in events(tmp_path / "run", "operation")]
    assert fired == [(0, 1), (2, 2), (6, 3), (8, 4)], "at 0 nothing of 2 digits counts yet; at 6, two digits are known"
    assert [one.get("3") for one in seen] == [None, 0.1, 0.3, 0.3, 0.8]
    assert open_data(str(folder), 26).meta.row == 13 and 26 % 13 == 0


def test_the_configuration_for_products(tmp_path):
    """On the set of the shipped script: whole lines in a window, from their beginning, and a score of every length."""
    folder = tmp_path / "multiplier"
    prepare(MULTIPLIER, folder, digits=2, limit=1000, test=10)
    given = dict(dataset=folder, out_dir=tmp_path / "run", eval_tasks=f"multiplier:{folder}", eval_interval=2)
    small = dict(n_layer=1, n_embd=8, n_head=1, batch_size=2, max_iters=2, eval_iters=1)
    config = str(ROOT / "config/multiplier.py")
    assert train_orchestrated.main([config, *(f"--{key}={value}" for key, value in (given | small).items())]) == 0
    (last,) = (m for m in lines(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "eval" and m["iter"] == 2)
    assert {key.rpartition("/")[2] for key in last if key.startswith("eval/multiplier_accuracy/")} == {"1", "2", "3"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["block_size"] == 2 * open_data(str(folder), 22).meta.row and config["weight_decay"] == 0.3
