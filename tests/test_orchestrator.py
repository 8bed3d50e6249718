"""The orchestrator on a live tiny run and a host whose losses and clock are written by hand."""

from __future__ import annotations

import json

import pytest
from conftest import events
from test_operations import live_run

from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.session.session import Session


class Host:
    """What the orchestrator asks for, from a list of losses; remembers what it was told."""

    def __init__(self, losses=()) -> None:
        self.losses, self.told, self.why = list(losses), [], []

    def event(self, kind, **fields):
        self.told.append({"kind": kind, **fields})

    def measure(self, why):
        self.why.append(why)
        return self.losses.pop(0)

    def save(self, why, *, mark=""):
        return f"iter_000000000{mark}"


def orchestrator(data, entries, losses=()) -> Orchestrator:
    return Orchestrator(parse_schedule(json.dumps(entries), "s.json"), live_run(data, steps=0), Host(losses))


def fired(one: Orchestrator) -> list[int]:
    return [event["entry"] for event in one.host.told if event["kind"] == "operation"]


def go(one: Orchestrator, iters: int, loss: float | None = None, clock: bool = False, seconds: float = 0.0) -> None:
    """As if so many iterations had been trained, and a boundary with this loss."""
    p = one.run.progress
    p.iter, p.tokens, p.seconds = p.iter + iters, p.tokens + iters * one.run.settings.tokens_per_iter, seconds
    one.consult(loss, look_at_clock=clock)


# ---------------------------------------------------------------------------------------------- rounds and waits


def test_reevaluate_ends_the_round(tiny):
    """An entry without a trigger behind one fires at the next boundary, not at once."""
    first = {"name": "set_lr", "value": 5e-3, "at_iter": 2}
    for reevaluate, expected in [(True, [2, 3, 3]), (False, [2, 2, 2])]:
        schedule = [
            {**first, "reevaluate": reevaluate},
            {"name": "set_grad_clip", "value": 0.5},
            {"name": "set_dropout", "value": 0.1},
        ]
        _, out = tiny(schedule, out=str(reevaluate), max_iters=4)
        assert [e["iter"] for e in events(out, "operation")] == expected


def test_waits_in_seconds_count_from_the_entry_before(tiny, monkeypatch):
    """A clock of one second an iteration: two waits of three seconds end at 3 and 6."""
    monkeypatch.setattr(
        Session, "tick", lambda self: setattr(self.run.progress, "seconds", 1.0 * self.run.progress.iter)
    )
    waits = [{"name": "set_grad_clip", "value": v, "max_wait_seconds": 3} for v in (0.5, 0.6)]
    _, out = tiny(waits)
    found = [(e["iter"], e["reason"]) for e in events(out, "operation")]
    assert found == [(3, "waited 3.0 s (max_wait_seconds 3)"), (6, "waited 3.0 s (max_wait_seconds 3)")]


def test_every_wait_counts_from_the_entry_before(data):
    """Entry 1 fires at iteration 2; what comes behind it waits from there, in iterations and in tokens of 128 each."""
    one = orchestrator(
        data,
        [
            {"name": "set_grad_clip", "value": 0.5, "at_tokens": 2 * 128},
            {"name": "set_grad_clip", "value": 0.6, "max_wait_iters": 3},
            {"name": "set_grad_clip", "value": 0.7, "max_wait_tokens": 2 * 128 + 1},
            {"name": "set_grad_clip", "value": 0.8, "max_wait_seconds": 1.5},
        ],
    )
    seen = []
    for iteration in range(13):
        go(one, int(iteration > 0), clock=iteration % 2 == 0, seconds=0.4 * iteration)
        seen += [iteration] * (len(fired(one)) - len(seen))
    # 2 + 3 = 5; three iterations are the first with more than 256 tokens; 1.5 s after 3.2 s, seen when looked at.
    assert seen == [2, 5, 8, 12]


def test_the_first_entry_waits_from_the_start(data):
    one = orchestrator(data, [{"name": "set_grad_clip", "value": 0.5, "max_wait_iters": 3}])
    seen = [len(fired(one)) for _ in range(4) if go(one, 1) is None]
    assert seen == [0, 0, 1, 1]


def test_losses_for_a_plateau_are_those_since_the_entry_before(data):
    plateau = {"trigger_plateau": {"evals": 2, "min_delta": 0.1}}
    one = orchestrator(data, [{"name": "set_grad_clip", "value": v, **plateau} for v in (0.5, 0.6)])
    for loss, expected in [(3.0, 0), (2.0, 0), (2.05, 0), (None, 0), (1.95, 1), (1.95, 1), (1.95, 1), (1.94, 2)]:
        go(one, 1, loss)
        assert len(fired(one)) == expected, loss
    reasons = [event["reason"] for event in one.host.told if event["kind"] == "operation"]
    assert reasons[0] == "plateau: 1.9500 in 2 evaluations, 2.0000 before (min_delta 0.1)"


def test_a_loss_is_for_every_entry_of_its_round_and_for_no_later_one(data):
    entries = [{"name": "set_grad_clip", "value": v, "trigger_loss": 2.0} for v in (0.5, 0.6)]
    one = orchestrator(data, [*entries, {"name": "set_lr", "value": 1e-3, "trigger_loss": 1.0, "max_wait_iters": 2}])
    go(one, 1, 2.5)
    assert fired(one) == []
    go(one, 1, 2.0)
    assert fired(one) == [1, 2]
    go(one, 1)
    assert fired(one) == [1, 2]
    go(one, 1)
    assert fired(one) == [1, 2, 3]


def test_one_boundary_is_one_round(data):
    """Consulted again at the same iteration, as after a resume, nothing is counted twice."""
    plateau = {"name": "set_grad_clip", "value": 0.5, "trigger_plateau": {"evals": 1, "min_delta": 0.0}}
    one = orchestrator(data, [plateau])
    for loss in (2.0, 2.0, 2.0):
        go(one, 0, loss)
    assert fired(one) == [] and one.position.queues[""].history == {"val_loss": (2.0,)}
    go(one, 1, 2.1)
    assert fired(one) == [1]


# ---------------------------------------------------------------------------------------------- measurements


def test_what_is_measured_around_an_entry(data):
    """The loss of the boundary where it is that of the model before the entry, else one measured for it."""
    entries = [{"name": "set_grad_clip", "value": v, "reevaluate": True} for v in (0.5, 0.6)]
    one = orchestrator(data, entries, losses=[1.9, 1.8, 1.7])
    go(one, 1, 2.0)
    go(one, 1)
    told = [(e["val_loss_before"], e["val_loss_after"]) for e in one.host.told if e["kind"] == "operation"]
    assert told == [(2.0, 1.9), (1.8, 1.7)]
    assert one.host.why == ["after an operation", "before an operation", "after an operation"]


def test_the_second_entry_of_a_round_is_measured_anew(data):
    """The loss of the boundary is that before entry 1, which changed the model."""
    entries = [{"name": "set_grad_clip", "value": 0.5}, {"name": "set_grad_clip", "value": 0.6, "reevaluate": True}]
    one = orchestrator(data, entries, losses=[1.9, 1.8])
    go(one, 1, 2.0)
    (event,) = [e for e in one.host.told if e["kind"] == "operation" and e["entry"] == 2]
    assert (event["val_loss_before"], event["val_loss_after"]) == (1.9, 1.8)


def test_a_measurement_that_a_signal_cuts_short_is_made_up_for(data):
    """Before the entry: it stays at the head. After it: the next boundary measures first."""
    one = orchestrator(
        data, [{"name": "set_grad_clip", "value": 0.5, "reevaluate": True}], losses=[None, 2.0, None, 1.9]
    )
    go(one, 1)
    assert fired(one) == [] and one.heads
    go(one, 0)
    assert fired(one) == [1] and one.position.owes_measure
    go(one, 1)
    assert not one.position.owes_measure and one.host.losses == []


# ---------------------------------------------------------------------------------------------- guards


def guarded(then: str, within: int = 4, increase: float = 0.5) -> dict:
    guard = {"max_increase": increase, "within_iters": within, "then": then}
    return {"name": "set_grad_clip", "value": 0.5, "at_iter": 1, "guard": guard}


def outcomes(one: Orchestrator) -> list[str]:
    return [e["reason"] for e in one.host.told if e["kind"] == "decision" and e["reason"].startswith("guard")]


@pytest.mark.parametrize("loss, within_limit", [(2.5, True), (2.5001, False), (float("nan"), False)])
def test_a_guards_limit_is_the_loss_before_and_an_absolute_increase(data, loss, within_limit):
    one = orchestrator(data, [guarded("keep")])
    go(one, 1, 2.0)
    (watch,) = one.position.watches
    assert (watch.before, watch.limit, watch.until_iter) == (2.0, 2.5, 5)
    go(one, 2, loss)
    assert outcomes(one) == ([] if within_limit else ["guard: the loss is beyond the limit (keep)"])
    if within_limit:
        go(one, 1)
        assert outcomes(one) == [], "the window is four iterations"
        go(one, 1, 2.5)
        assert outcomes(one) == ["guard: the loss stayed within the limit (keep)"]
    assert one.position.watches == () and one.run.settings.stops_asked == 0


def test_a_guard_that_stops_asks_for_a_stop(data):
    one = orchestrator(data, [guarded("stop")])
    go(one, 1, 2.0)
    go(one, 1, 2.51)
    assert one.run.settings.stops_asked == 1 and outcomes(one) == ["guard: the loss is beyond the limit (stop)"]


def test_the_end_of_a_window_is_measured_where_no_evaluation_falls_on_it(data):
    one = orchestrator(data, [guarded("keep")], losses=[2.0, 2.6])
    go(one, 1)
    go(one, 3)
    assert one.host.why == ["before an operation"]
    go(one, 1)
    assert one.host.why[1:] == ["the end of the guard of entry 1"]
    assert outcomes(one) == ["guard: the loss is beyond the limit (keep)"]


def test_two_guards_are_watched_beside_each_other(data):
    """Each has its own loss before, limit and window."""
    second = {**guarded("keep", within=9, increase=0.1), "value": 0.6, "at_iter": 3}
    one = orchestrator(data, [guarded("keep"), second])
    go(one, 1, 2.0)
    go(one, 2, 2.2)
    assert [(w.entry, w.limit, w.until_iter) for w in one.position.watches] == [
        (1, 2.5, 5),
        (2, pytest.approx(2.3), 12),
    ]
    go(one, 1, 2.4)
    assert [w.entry for w in one.position.watches] == [1]
    go(one, 1, 2.4)
    assert one.position.watches == ()
    assert outcomes(one) == [
        "guard: the loss is beyond the limit (keep)",
        "guard: the loss stayed within the limit (keep)",
    ]


# ---------------------------------------------------------------------------------------------- ramps


def test_a_ramp_moves_at_every_boundary_and_its_end_is_told(data):
    one = orchestrator(data, [{"name": "set_grad_clip", "value": 2.0, "over": 4, "at_iter": 1}])
    assert one.run.settings.grad_clip == 1.0
    seen = []
    for _ in range(6):
        go(one, 1)
        seen.append(one.run.settings.grad_clip)
    assert seen == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0] and one.ramps == []
    (event,) = [e for e in one.host.told if e["kind"] == "operation"]
    assert (event["settings_before"], event["settings_after"]) == ({"grad_clip": 1.0}, {"grad_clip": 2.0})
    assert [e["reason"] for e in one.host.told if e["kind"] == "decision"][-1] == "reached after 4 iterations"


@pytest.mark.parametrize("over", [None, 2])
def test_a_later_entry_takes_a_number_over_from_a_ramp(data, over):
    later = {"name": "set_grad_clip", "value": 1.5, "at_iter": 3, **({"over": over} if over else {})}
    one = orchestrator(data, [{"name": "set_grad_clip", "value": 2.0, "over": 10, "at_iter": 1}, later])
    seen = []
    for _ in range(6):
        go(one, 1)
        seen.append(round(one.run.settings.grad_clip, 6))
    assert seen == [1.0, 1.1, *([1.2, 1.35, 1.5, 1.5] if over else [1.5] * 4)]
    assert "the ramp of grad_clip ends where a later entry takes over" in [e.get("reason") for e in one.host.told]
    (event,) = [e for e in one.host.told if e["kind"] == "operation" and e["entry"] == 2]
    assert event["settings_after"] == {"grad_clip": 1.5}


def test_two_ramps_move_beside_each_other(data):
    one = orchestrator(
        data,
        [
            {"name": "set_grad_clip", "value": 2.0, "over": 4},
            {"name": "set_weight_decay", "value": 0.0, "over": 2, "at_iter": 1},
        ],
    )
    seen = []
    for iteration in range(5):
        go(one, int(iteration > 0))
        seen.append((one.run.settings.grad_clip, round(one.run.settings.weight_decay, 6)))
    assert seen == [(1.0, 0.1), (1.25, 0.1), (1.5, 0.05), (1.75, 0.0), (2.0, 0.0)]
    told = [e for e in one.host.told if e["kind"] == "operation"]
    assert [e["settings_after"] for e in told] == [{"grad_clip": 2.0}, {"weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------- failures and state


def test_an_entry_that_fails_is_skipped_or_ends_the_run(data):
    """Its wait is over either way, and the entry behind it is considered at once."""
    from orchestrate.training.settings.errors import OperationFailed

    bad = {"name": "merge_lora_weights", "at_iter": 1}
    one = orchestrator(data, [{**bad, "on_error": "skip"}, {"name": "set_grad_clip", "value": 0.5}])
    go(one, 1)
    assert one.position.skipped == (1,) and fired(one) == [2] and one.heads == [] and one.missed() == []
    other = orchestrator(data, [bad, {"name": "set_grad_clip", "value": 0.5}])
    with pytest.raises(OperationFailed, match="entry 1 .* failed and the run is as before"):
        go(other, 1)
    assert other.position.fired == {"": 0} and [entry.number for entry in other.missed()] == [1, 2]


def test_its_state_is_all_it_knows(data):
    """A second orchestrator that takes it over goes on in the middle of a wait, a ramp and a guard."""
    entries = [guarded("keep"), {"name": "set_lr", "value": 1e-3, "over": 4}, {"name": "stop", "max_wait_iters": 3}]
    one = orchestrator(data, entries)
    go(one, 1, 2.0)
    go(one, 1)
    state = json.loads(json.dumps(one.state()))
    other = Orchestrator(one.schedule, one.run, Host())
    other.load_state(state)
    assert other.state() == one.state() and other.position == one.position and other.ramps == one.ramps
    go(other, 2)
    assert fired(other) == [3] and one.run.settings.stops_asked == 1
    state["position"]["queues"][""]["fired"] = 4
    with pytest.raises(ValueError, match="4 entries have fired of 3"):
        other.load_state(state)
