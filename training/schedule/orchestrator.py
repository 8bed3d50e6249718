"""The orchestrator: a schedule, a position in it, and what has been waited.

At a step boundary `consult` looks at the head of the queue only. Rank 0 decides from numbers that are the same on
every rank; the decision and its reason are broadcast; every rank carries it out and all compare fingerprints. Where no
trigger can possibly hold, the ranks all know it and nothing is exchanged: a waiting schedule costs next to nothing.
Everything it knows is in `state()`, so a resumed run waits on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from orchestrate.training.run.run import Run
from orchestrate.training.schedule.file import Entry, Schedule
from orchestrate.training.schedule.ramps import Ramp
from orchestrate.training.schedule.stages import check_settings
from orchestrate.training.settings.errors import OperationFailed, ScheduleError, Stopped
from orchestrate.training.settings.records import EXACTLY, Measured, Settings, Waited, differences, with_field
from orchestrate.training.settings.values import NonNegativeInt, PositiveInt
from orchestrate.training.store import checkpoint


class Host(Protocol):
    """What the orchestrator asks of the session that it works for (training/session/session.py)."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event."""

    def measure(self, why: str) -> float | None:
        """Make and record an evaluation now; None where a signal cut it short."""

    def save(self, why: str, *, mark: str = "") -> str:
        """Save a checkpoint and return its name, which ends in `mark`."""

    def go_back(self, checkpoint: str) -> dict[str, Any]:
        """Become the state of a checkpoint, all but the place in the stream of samples; returns its `state()`."""

    def keep(self, why: str) -> None:
        """After going back, when it is decided how to go on: save that, and drop the way that was left."""


@dataclass(frozen=True)
class Watch:
    """An entry that has fired and is watched by its guard."""

    __pydantic_config__ = EXACTLY

    entry: PositiveInt
    name: str
    loss_before: float
    limit: float
    until_iter: NonNegativeInt
    then: Literal["revert", "keep", "stop"]
    checkpoint: Annotated[str, Field(pattern=checkpoint.NAME + "|^$")]
    """Name of the checkpoint of the state just before it; empty where there is no going back."""


@dataclass
class Position:
    """Where the head of the queue stands and since when it has waited."""

    __pydantic_config__ = EXACTLY

    fired: NonNegativeInt = 0
    """Entries done with (fired or skipped)."""
    since_iter: int = 0
    since_tokens: int = 0
    since_seconds: float = 0.0
    losses: tuple[float, ...] = ()
    """Validation losses since the head became the head."""
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


class Orchestrator:
    """Fires the entries of a schedule on a run. The host may be set later: before the first `consult`."""

    host: Host

    def __init__(self, schedule: Schedule, run: Run, host: Host | None = None) -> None:
        self.schedule = schedule
        self.run = run
        if host is not None:
            self.host = host
        self.position = Position()
        self.ramps: list[Ramp] = []

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
        self.position = TypeAdapter(Position).validate_python(state["position"])
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

    # ------------------------------------------------------------------------------------------ a boundary

    def consult(self, val_loss: float | None, look_at_clock: bool) -> None:
        """One round at a step boundary: move the ramps, then fire what is due, in order.

        Args:
            val_loss: of the evaluation just made at this boundary, or None.
            look_at_clock: whether waits in seconds are looked at now; the same on every rank.
        """
        position = self.position
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
        elif val_loss is not None:
            position.losses += (val_loss,)
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

    def acts(self, evaluated: bool, look_at_clock: bool) -> bool:
        """Whether anything may happen at this boundary."""
        return True

    def _due(self, entry: Entry, look_at_clock: bool) -> str | None:
        """Why the entry fires now, or None; the same answer on every rank."""
        if entry.operation.renumbers and self.run.settings.model.fading:
            return None  # layers keep their numbers and sizes while one of them is fading in
        if not entry.triggers:
            return "no trigger: at once"
        measured = Measured(self.position.round_loss, self.position.losses)
        waited = self._waited(seconds=None)
        reads_clock = look_at_clock and any(trigger.reads_clock for trigger in entry.triggers)
        if not reads_clock:
            # Equal inputs on every rank: a "no" needs no exchange, and only a "yes" is worth one.
            if not any(trigger.fires(waited, measured) for trigger in entry.triggers):
                return None
        else:
            waited = self._waited(self.run.progress.seconds - self.position.since_seconds)
        reasons = [reason for trigger in entry.triggers if (reason := trigger.fires(waited, measured))]
        return self.run.ranks.broadcast(", ".join(reasons) or None)

    def _waited(self, seconds: float | None) -> Waited:
        progress, position = self.run.progress, self.position
        return Waited(
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
        if (entry.reevaluate or entry.guard) and loss_before is None:
            loss_before = self.host.measure("before an operation")
            if loss_before is None:
                return "interrupted"  # by a signal: the entry stays at the head
            self.position.loss_before = loss_before
        snapshot = ""
        if entry.guard and entry.guard.then == "revert":
            # With a name of its own: this boundary may save again, when the entry has fired.
            why = f"before entry {entry.number}, which has a guard"
            snapshot = self.host.save(why, mark=f"_before_entry_{entry.number}")
        before, goal, started = run.settings, self._settled(), time.perf_counter()
        try:
            with run.stopwatch.part("operation"):
                self._apply(entry)
        except (ScheduleError, OperationFailed) as error:
            self._failed(entry, error)
            return "next"
        run.check_ranks_agree(str(entry))
        self._advance()
        if entry.guard:
            assert loss_before is not None
            limit, until = loss_before + entry.guard.max_increase, run.progress.iter + entry.guard.within_iters
            watch = Watch(
                entry.number, entry.operation.name, loss_before, limit, until, entry.guard.then, snapshot
            )  # fmt: skip
            self.position.watches += (watch,)
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
        )
        # A stop ends the round too: what follows belongs to whoever goes on from here.
        round_ends = entry.reevaluate or run.settings.stops_asked != before.stops_asked
        if run.settings.checkpoints_asked != before.checkpoints_asked:
            self.position.round_open = not round_ends
            self.host.save("asked for by the schedule")
        return "round ends" if round_ends else "next"

    # ------------------------------------------------------------------------------------------ guards

    def _look_at_guards(self, val_loss: float | None) -> bool:
        """Compare the loss with what the guards allow. True ends the round: the run went back, or a signal came."""
        position, iteration = self.position, self.run.progress.iter
        due = [watch for watch in position.watches if iteration >= watch.until_iter]
        if due and val_loss is None:
            val_loss = self.host.measure(f"the end of the guard of entry {due[0].entry}")
            if val_loss is None:
                return True
        if val_loss is None:
            return False
        for watch in position.watches:
            if val_loss > watch.limit or val_loss != val_loss:
                if watch.then == "revert":
                    self._revert(watch, val_loss)
                    return True
                self._end_watch(watch, val_loss, "the loss is beyond the limit")
                if watch.then == "stop":
                    stops = self.run.settings.stops_asked + 1
                    self.run.adopt(dataclasses.replace(self.run.settings, stops_asked=stops))
            elif iteration >= watch.until_iter:
                self._end_watch(watch, val_loss, "the loss stayed within the limit")
        return False

    def _end_watch(self, watch: Watch, val_loss: float, outcome: str) -> None:
        self.position.watches = tuple(other for other in self.position.watches if other != watch)
        self.host.event(
            "decision",
            entry=watch.entry,
            name=watch.name,
            reason=f"guard: {outcome} ({watch.then})",
            val_loss_before=watch.loss_before,
            val_loss=val_loss,
            limit=watch.limit,
        )

    def _revert(self, watch: Watch, val_loss: float) -> None:
        """Go back to just before the entry, mark it as reverted, and go on with the samples that come next."""
        from_iter = self.run.progress.iter
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
            reason=f"guard: val loss {val_loss:.4f} > {watch.limit:.4f}",
            from_iter=from_iter,
            checkpoint=watch.checkpoint,
            val_loss_before=watch.loss_before,
            val_loss=val_loss,
        )
        self.host.keep(f"entry {watch.entry} reverted")

    def _apply(self, entry: Entry) -> None:
        """Plan, check and adopt. Raises ScheduleError or OperationFailed with the run as it was."""
        run = self.run
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
            run.adopt(target, operation.reshape)
            self._drop_from_ramps(overridden)
            self.ramps.append(Ramp.between(entry, run.settings, target, run.progress.iter))
        elif entry.over:
            ramp = Ramp.between(entry, run.settings, target, run.progress.iter)
            self._drop_from_ramps(overridden)
            self.ramps.append(ramp)
            self._move_ramps()
        else:
            run.adopt(target, operation.reshape)
            self._drop_from_ramps(overridden)

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
        position.losses = ()
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
