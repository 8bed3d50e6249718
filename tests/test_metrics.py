"""Metrics by name: what triggers, guards and early stopping look at, and what the orchestrator remembers of them."""

from __future__ import annotations

import copy
import inspect
import json
import math

import pytest
from conftest import arguments, events, lines, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import start

import train_orchestrated
from orchestrate.training.operations.base import Machine, Peers
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.dry import Alone, DryRun
from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.schedule.orchestrator import Host, Orchestrator, Steerable
from orchestrate.training.session.session import Session
from orchestrate.training.settings import metrics
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Progress, Settings

NULL_ON_A_CPU = {"machine.device_memory", "machine.device_memory_peak", "machine.gpu_percent"}


class Driven(DryRun):
    """A dry run that can go back, with its orchestrator, driven boundary by boundary."""

    def __init__(self, entries: list[dict]) -> None:
        super().__init__(start(), Progress.start(start()))
        self.saved: dict[str, tuple] = {}
        self.cut = False  # whether a signal cuts measurements short
        self.orchestrator = Orchestrator(parse_schedule(json.dumps(entries), "s.json"), self, self)

    def save(self, why: str, *, mark: str = "") -> str:
        name = f"iter_{self.progress.iter:09d}{mark}"
        self.saved[name] = (self.settings, copy.copy(self.progress), json.dumps(self.orchestrator.state()))
        return name

    def event(self, kind: str, **fields) -> None:
        super().event(kind, **{key: value for key, value in fields.items() if key != "seconds"})  # a real clock's

    def measure(self, why: str) -> float | None:
        self.event("measure", why=why)
        return None if self.cut else self.loss

    def go_back(self, name: str) -> dict:
        self.settings, progress, state = self.saved[name]
        self.progress.__dict__.update(progress.__dict__)
        return json.loads(state)

    def boundary(self, iters: int = 1, val_loss: float | None = None, clock: bool = False, **logged: float) -> list:
        """So many iterations later; returns what fired there, as (entry, reason)."""
        self.progress.iter += iters
        told = len(self.events)
        if logged:
            self.orchestrator.observe({name.replace("__", "."): value for name, value in logged.items()})
        self.orchestrator.consult(val_loss, look_at_clock=clock)
        return [(f["entry"], f["reason"]) for _, kind, f in self.events[told:] if kind == "operation"]

    def reasons(self, kind: str) -> list[str]:
        return [f["reason"] for _, k, f in self.events if k == kind]


def clip(value: float = 0.5, **fields) -> dict:
    return {"name": "set_grad_clip", "value": value, **fields}


def on(metric: str, **condition) -> dict:
    return {"trigger": {"metric": metric, **condition}}


# ---------------------------------------------------------------------------------------------- names


def test_the_names_are_those_of_a_line_of_metrics(tiny):
    _, out = tiny(max_iters=2)
    train = next(line for line in lines(out / "metrics.jsonl") if line["kind"] == "train")
    found = set(metrics.numbers(train)) - {"iter", "tokens", "seconds"}
    assert found == set(metrics.LOGGED) - NULL_ON_A_CPU and len(set(metrics.NAMES)) == len(metrics.NAMES)
    assert {f"machine.{name}" for name, value in train["machine"].items() if value is None} == NULL_ON_A_CPU
    assert set(metrics.ON_FIRST_RANK) < set(metrics.LOGGED)


def test_numbers_of_a_line():
    line = {"kind": "train", "loss": 2, "flag": True, "none": None, "machine": {"a": 1.5, "b": None}}
    assert metrics.numbers(line) == {"loss": 2, "machine.a": 1.5}


# ---------------------------------------------------------------------------------------------- triggers


def test_a_value_counts_where_it_was_logged_and_nowhere_later():
    run = Driven([clip(**on("grad_norm", below=0.1)), clip(0.6, at_iter=2), clip(0.7, **on("grad_norm", below=0.2))])
    assert run.boundary(grad_norm=0.11) == []
    assert run.boundary(grad_norm=0.1) == [(1, "grad_norm 0.1 <= 0.1"), (2, "iteration 2 (at_iter 2)"),
                                            (3, "grad_norm 0.1 <= 0.2")]  # fmt: skip
    run = Driven([clip(at_iter=2), clip(0.7, **on("grad_norm", below=0.2))])
    assert run.boundary(grad_norm=0.1) == []
    assert run.boundary() == [(1, "iteration 2 (at_iter 2)")], "the value is that of iteration 1"
    assert run.boundary(loss=0.1) == [] and run.boundary(grad_norm=0.2) == [(2, "grad_norm 0.2 <= 0.2")]


def test_a_plateau_counts_the_values_since_its_entry_is_the_head():
    plateau = {"evals": 2, "min_delta": 0.1}
    run = Driven([clip(**on("loss", plateau=plateau)), clip(0.6, **on("loss", plateau=plateau))])
    fired = [run.boundary(iters=5, loss=loss) for loss in (3.0, 2.0, 2.05, 1.95, 1.5, 1.95, 1.45)]
    assert fired == [[], [], [], [(1, "plateau of loss: 1.9500 in 2 values, 2.0000 before (min_delta 0.1)")], [], [],
                     [(2, "plateau of loss: 1.4500 in 2 values, 1.5000 before (min_delta 0.1)")]]  # fmt: skip
    assert run.boundary(val_loss=1.0) == []


def test_a_long_wait_keeps_what_a_plateau_needs_and_no_more():
    """20000 falling values; the decision is that of the whole history."""
    run = Driven([clip(**on("loss", plateau={"evals": 3, "min_delta": 0.5}), trigger_loss=-1.0)])
    values = [9.0, 1.0, *(5.0 - i for i in range(200)), -194.2, -194.3, -194.4]
    fired = [run.boundary(loss=value) for value in values]
    whole = [len(h) > 3 and min(h[-3:]) > min(h[:-3]) - 0.5 for h in (values[: n + 1] for n in range(len(values)))]
    first = whole.index(True)
    assert [bool(f) for f in fired] == [n == first for n in range(len(values))] and first == 4
    run = Driven([clip(**on("loss", plateau={"evals": 3, "min_delta": 0.5}))])
    for i in range(100):
        run.boundary(loss=float(-i))
    assert run.orchestrator.position.queues[""].history == {"loss": (-96.0, -97.0, -98.0, -99.0)}
    # Where the entry may not fire yet, its guard's metric being unknown, the lowest value is not forgotten.
    run = Driven([guarded(**on("loss", plateau={"evals": 2, "min_delta": 0.5}))])
    for loss in (5.0, 1.0, 4.0, 3.0, 2.0):
        assert run.boundary(loss=loss) == []
    assert run.orchestrator.position.queues[""].history == {"loss": (1.0, 3.0, 2.0)}
    reason = "plateau of loss: 1.5000 in 2 values, 1.0000 before (min_delta 0.5)"
    assert run.boundary(loss=1.5, grad_norm=1.0) == [(1, reason)]


def test_only_what_pending_entries_ask_for_is_remembered():
    run = Driven([clip(**on("lr", below=1.0)), clip(0.6, guard={"metric": "grad_norm", "max_increase": 1.0})])
    assert run.orchestrator.asked == {"lr", "grad_norm"}
    run.boundary(loss=3.0, lr=2.0, grad_norm=math.inf)
    assert run.orchestrator.position.latest == {"lr": (1, 2.0), "grad_norm": (1, None)}
    run.boundary(lr=0.5)
    assert run.orchestrator.asked == {"grad_norm"} and run.orchestrator.position.queues[""].history == {}
    run.boundary(grad_norm=2.0)
    assert run.orchestrator.position.latest == {"grad_norm": (3, 2.0)}


# ---------------------------------------------------------------------------------------------- guards


def guarded(then: str = "keep", within: int = 4, **fields) -> dict:
    return clip(guard={"metric": "grad_norm", "max_increase": 0.5, "within_iters": within, "then": then}, **fields)


def test_a_guards_metric_must_have_a_value_before_its_entry_fires():
    run = Driven([guarded(at_iter=1)])
    assert run.boundary() == [] and run.boundary(loss=1.0) == [] and run.boundary(grad_norm=math.nan) == []
    assert run.boundary(grad_norm=2.0) == [(1, "iteration 4 (at_iter 1)")]
    (watch,) = run.orchestrator.position.watches
    assert (watch.before, watch.limit, watch.until_iter, watch.metric) == (2.0, 2.5, 8, "grad_norm")


@pytest.mark.parametrize("value, beyond", [(2.5, False), (2.51, True), (math.nan, True), (math.inf, True)])
def test_a_guard_looks_at_every_value_of_its_metric(value, beyond):
    run = Driven([guarded("stop", at_iter=3)])
    run.boundary(grad_norm=2.0)
    assert run.boundary(iters=2) != [], "the value before the entry is the latest, of whatever iteration"
    run.boundary(val_loss=99.0)
    run.boundary(grad_norm=value)
    assert run.reasons("decision")[1:] == (["guard: grad_norm is beyond the limit (stop)"] if beyond else [])
    assert run.settings.stops_asked == int(beyond)
    run.boundary(iters=2)
    run.boundary(grad_norm=2.4)
    assert run.reasons("decision")[1:] == [
        "guard: grad_norm is beyond the limit (stop)" if beyond else "guard: grad_norm stayed within the limit (stop)"
    ], "the first value at or after the end of the window is the last"
    assert run.orchestrator.position.watches == ()


def test_a_guard_on_a_logged_metric_goes_back():
    run = Driven([guarded("revert", at_iter=2), clip(0.7, max_wait_iters=3)])
    run.boundary(grad_norm=2.0)
    assert run.boundary() == [(1, "iteration 2 (at_iter 2)")] and run.settings.grad_clip == 0.5
    run.boundary(grad_norm=2.6)
    assert run.reasons("rollback") == ["guard: grad_norm 2.6 > 2.5"] and run.settings.grad_clip == 1.0
    told = run.events[-1][2]
    assert (told["grad_norm_before"], told["grad_norm"], told["from_iter"], run.progress.iter) == (2.0, 2.6, 3, 2)
    assert run.orchestrator.position.reverted == (1,)
    assert [run.boundary() for _ in range(3)] == [[], [], [(2, "waited 3 iterations (max_wait_iters 3)")]]


def test_guards_on_two_metrics_beside_each_other():
    """Each sees its own numbers; only the one on val_loss is measured at its end."""
    both = clip(0.6, guard={"max_increase": 0.5, "within_iters": 2, "then": "keep"})
    run = Driven([guarded(at_iter=1, within=3), both])
    run.loss = 3.0
    run.boundary(grad_norm=2.0)
    assert [(w.metric, w.before) for w in run.orchestrator.position.watches] == [("grad_norm", 2.0), ("val_loss", 3.0)]
    run.loss = 3.6
    run.boundary(grad_norm=2.0)
    run.boundary()
    assert run.reasons("decision")[2:] == ["guard: the loss is beyond the limit (keep)"]
    run.boundary(grad_norm=2.0)
    assert run.reasons("decision")[3:] == ["guard: grad_norm stayed within the limit (keep)"]


def test_a_whole_run_goes_back_where_its_training_loss_jumps(tiny):
    """A rate of 3 from iteration 5 on spoils the losses after it; lines come at 3, 6 and 9, evaluations never."""
    entry = {"name": "set_lr", "value": 3.0, "at_iter": 5, "guard": {"metric": "loss", "max_increase": 0.2}}
    code, out = tiny([entry], log_interval=3, eval_interval=100, max_iters=12)
    (back,) = events(out, "rollback")
    logged = {m["iter"]: m for m in lines(out / "metrics.jsonl") if m["kind"] == "train" and m.get("void")}
    assert code == 0 and (back["iter"], back["from_iter"]) == (5, 9) and sorted(logged) == [6, 9]
    (before,) = [m["loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "train" and m["iter"] == 3]
    assert (back["loss_before"], back["loss"]) == (before, logged[9]["loss"])
    assert logged[6]["loss"] <= before + 0.2 < logged[9]["loss"] and not events(out, "operation")


# ---------------------------------------------------------------------------------------------- early stopping


def test_early_stopping_on_a_logged_metric(tiny, resume):
    """Gains of less than 9 do not count: the first value is the best, and the third after it ends the run."""
    keys = {"early_stopping_patience": 3, "early_stopping_min_delta": 9.0, "log_interval": 2}
    code, out = tiny(max_iters=100, early_stopping_metric="loss", **keys)
    (end,) = events(out, "end")
    assert (code, end["iter"], end["reason"]) == (0, 8, "early stop: no gain in 3 values of loss")
    progress = json.loads((out / "checkpoints/latest/state.json").read_text())["progress"]
    first = next(m for m in lines(out / "metrics.jsonl") if m["kind"] == "train")
    assert (progress["stopping_best"], progress["evals_without_gain"]) == (first["loss"], 3)
    # Another metric on resume is counted from its first value on: evaluations at 12, 16, 20 and 24.
    assert resume(out, early_stopping_metric="val_loss") == 0
    assert (events(out, "end")[-1]["iter"], events(out, "end")[-1]["reason"]) == (
        24,
        "early stop: no gain in 3 evaluations",
    )


def test_early_stopping_knows_its_metrics(tiny):
    with pytest.raises(
        Refused, match=r"--early_stopping_metric: early_stopping_metric must be the name of a metric \(did"
    ):
        tiny(early_stopping_metric="grad_nrm")


# ---------------------------------------------------------------------------------------------- on two ranks


SCHEDULE = [
    {"name": "set_lr", "value": 5e-3, **on("tokens_per_second", above=1.0)},
    {"name": "set_grad_clip", "value": 0.5, **on("machine.host_memory", above=1.0), "max_wait_iters": 5},
    {"name": "set_dropout", "value": 0.1, **on("loss", below=99.0), "guard": {
        "metric": "seconds_by_part.forward_backward", "max_increase": 1e9, "within_iters": 2}},
    {"name": "set_weight_decay", "value": 0.0, **on("grad_norm", plateau={"evals": 1, "min_delta": 99.0})},
]  # fmt: skip


def _numbers_that_differ(rank: int, data: str, out: str, schedule: str) -> tuple:
    """Rank 1's clock and machine would never fire anything."""
    seen = []
    observe, look = Orchestrator.observe, Session._look_at

    def look_at(self, logged):
        if rank == 1:
            logged |= {name: -1.0 for name in metrics.ON_FIRST_RANK if name in logged}
        look(self, logged)

    def noted(self, logged):
        seen.append(sorted(logged))
        observe(self, logged)

    Session._look_at, Orchestrator.observe = look_at, noted
    keys = {"schedule": schedule, "early_stopping_metric": "seconds_by_part.optimizer", "early_stopping_patience": 50}
    code = train_orchestrated.main(arguments(data, out, max_iters=6, eval_interval=100, **keys))
    return code, seen


def test_ranks_whose_numbers_differ_decide_as_rank_0(data, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEDULE))
    one, other = on_ranks(_numbers_that_differ, str(data), str(tmp_path / "run"), str(tmp_path / "s.json"))
    assert one == other and one[0] == 0
    fired = [(e["entry"], e["iter"]) for e in events(tmp_path / "run", "operation")]
    assert fired == [(1, 1), (2, 1), (3, 1), (4, 3)], "a plateau of 1 value needs two, of iterations 2 and 3"
    decided = [e["reason"] for e in events(tmp_path / "run", "decision")]
    assert "guard: seconds_by_part.forward_backward stayed within the limit (revert)" in decided
    assert one[1][-1] == ["seconds_by_part.optimizer"], "what nobody asks for does not travel"


# ---------------------------------------------------------------------------------------------- state


def test_a_state_is_all_that_is_known():
    """At every boundary a second orchestrator takes over what the first has saved, and fires what it would have."""
    entries = [
        clip(**on("loss", plateau={"evals": 2, "min_delta": 0.1})),
        clip(0.6, **on("grad_norm", below=0.5), guard={"metric": "loss", "max_increase": 0.1, "then": "keep"}),
        clip(0.7, trigger_plateau={"evals": 1, "min_delta": 0.1}),
    ]
    values = [2.0, 1.5, 1.45, 1.44, 1.43, 1.9, 1.3, 1.3, 1.3, 1.3]
    whole, broken = Driven(entries), Driven(entries)
    for i, value in enumerate(values):
        for run in (whole, broken):
            fields = {"grad_norm": value - 1.0, "loss": value}
            run.progress.iter += 1
            run.orchestrator.observe(fields)
            if run is broken:  # ends right after the line of metrics, before the round
                state = json.loads(json.dumps(run.orchestrator.state(), allow_nan=False))
                run.orchestrator = Orchestrator(run.orchestrator.schedule, run, run)
                run.orchestrator.load_state(state)
            run.orchestrator.consult(value if i % 2 else None, look_at_clock=True)
    assert whole.events == broken.events and len(whole.reasons("operation")) == 3
    assert whole.orchestrator.state() == broken.orchestrator.state()


def test_a_state_of_an_earlier_version_is_read():
    run = Driven([clip(), clip(0.6, trigger_plateau={"evals": 2, "min_delta": 0.1})])
    position = {
        "fired": 1, "since_iter": 3, "since_tokens": 0, "since_seconds": 0.0, "losses": [2.0, 1.0], "round_loss": None,
        "round_open": False, "round_iter": 9, "loss_before": None, "owes_measure": False, "skipped": [], "reverted": [],
        "watches": [{"entry": 1, "name": "set_grad_clip", "loss_before": 1.0, "limit": 1.5, "until_iter": 12,
                     "then": "keep", "checkpoint": ""}],
    }  # fmt: skip
    run.orchestrator.load_state({"position": position, "ramps": []})
    (watch,) = run.orchestrator.position.watches
    assert (watch.before, watch.metric) == (1.0, "val_loss")
    assert run.boundary(iters=10, val_loss=0.99) == []
    assert run.boundary(val_loss=0.98) == [(2, "plateau: 0.9800 in 2 evaluations, 1.0000 before (min_delta 0.1)")]
    for wrong in (
        5,
        {"watches": 3},
        {"watches": [3]},
        {"latest": {"loss": 1.0}},
        {"losses": 3},
        {"history": {"loss": 1}},
    ):
        with pytest.raises(ValueError):
            run.orchestrator.load_state({"position": wrong, "ramps": []})


# ---------------------------------------------------------------------------------------------- acts


ENTRIES = st.lists(
    st.sampled_from(
        [
            clip(),
            clip(0.25, at_iter=3),
            clip(2.0, max_wait_iters=2, over=3),
            clip(0.6, trigger_loss=1.5, reevaluate=True),
            clip(0.7, max_wait_seconds=2.0),
            clip(0.8, **on("loss", below=1.5)),
            clip(0.9, **on("grad_norm", above=1.5), guard={"metric": "loss", "max_increase": 0.2, "within_iters": 3}),
            clip(1.1, **on("loss", plateau={"evals": 1, "min_delta": 0.1}), max_wait_iters=6),
            clip(1.2, trigger_plateau={"evals": 1}, guard={"max_increase": 0.1, "within_iters": 2}),
            clip(1.3, at_iter=5, guard={"max_increase": 0.1, "within_iters": 3, "then": "stop"}),
            {"name": "stack_layers", "value": {"n_layer": 6}, "at_iter": 2, "over": 3, "on_error": "skip"},
            {"name": "adjust_batch_size", "value": 0.5, "at_iter": 4},
            {"name": "merge_lora_weights", "on_error": "skip"},
        ]
    ),
    max_size=6,
)
NUMBER = st.sampled_from([None, 1.0, 1.4, 1.6, 2.0, math.nan])
BOUNDARIES = st.lists(st.tuples(st.booleans(), NUMBER, NUMBER, NUMBER, st.booleans()), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(ENTRIES, BOUNDARIES)
def test_nothing_happens_where_it_cannot_act(entries, boundaries):
    """A run that is consulted only where it acts goes exactly as one that holds every round."""
    careful, thorough = Driven(entries), Driven(entries)
    thorough.orchestrator.acts = lambda evaluated, look_at_clock: True
    for again, val_loss, loss, grad_norm, interrupted in boundaries:
        logged = {name: v for name, v in (("loss", loss), ("grad_norm", grad_norm)) if v is not None}
        finite_loss = None if val_loss is None or math.isnan(val_loss) else val_loss
        for run in (careful, thorough):
            run.progress.iter += 1
            run.progress.tokens, run.progress.seconds = 10 * run.progress.iter, 0.9 * run.progress.iter
            run.loss, run.cut = 1.5, interrupted
            if logged:
                run.orchestrator.observe(logged)
            for _ in range(1 + again):
                before = run.orchestrator.state(), run.settings, len(run.events)
                acts = run.orchestrator.acts(finite_loss is not None, bool(logged))
                assert (run.orchestrator.state(), run.settings, len(run.events)) == before, "it is pure"
                if acts:
                    run.orchestrator.consult(finite_loss, look_at_clock=bool(logged))
    assert json.dumps(careful.events) == json.dumps(thorough.events) and careful.settings == thorough.settings
    states = [run.orchestrator.state() for run in (careful, thorough)]
    for state in states:
        state["position"].pop("round_iter")
    assert states[0] == states[1]


def test_a_measurement_that_is_owed_is_something_to_do():
    run = Driven([clip(reevaluate=True)])
    run.cut = True
    assert run.boundary(val_loss=2.0) and run.orchestrator.acts(False, False)
    run.cut = False
    run.boundary()
    assert not run.orchestrator.acts(False, False) and [kind for _, kind, _ in run.events].count("measure") == 2


def test_an_open_round_is_something_to_do():
    """A signal came between two entries that see the same loss, which only the position knows by now."""
    run = Driven([clip(trigger_loss=2.0), clip(0.6, trigger_loss=2.0, reevaluate=True)])
    run.cut = True
    assert run.boundary(val_loss=1.9) == [(1, "val loss 1.9000 <= 2")]
    run.cut = False
    assert run.orchestrator.acts(False, False)
    assert run.boundary(iters=0) == [(2, "val loss 1.9000 <= 2")] and not run.orchestrator.acts(False, False)


def test_a_waiting_schedule_does_not_act():
    run = Driven([clip(at_iter=9, trigger_loss=1.0, max_wait_seconds=5.0, **on("loss", below=1.0))])
    acts = run.orchestrator.acts
    assert not acts(False, False) and acts(True, False) and acts(False, True)
    run.orchestrator.observe({"loss": 1.5})
    assert not acts(False, False)
    run.orchestrator.observe({"loss": 0.5})
    assert acts(False, False)
    run.progress.iter = 1
    assert not acts(False, False)
    run.progress.iter = 9
    assert acts(False, False) and run.boundary(iters=0) and not acts(True, True), "the round has been held"
    run.progress.iter = 10
    assert not acts(False, True), "nothing is pending"


# ---------------------------------------------------------------------------------------------- protocols


def members(protocol: type) -> dict[str, object]:
    return {
        name: member
        for cls in protocol.__mro__
        if cls.__module__.startswith("orchestrate")
        for name, member in vars(cls).items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    "protocol, implementation",
    [
        (Machine, Run),
        (Steerable, Run),
        (Steerable, DryRun),
        (Host, Session),
        (Host, DryRun),
        (Peers, Ranks),
        (Peers, Alone),
    ],
)
def test_protocols_are_what_their_implementations_are(protocol, implementation):
    """Methods with the same arguments; attributes by what is set at the start."""
    wanted, source = members(protocol), inspect.getsource(implementation)
    assert wanted
    for name, member in wanted.items():
        if isinstance(member, property):
            assert hasattr(implementation, name) or f"self.{name}" in source, name
            continue
        theirs = inspect.signature(getattr(implementation, name)).parameters
        for parameter in inspect.signature(member).parameters:
            assert parameter in theirs, f"{implementation.__name__}.{name} lacks {parameter}"


def test_a_dry_run_follows_settings():
    dry = DryRun(start(), Progress.start(start()))
    assert isinstance(dry.settings, Settings) and dry.largest_batch(0.5, range(1, 9)) == dry.settings.batch_size
    dry.adopt(start(batch_size=3))
    assert dry.settings.batch_size == 3 and dry.ranks.gather(1) == [1] and dry.ranks.broadcast(2) == 2
