"""Guarded entries: an entry that hurts is taken back, and the run goes on as if it had not been there."""

from __future__ import annotations

import json

import pytest
from conftest import assert_same_tensors, events, lines, tensors

from orchestrate.training.session.session import Session
from orchestrate.training.store.checkpoint import find

HURTS = {"name": "set_lr", "value": 3.0, "at_iter": 5}
LATER = {"name": "set_grad_accum", "value": 4, "max_wait_iters": 3}


def guard(then: str, within: int = 4, increase: float = 0.05) -> dict:
    return {"max_increase": increase, "within_iters": within, "then": then}


def live_metrics(out_dir, kind):
    return [m for m in lines(out_dir / "metrics.jsonl") if m["kind"] == kind and not m.get("void")]


def test_revert_goes_back_and_on_with_the_next_samples(tiny):
    code, out = tiny([{**HURTS, "guard": guard("revert")}, LATER], max_iters=16, keep_last=1)
    assert code == 0
    (back,) = events(out, "rollback")
    assert back["entry"] == 1 and back["iter"] == 5 and back["from_iter"] == 8
    assert back["val_loss"] > back["val_loss_before"] + 0.05
    fired = [(e["entry"], e["iter"]) for e in events(out, "operation")]
    assert fired == [(2, 8)], "entry 1 counts as not fired, entry 2 waits from the return on"
    # What was taken back is marked; what counts is every iteration once.
    all_lines = lines(out / "metrics.jsonl")
    assert [m["iter"] for m in live_metrics(out, "train")] == list(range(1, 17))
    assert [m["iter"] for m in all_lines if m.get("void") and m["kind"] == "train"] == [6, 7, 8]
    assert max(m["lr"] for m in live_metrics(out, "train")) <= 1e-2
    # Samples of the way that was left are not seen again: 3 iterations of 8 sequences were lost.
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["progress"]["iter"] == 16
    assert state["progress"]["cursor"]["sample"] == 8 * 8 + 3 * 8 + 8 * 16
    assert state["orchestrator"]["position"]["reverted"] == [1]
    assert all(path.name <= "iter_000000016" for path in find(out))


def test_an_evaluation_at_the_same_boundary_does_not_replace_what_the_guard_goes_back_to(tiny):
    """Iteration 8 is evaluated and saved twice: before the entry for the guard, and after it because it is the best."""
    code, out = tiny([{**HURTS, "at_iter": 8, "guard": guard("revert", within=2)}])
    assert code == 0
    saved = [e["path"] for e in lines(out / "events.jsonl") if e["kind"] == "checkpoint" and e["iter"] == 8]
    assert saved[:2] == ["checkpoints/iter_000000008_before_entry_1", "checkpoints/iter_000000008"]
    (back,) = events(out, "rollback")
    assert (back["iter"], back["from_iter"]) == (8, 10)
    assert not events(out, "operation") and events(out, "end")[0]["best_val_loss"] < 3
    assert max(m["lr"] for m in live_metrics(out, "train")) <= 1e-2
    assert find(out)[0].name == "iter_000000012"


def test_a_loss_within_the_limit_keeps_the_entry(tiny):
    harmless = {"name": "set_lr", "value": 5e-3, "at_iter": 5, "guard": guard("revert", within=3, increase=1.0)}
    _, out = tiny([harmless])
    assert not events(out, "rollback") and [e["entry"] for e in events(out, "operation")] == [1]
    reasons = [e["reason"] for e in events(out, "decision")]
    assert reasons[-1] == "guard: the loss stayed within the limit (revert)"
    assert [m["iter"] for m in live_metrics(out, "eval")].count(8) == 1, "iteration 8 is measured once, for both"


@pytest.mark.parametrize("then, last", [("keep", 12), ("stop", 8)])
def test_keep_and_stop(tiny, then, last):
    code, out = tiny([{**HURTS, "guard": guard(then)}])
    assert code == 0
    assert events(out, "end")[0]["iter"] == last
    assert events(out, "decision")[-1]["reason"] == f"guard: the loss is beyond the limit ({then})"
    assert not events(out, "rollback")


def test_the_window_ends_with_a_measurement_of_its_own(tiny):
    _, out = tiny([{**HURTS, "guard": guard("revert", within=2)}], eval_interval=12)
    assert events(out, "rollback")[0]["from_iter"] == 7


def test_growth_is_taken_back_with_its_shape(tiny):
    stack = {"n_layer": 3, "how": "copy"}
    grows = {"name": "stack_layers", "value": stack, "at_iter": 5, "guard": guard("revert", 3)}
    _, out = tiny([grows, HURTS, LATER], max_iters=8)
    assert events(out, "rollback")[0]["from_iter"] == 8
    assert len([name for name in tensors(out) if name.endswith("ln_1.weight")]) == 2


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
def test_killed_at_any_save_around_a_guard(tiny, resume, monkeypatch, tmp_path, data, saves):
    """The final weights are those of the run that was never killed."""
    schedule = [{**HURTS, "guard": guard("revert")}, LATER]
    _, whole = tiny(schedule, out="whole")
    assert events(whole, "rollback")
    done, real = [], Session.save

    def dies(self, why, required=True, mark=""):
        name = real(self, why, required, mark)
        done.append(why)
        if len(done) == saves:
            raise KeyboardInterrupt
        return name

    monkeypatch.setattr(Session, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny(schedule, out="killed")
    monkeypatch.undo()
    assert resume(tmp_path / "killed") == 0
    assert_same_tensors(tensors(tmp_path / "killed"), tensors(whole))
    assert len(events(tmp_path / "killed", "rollback")) == 1
    logs = [[(m["kind"], m["iter"], m.get("why")) for m in lines(out / "metrics.jsonl") if not m.get("void")]
            for out in (tmp_path / "killed", whole)]  # fmt: skip
    assert logs[0] == logs[1], "nothing is measured twice"


def test_the_state_before_a_guarded_entry_is_kept_until_its_window_ends(tiny):
    """Checkpoints made in between push out others, not the one that the guard may need."""
    saves = {"name": "save_checkpoint", "max_wait_iters": 1}
    _, out = tiny([{**HURTS, "guard": guard("revert")}, saves, saves], keep_last=1, keep_best=0)
    assert events(out, "rollback")[0]["checkpoint"] == "iter_000000005_before_entry_1"
    assert len(find(out)) == 1, "and no longer than that"
