"""When a run evaluates and saves: every so many iterations or tokens, what is kept, and that the best is the best."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from conftest import assert_same_tensors, events, lines, on_ranks, tensors

import train_orchestrated
from orchestrate.training.run.run import Run
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint
from orchestrate.training.store.manifest import read

# 128 tokens an iteration until iteration 3, then 256 until 6, then 128: 128 256 384 640 896 1152 1280 1408 1536 ...
BATCH = [
    {"name": "set_batch_size", "value": 8, "at_iter": 3},
    {"name": "set_batch_size", "value": 4, "at_iter": 6},
]


def evaluated_at(out) -> list[int]:
    return [m["iter"] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"]


def saved_at(out) -> list[int]:
    return [e["iter"] for e in events(out, "checkpoint")]


def killed_at(iteration: int, patched: pytest.MonkeyPatch) -> None:
    original = Run.step

    def step(run, near=False):
        if run.progress.iter == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, near)

    patched.setattr(Run, "step", step)


@pytest.mark.parametrize(
    "every, expected",
    [
        (300, [0, 3, 4, 6, 7, 9, 12]),  # 384, 640, 1152 (not 896), 1280, 1536, 1920
        (256, [0, 2, 4, 5, 6, 7, 9, 11, 12]),  # the multiple itself counts: 256, 1280, 1536, 1792; 640 is 2 * 256 + 128
        (10**9, [0, 12]),
        (100, list(range(13))),  # several in one iteration are one evaluation
    ],
)
def test_an_evaluation_every_so_many_tokens_to_the_iteration(tiny, every, expected):
    _, out = tiny(BATCH, eval_interval_tokens=every, eval_interval=1)
    assert evaluated_at(out) == expected


def test_checkpoints_every_so_many_tokens_and_iterations(tiny):
    keys = {"eval_interval": 1000, "keep_last": 99}
    _, out = tiny(BATCH, save_interval_tokens=300, **keys)
    assert saved_at(out) == [3, 4, 6, 7, 9, 12]
    _, out = tiny(BATCH, out="iters", save_interval=5, **keys)
    assert saved_at(out) == [5, 10, 12] == sorted(m.iter for m in map(read, checkpoint.find(out)))
    reasons = [e["reason"] for e in events(out, "checkpoint")]
    assert reasons == ["save_interval", "save_interval", "the end of the run"]


@pytest.mark.parametrize("iteration", [2, 3, 5])
def test_a_resume_evaluates_and_saves_where_the_undisturbed_run_does(tiny, resume, iteration):
    keys = {"eval_interval_tokens": 300, "save_interval_tokens": 500, "keep_last": 99}
    _, whole = tiny(BATCH, out="whole", **keys)
    with pytest.MonkeyPatch.context() as patched:
        killed_at(iteration, patched)
        code, part = tiny(BATCH, out="part", **keys)
    assert code == 143 and resume(part) == 0
    assert evaluated_at(part) == evaluated_at(whole)
    assert set(saved_at(part)) == {*saved_at(whole), iteration + 1}
    assert_same_tensors(tensors(part), tensors(whole))


def test_the_schedule_changes_the_unit_and_back(tiny):
    """From tokens (every 4 iterations) to iterations at 5, to other tokens (every 2) at 9."""
    schedule = [
        {"name": "set_eval_interval", "value": 3, "at_iter": 5},
        {"name": "set_eval_interval_tokens", "value": 256, "at_iter": 9},
    ]
    _, out = tiny(schedule, eval_interval_tokens=512, max_iters=15)
    assert evaluated_at(out) == [0, 4, 6, 9, 10, 12, 14, 15]


def test_an_interval_that_would_count_for_nothing_is_refused_on_resume(tiny, resume):
    _, out = tiny(eval_interval_tokens=512)
    with pytest.raises(
        Refused, match=r"--eval_interval: eval_interval counts for nothing .* is 512: give --eval_inter"
    ):
        resume(out, eval_interval=3, max_iters=14)
    assert resume(out, eval_interval=3, eval_interval_tokens=0, max_iters=16) == 0
    assert evaluated_at(out)[-3:] == [12, 15, 16]


def _evaluates_on_two_ranks(rank: int, arguments: list[str]) -> int:
    return train_orchestrated.main(arguments)


def test_two_processes_keep_the_same_rhythm(tiny, data, tmp_path):
    from conftest import arguments

    _, one = tiny(BATCH, eval_interval_tokens=300, save_interval_tokens=500)
    given = arguments(
        data, tmp_path / "two", schedule=tmp_path / "run.json", eval_interval_tokens=300, save_interval_tokens=500
    )
    # The same global batch: a micro-step of each rank is one of the two.
    assert on_ranks(_evaluates_on_two_ranks, given) == [0, 0]
    assert evaluated_at(tmp_path / "two") == evaluated_at(one) and saved_at(tmp_path / "two") == saved_at(one)


def test_keep_every_keeps_the_first_of_each_span(tiny):
    """Saved at 2, 4, ... 12: 6 is the first at or after 5, 10 is itself; 2 and 4 come before the first multiple."""
    _, out = tiny(save_interval=2, eval_interval=1000, keep_every=5, keep_last=1, keep_best=0)
    assert [read(path).iter for path in checkpoint.find(out)] == [12, 10, 6]


# ---------------------------------------------------------------------------------------------- the best


def recorded(out, name: str = "best") -> float:
    return json.loads((out / "checkpoints" / name / "manifest.json").read_text())["val_loss"]


def evaluated(out, resume, capsys, name: str) -> str:
    capsys.readouterr()
    assert resume(out, eval_only=True, checkpoint=name) == 0
    return capsys.readouterr().out


def test_the_best_checkpoint_has_its_recorded_loss_to_the_last_bit(tiny, resume, capsys):
    """The rate is far too high at last, so that the best is not the latest."""
    schedule = [{"name": "set_lr", "value": 3.0, "at_iter": 9}]
    _, out = tiny(schedule, eval_interval=2, keep_last=1, keep_best=2, weight_decay=0.0, grad_clip=0.0, decay_lr=False)
    losses = {m["iter"]: m["val_loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"}
    best = min(losses.values())
    assert recorded(out) == best == events(out, "end")[0]["best_val_loss"] != losses[12]
    said = evaluated(out, resume, capsys, "best")
    assert f"val loss {best!r} equals what the checkpoint recorded" in said
    kept = sorted(m.val_loss for m in map(read, checkpoint.find(out)) if m.iter != 12)
    assert kept == sorted(losses.values())[:2]
    said = evaluated(out, resume, capsys, f"iter_{12:09d}")
    assert f"val loss {losses[12]!r} equals" in said and "at iteration 12" in said


@pytest.mark.parametrize(
    "entries, keys",
    [
        ([{"name": "drop_layers", "value": [0]}], {}),
        ([{"name": "set_eval_iters", "value": 1}, {"name": "set_lr", "value": 1e-3}], {}),
        ([{"name": "stack_layers", "value": [1, 0]}], {}),
        ([{"name": "widen_mlp", "value": {"times": 2, "how": "random"}, "over": 3}], {}),
        ([{"name": "freeze_layer", "value": "block.0"}], {"weights_dtype": "bfloat16"}),
    ],
    ids=lambda value: value[0]["name"] if isinstance(value, list) else None,
)
def test_a_loss_is_recorded_of_the_weights_that_it_was_measured_on(tiny, resume, capsys, entries, keys):
    """The loss at 4 is the best so far, and an entry of that boundary changes what was measured; at 8 nothing does."""
    _, out = tiny([{**entry, "at_iter": 4} for entry in entries], eval_interval=4, max_iters=8, keep_last=9, **keys)
    kept = {path.name: read(path).val_loss for path in checkpoint.find(out)}
    losses = {m["iter"]: m["val_loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"}
    assert kept == {
        "iter_000000008": losses[8],
        "iter_000000004": None,
        "iter_000000004_before_entry_1": losses[4],
    }
    for name, loss in kept.items():
        said = evaluated(out, resume, capsys, name)
        assert ("what the checkpoint recorded" in said) == (loss is not None) and "differs" not in said


def test_a_checkpoint_before_an_entry_is_not_the_first_of_its_span(tiny):
    _, out = tiny([{"name": "drop_layers", "value": [0], "at_iter": 4}], keep_every=3, keep_last=1, keep_best=0)
    assert [path.name for path in checkpoint.find(out)] == [f"iter_{n:09d}" for n in (12, 8, 4)]


def test_nothing_is_kept_before_an_entry_that_leaves_the_loss_as_it_is(tiny):
    _, out = tiny([{"name": "set_lr", "value": 1e-3, "at_iter": 4}], eval_interval=4, max_iters=5, keep_last=9)
    assert [path.name for path in checkpoint.find(out)] == ["iter_000000005", "iter_000000004"]
    assert recorded(out, "iter_000000004") is not None


def test_nothing_is_kept_before_an_entry_where_there_is_no_best_of_this_boundary(tiny):
    _, out = tiny([{"name": "drop_layers", "value": [0], "at_iter": 5}], eval_interval=4, max_iters=8, keep_last=9)
    assert [path.name for path in checkpoint.find(out)] == ["iter_000000008", "iter_000000004"]


def test_other_checkpoints_are_for_evaluation_alone(tiny, resume):
    _, out = tiny(max_iters=4)
    with pytest.raises(Refused, match="checkpoint 'best' is for eval_only with init_from=resume"):
        resume(out, checkpoint="best")
    with pytest.raises(Refused, match=re.escape("there is no checkpoint 'iter_7'; there are iter_000000004")):
        resume(out, eval_only=True, checkpoint="iter_7")


def test_early_stopping_goes_on_over_a_resume(tiny, resume):
    """No gain is large enough, so the fourth evaluation ends the run; a count that began anew would end it at 20."""
    keys = {"early_stopping_patience": 3, "early_stopping_min_delta": 9.0, "max_iters": 100}
    with pytest.MonkeyPatch.context() as patched:
        killed_at(5, patched)
        assert tiny(**keys)[0] == 143
    out = tiny.folder("run")
    assert resume(out) == 0
    end = events(out, "end")[-1]
    assert (end["iter"], end["reason"]) == (12, "early stop: no gain in 3 evaluations")
