"""The orchestrator: a schedule, a position in it, and what has been waited.

At a step boundary `consult` looks at the head of the queue only. Rank 0 decides from numbers that are the same on
every rank; the decision and its reason are broadcast; every rank carries it out and all compare fingerprints. Where no
trigger can possibly hold, the ranks all know it (`acts`) and nothing is exchanged: a waiting schedule costs next to
nothing. Everything it knows is in `state()`, so a resumed run waits on as if it had never stopped. It knows neither
the live run nor the session, only what it asks of them (`Steerable`, `Host`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from operator import or_
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from orchestrate.training.operations.base import Machine
from orchestrate.training.run.casting import Cast
from orchestrate.training.run.changes import Reshape
from orchestrate.training.run.stopwatch import Stopwatch
from orchestrate.training.schedule.file import Entry, Guard, Schedule
from orchestrate.training.schedule.ramps import Ramp
from orchestrate.training.schedule.stages import check_settings
from orchestrate.training.settings.errors import OperationFailed, ScheduleError, Stopped
from orchestrate.training.settings.metrics import VAL_LOSS, MetricName, falling, finite, rises, spoken, told
from orchestrate.training.settings.records import (
    EXACTLY,
    Elapsed,
    Measured,
    Progress,
    Settings,
    differences,
    numbers_in,
    with_field,
)
from orchestrate.training.settings.values import Finite, NonNegativeInt, PositiveInt
from orchestrate.training.store import checkpoint


class Steerable(Machine, Protocol):
    """What the orchestrator asks of the run that it changes (training/run/run.py)."""

    @property
    def progress(self) -> Progress: ...

    @property
    def stopwatch(self) -> Stopwatch: ...

    def adopt(self, target: Settings, reshape: Reshape | None = None) -> Cast:
        """Follow other settings, all or nothing. Raises OperationFailed on every rank."""

    def check_ranks_agree(self, what: str) -> None:
        """Raises RanksDisagree on every rank where the ranks differ."""

    def parameter_counts(self) -> tuple[int, int]:
        """(total, trainable)."""


class Host(Protocol):
    """What the orchestrator asks of the session that it works for (training/session/session.py)."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event."""

    def measure(self, why: str) -> float | None:
        """Make and record an evaluation now; None where a signal cut it short."""

    def save(self, why: str, *, mark: str = "") -> str:
        """Save a checkpoint and return its name, which ends in `mark`."""

    def go_back(self, name: str) -> dict[str, Any]:
        """Become the state of a checkpoint, all but the place in the stream of samples; returns its `state()`."""

    def keep(self, why: str) -> None:
        """After going back, when it is decided how to go on: save that, and drop the way that was left."""


@dataclass(frozen=True)
class Watch:
    """An entry that has fired and is watched by its guard."""

    __pydantic_config__ = EXACTLY

    entry: PositiveInt
    name: str
    before: float
    """The metric right before the entry."""
    limit: float
    until_iter: NonNegativeInt
    then: Literal["revert", "keep", "stop"]
    checkpoint: Annotated[str, Field(pattern=checkpoint.NAME + "|^$")]
    """Name of the checkpoint of the state just before it; empty where there is no going back."""
    metric: MetricName = VAL_LOSS


@dataclass
class Position:
    """Where the head of the queue stands and since when it has waited."""

    __pydantic_config__ = EXACTLY

    fired: NonNegativeInt = 0
    """Entries done with (fired or skipped)."""
    since_iter: int = 0
    since_tokens: int = 0
    since_seconds: float = 0.0
    latest: dict[str, tuple[NonNegativeInt, Finite | None]] = field(default_factory=dict)
    """(iteration, value) of what was logged last, for the metrics that are asked for; None for what is not finite."""
    history: dict[str, tuple[Finite, ...]] = field(default_factory=dict)
    """Values since the head became the head: all of val_loss; of other metrics that its triggers look back on, the
    best of the oldest and then as many as they compare."""
    round_loss: float | None = None
    """The loss of the round under way: a checkpoint between two entries of a chain resumes in the middle of it."""
    round_open: bool = False
    round_iter: int = -1
    """Iteration of the latest round; a resumed run does not hold the same round again."""
    loss_before: float | None = None
    """What was measured right before the head, for a checkpoint made between that and the head's operation."""
    owes_measure: bool = False
    """A signal cut short the evaluation after an operation; a resume makes it."""
    skipped: tuple[int, ...] = ()
    reverted: tuple[int, ...] = ()
    watches: tuple[Watch, ...] = ()

    @classmethod
    def from_json(cls, values: Any) -> Position:
        """Raises ValueError (pydantic's) for what was not saved, by this version or an earlier one."""
        if isinstance(values, dict):
            values = dict(values)
            if "losses" in values:
                values["history"] = {VAL_LOSS: values.pop("losses")}
            if isinstance(watches := values.get("watches"), list):
                values["watches"] = [_present_watch(watch) for watch in watches]
        return TypeAdapter(cls).validate_python(values)


def _present_watch(saved: Any) -> Any:
    """A watch as it is saved today: earlier versions had guards on the validation loss only."""
    if not isinstance(saved, dict) or "loss_before" not in saved:
        return saved
    return {"before" if key == "loss_before" else key: value for key, value in saved.items()}


class Orchestrator:
    """Fires the entries of a schedule on a run. The host may be set later: before the first `consult`."""

    host: Host

    def __init__(self, schedule: Schedule, run: Steerable, host: Host | None = None) -> None:
        self.schedule = schedule
        self.run = run
        if host is not None:
            self.host = host
        self.position = Position()
        self.ramps: list[Ramp] = []
        # What the last N entries ask for, at index N.
        self._asked = list(
            accumulate((entry.metrics for entry in reversed(schedule.entries)), or_, initial=frozenset())
        )

    # ------------------------------------------------------------------------------------------ state

    @property
    def pinned(self) -> set[str]:
        """Checkpoints that a guard may go back to."""
        return {watch.checkpoint for watch in self.position.watches if watch.checkpoint}

    @property
    def head(self) -> Entry | None:
        """The next pending entry."""
        entries = self.schedule.entries
        return entries[self.position.fired] if self.position.fired < len(entries) else None

    def state(self) -> dict[str, Any]:
        return {"position": dataclasses.asdict(self.position), "ramps": [ramp.to_json() for ramp in self.ramps]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises ValueError for what it cannot have returned."""
        self.position = Position.from_json(state["position"])
        self.ramps = [Ramp.from_json(ramp) for ramp in state["ramps"]]
        for ramp in self.ramps:
            try:
                for name, ends in ramp.fields.items():
                    for value in ends:
                        Settings.from_json(with_field(self.run.settings, name, value).to_json())
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"a ramp of {ramp.name} does not fit the settings ({error})") from None
        if self.position.fired > len(self.schedule.entries):
            raise ValueError(f"{self.position.fired} entries have fired of {len(self.schedule.entries)}")

    # ------------------------------------------------------------------------------------------ metrics

    @property
    def asked(self) -> frozenset[str]:
        """Names of the metrics that pending entries and open guards look at; the same on every rank."""
        pending = self._asked[len(self.schedule.entries) - self.position.fired]
        return pending.union(watch.metric for watch in self.position.watches)

    def observe(self, logged: Mapping[str, float]) -> None:
        """Take note of what has just been logged, as far as it is asked for; the next round looks at it.

        Args:
            logged: values by name, equal on every rank, of this iteration.
        """
        position, iteration = self.position, self.run.progress.iter
        asked = self.asked
        position.latest = {name: position.latest[name] for name in position.latest if name in asked}
        looked_back = self._looked_back()
        for name in sorted(asked & logged.keys()):
            value = logged[name]
            position.latest[name] = (iteration, value if finite(value) else None)
            if looked_back.get(name) and finite(value):
                values, compared = (*position.history.get(name, ()), value), looked_back[name]
                if len(values) > compared + 1:
                    values = (min(values[:-compared], key=partial(falling, name)), *values[-compared:])
                position.history[name] = values

    def _looked_back(self) -> dict[str, int]:
        """How many values of each metric the head compares with those before."""
        found: dict[str, int] = {}
        for trigger in self.head.triggers if self.head else ():
            for name, compared in trigger.looks_at.items():
                found[name] = max(compared, found.get(name, 0))
        return found

    def _now(self, val_loss: float | None) -> dict[str, float]:
        """The metrics that have a value of this boundary; one that is not finite is nan."""
        iteration = self.run.progress.iter
        now = {
            name: float("nan") if value is None else value
            for name, (at, value) in self.position.latest.items()
            if at == iteration
        }
        return now if val_loss is None else {**now, VAL_LOSS: val_loss}

    # ------------------------------------------------------------------------------------------ a boundary

    def acts(self, evaluated: bool, look_at_clock: bool) -> bool:
        """Whether a round at this boundary could do anything: where it cannot, `consult` need not be called.

        Pure and without an exchange: the same answer on every rank. True says that something may happen: a clock that
        is looked at is only read in the round.
        """
        position, iteration = self.position, self.run.progress.iter
        if position.owes_measure or position.round_open:
            return True
        if position.round_iter == iteration:
            return False  # it has been held
        if evaluated or self.ramps:
            return True
        now, head = self._now(None), self.head
        for watch in position.watches:
            if watch.metric in now or (watch.metric == VAL_LOSS and iteration >= watch.until_iter):
                return True
        return head is not None and self._may_fire(head, look_at_clock, now)

    def consult(self, val_loss: float | None, look_at_clock: bool) -> None:
        """One round at a step boundary: move the ramps, then fire what is due, in order.

        Args:
            val_loss: of the evaluation just made at this boundary, or None.
            look_at_clock: whether waits in seconds are looked at now; the same on every rank.
        """
        position = self.position
        if not self.acts(val_loss is not None, look_at_clock):
            return
        if position.owes_measure:
            position.owes_measure = self.host.measure("after an operation") is None
        if position.round_iter == self.run.progress.iter and not position.round_open:
            return
        if self.position.watches and not position.round_open and self._look_at_guards(val_loss):
            return
        position.round_iter = self.run.progress.iter
        self._move_ramps()
        if position.round_open:
            # Resumed in the middle of a chain: the entries left in it see what the ones before them saw.
            val_loss = position.round_loss
        elif finite(val_loss):
            position.history[VAL_LOSS] = (*position.history.get(VAL_LOSS, ()), val_loss)
        position.round_open, position.round_loss = True, val_loss
        measured_now = val_loss is not None
        while self.head is not None:
            reason = self._due(self.head, look_at_clock)
            if reason is None:
                break
            outcome = self._fire(self.head, reason, measured_now)
            if outcome == "interrupted":
                return  # the round stays open: a checkpoint made now resumes inside it
            if outcome == "round ends":
                break
            measured_now = False  # the model has changed since that measurement
        position.round_open, position.round_loss = False, None

    def _may_fire(self, entry: Entry, look_at_clock: bool, now: Mapping[str, float]) -> bool:
        """Whether rank 0 may find the entry due: equal inputs give every rank the same answer without an exchange."""
        if entry.operation.renumbers and self.run.settings.fading:
            return False  # layers keep their numbers and sizes while one of them is fading in
        guarded = entry.guard.metric if entry.guard else VAL_LOSS
        if guarded != VAL_LOSS and self.position.latest.get(guarded, (0, None))[1] is None:
            return False  # the guard would have nothing to compare with
        if not entry.triggers or (look_at_clock and any(trigger.reads_clock for trigger in entry.triggers)):
            return True
        elapsed, measured = self._elapsed(seconds=None), Measured(now, self.position.history)
        return any(trigger.fires(elapsed, measured) for trigger in entry.triggers)

    def _due(self, entry: Entry, look_at_clock: bool) -> str | None:
        """Why the entry fires now, or None; rank 0's answer on every rank, exchanged only where it may be a yes."""
        now = self._now(self.position.round_loss)
        if not self._may_fire(entry, look_at_clock, now):
            return None
        if not entry.triggers:
            return "no trigger: at once"
        seconds = self.run.progress.seconds - self.position.since_seconds if look_at_clock else None
        elapsed, measured = self._elapsed(seconds), Measured(now, self.position.history)
        reasons = [reason for trigger in entry.triggers if (reason := trigger.fires(elapsed, measured))]
        return self.run.ranks.broadcast(", ".join(reasons) or None)

    def _elapsed(self, seconds: float | None) -> Elapsed:
        progress, position = self.run.progress, self.position
        return Elapsed(
            iter=progress.iter,
            tokens=progress.tokens,
            iters_waited=progress.iter - position.since_iter,
            tokens_waited=progress.tokens - position.since_tokens,
            seconds_waited=seconds,
        )

    # ------------------------------------------------------------------------------------------ firing

    def _fire(self, entry: Entry, reason: str, measured_now: bool) -> Literal["next", "round ends", "interrupted"]:
        """Carry out one entry, and say how the round goes on."""
        run, host = self.run, self.host
        host.event("decision", entry=entry.number, name=entry.operation.name, reason=reason)
        loss_before = self.position.round_loss if measured_now else self.position.loss_before
        guard = entry.guard
        if (entry.reevaluate or (guard and guard.metric == VAL_LOSS)) and loss_before is None:
            loss_before = self.host.measure("before an operation")
            if loss_before is None:
                return "interrupted"  # by a signal: the entry stays at the head
            self.position.loss_before = loss_before
        snapshot = ""
        if guard and guard.then == "revert":
            # With a name of its own: this boundary may save again, when the entry has fired.
            why = f"before entry {entry.number}, which has a guard"
            snapshot = self.host.save(why, mark=f"_before_entry_{entry.number}")
        elif 0 < run.progress.iter == run.progress.best_iter and self._changes_the_measured(entry):
            self.host.save("best validation loss, before an entry", mark=f"_before_entry_{entry.number}")
        before, goal, started = run.settings, self._settled(), time.perf_counter()
        try:
            with run.stopwatch.part("operation"):
                cast = self._apply(entry)
        except (ScheduleError, OperationFailed) as error:
            self._failed(entry, error)
            return "next"
        run.check_ranks_agree(str(entry))
        if guard:
            value = loss_before if guard.metric == VAL_LOSS else self.position.latest[guard.metric][1]
            self._watch(entry, guard, value, snapshot)
        self._advance()
        seconds = time.perf_counter() - started
        loss_after = self.host.measure("after an operation") if entry.reevaluate else None
        self.position.owes_measure = entry.reevaluate and loss_after is None
        # What other entries' ramps are still moving is not this entry's doing.
        moved = differences(before, run.settings)[0].keys() | differences(goal, self._settled())[0].keys()
        settings_before, settings_after = (
            {name: value for name, value in values.items() if name in moved}
            for values in differences(before, self._settled())
        )
        total, trainable = run.parameter_counts()
        host.event(
            "operation",
            entry=entry.number,
            name=entry.operation.name,
            value=entry.value,
            reason=reason,
            desc=entry.desc,
            over=entry.over,
            settings_before=settings_before,
            settings_after=settings_after,
            val_loss_before=loss_before,
            val_loss_after=loss_after,
            seconds=seconds,
            parameters_total=total,
            parameters_trainable=trainable,
            **({"cast": cast.to_json()} if cast else {}),
        )
        # A stop ends the round too: what follows belongs to whoever goes on from here.
        round_ends = entry.reevaluate or run.settings.stops_asked != before.stops_asked
        if run.settings.checkpoints_asked != before.checkpoints_asked:
            self.position.round_open = not round_ends
            self.host.save("asked for by the schedule")
        return "round ends" if round_ends else "next"

    # ------------------------------------------------------------------------------------------ guards

    def _watch(self, entry: Entry, guard: Guard, before: float | None, snapshot: str) -> None:
        assert before is not None
        watch = Watch(
            entry.number,
            entry.operation.name,
            before,
            before - guard.max_decrease if rises(guard.metric) else before + guard.max_increase,
            self.run.progress.iter + guard.within_iters,
            guard.then,
            snapshot,
            guard.metric,
        )
        self.position.watches += (watch,)

    def _look_at_guards(self, val_loss: float | None) -> bool:
        """Compare the metrics with what the guards allow. True ends the round: the run went back, or a signal came."""
        position, iteration = self.position, self.run.progress.iter
        due = [watch for watch in position.watches if watch.metric == VAL_LOSS and iteration >= watch.until_iter]
        if due and val_loss is None:
            val_loss = self.host.measure(f"the end of the guard of entry {due[0].entry}")
            if val_loss is None:
                return True
        now = self._now(val_loss)
        for watch in [watch for watch in position.watches if watch.metric in now]:
            value = now[watch.metric]
            if not falling(watch.metric, value) <= falling(
                watch.metric, watch.limit
            ):  # what is not a number is beyond it too
                if watch.then == "revert":
                    self._revert(watch, value)
                    return True
                self._end_watch(watch, value, "is beyond the limit")
                if watch.then == "stop":
                    stops = self.run.settings.stops_asked + 1
                    self.run.adopt(dataclasses.replace(self.run.settings, stops_asked=stops))
            elif iteration >= watch.until_iter:
                self._end_watch(watch, value, "stayed within the limit")
        return False

    def _end_watch(self, watch: Watch, value: float, outcome: str) -> None:
        self.position.watches = tuple(other for other in self.position.watches if other != watch)
        metric = "the loss" if watch.metric == VAL_LOSS else watch.metric
        self.host.event(
            "decision",
            entry=watch.entry,
            name=watch.name,
            reason=f"guard: {metric} {outcome} ({watch.then})",
            limit=watch.limit,
            **{f"{watch.metric}_before": watch.before, watch.metric: value},
        )

    def _revert(self, watch: Watch, value: float) -> None:
        """Go back to just before the entry, mark it as reverted, and go on with the samples that come next."""
        from_iter, metric = self.run.progress.iter, watch.metric
        self.load_state(self.host.go_back(watch.checkpoint))
        position = self.position
        if position.fired != watch.entry - 1:
            raise Stopped(f"checkpoint {watch.checkpoint} is not the state before entry {watch.entry}")
        position.reverted += (watch.entry,)
        self._advance()
        position.round_open, position.round_loss, position.owes_measure = False, None, False
        position.round_iter = self.run.progress.iter
        self.run.check_ranks_agree(f"going back before entry {watch.entry}")
        self.host.event(
            "rollback",
            entry=watch.entry,
            name=watch.name,
            reason=f"guard: {spoken(metric)} {told(metric, value)} "
            f"{'<' if rises(metric) else '>'} {told(metric, watch.limit)}",
            from_iter=from_iter,
            checkpoint=watch.checkpoint,
            **{f"{metric}_before": watch.before, metric: value},
        )
        self.host.keep(f"entry {watch.entry} reverted")

    def _apply(self, entry: Entry) -> Cast:
        """Plan, check and adopt. Raises ScheduleError or OperationFailed with the run as it was."""
        run, cast = self.run, Cast()
        operation, error = None, None
        try:
            operation = entry.operation.resolve(run)
        except Exception as caught:
            error = caught
        failures = run.ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
        if any(failures):
            told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
            raise OperationFailed(told) from error
        assert operation is not None
        target = operation.plan(run.settings)
        check_settings(target, run.ranks.world_size)
        overridden = set(operation.touches)
        if entry.over and operation.fades:
            target = operation.fade(run.settings, target)
            cast = run.adopt(target, partial(operation.reshape, masked=True))  # type: ignore[call-arg]
            self.ramps.append(Ramp.between(entry, run.settings, target, run.progress.iter))
        elif entry.over:
            ramp = Ramp.between(entry, run.settings, target, run.progress.iter)
            self._drop_from_ramps(overridden)
            self.ramps.append(ramp)
            self._move_ramps()
        else:
            cast = run.adopt(target, operation.reshape)
            self._drop_from_ramps(overridden)
        return cast

    def _changes_the_measured(self, entry: Entry) -> bool:
        """Whether what the loss of this boundary was measured on is there for the last time."""
        try:
            after = entry.plan(self.run.settings)
        except ScheduleError:  # told when it is applied
            return False
        return not (self.run.progress.changed_since_eval or self.run.settings.evaluates_as(after))

    def _failed(self, entry: Entry, error: Exception) -> None:
        skip = entry.on_error == "skip"
        self.host.event(
            "error",
            entry=entry.number,
            name=entry.operation.name,
            message=str(error),
            on_error=entry.on_error,
        )
        if not skip:
            raise OperationFailed(f"entry {entry.number} ({entry}) failed and the run is as before: {error}") from error
        self.position.skipped += (entry.number,)
        self._advance()

    def _advance(self) -> None:
        progress, position = self.run.progress, self.position
        position.fired += 1
        position.since_iter = progress.iter
        position.since_tokens = progress.tokens
        position.since_seconds = self.run.ranks.broadcast(progress.seconds)
        position.history = {}
        position.loss_before = None

    # ------------------------------------------------------------------------------------------ ramps

    def _move_ramps(self) -> None:
        if not self.ramps:
            return
        iteration, settings = self.run.progress.iter, self.run.settings
        for ramp in self.ramps:
            for name, value in ramp.at(iteration).items():
                settings = with_field(settings, name, value)
            if ramp.done(iteration):
                self.host.event(
                    "decision",
                    entry=ramp.entry,
                    name=ramp.name,
                    reason=f"reached after {ramp.over} iterations",
                )
        self.ramps = [ramp for ramp in self.ramps if not ramp.done(iteration)]
        if settings != self.run.settings:
            self.run.adopt(settings)

    def _drop_from_ramps(self, names: set[str]) -> None:
        """A later entry on the same number ends the earlier one's ramp on it where it has come to."""
        names = {number for name in names for number in numbers_in(self.run.settings, name)}
        for ramp in self.ramps:
            ended = sorted(names & set(ramp.fields))
            for name in ended:
                del ramp.fields[name]
            if ended:
                self.host.event(
                    "decision",
                    entry=ramp.entry,
                    name=ramp.name,
                    reason=f"the ramp of {', '.join(ended)} ends where a later entry takes over",
                )
        self.ramps = [ramp for ramp in self.ramps if ramp.fields]

    def _settled(self) -> Settings:
        """The settings that will hold once every ramp has arrived."""
        settings = self.run.settings
        for ramp in self.ramps:
            for name, (_, end) in ramp.fields.items():
                settings = with_field(settings, name, end)
        return settings

    def missed(self) -> list[Entry]:
        """Entries that have not fired; told at the end of the run."""
        return list(self.schedule.entries[self.position.fired :])
