"""The orchestrator: a schedule, a position in it, and what has been waited.

At a step boundary `consult` looks at the head of each track's queue only. Of those that are due the first in the file
fires, and then all are looked at again. Rank 0 decides from numbers that are the same on every rank; the decision and
its reason are broadcast; every rank carries it out and all compare fingerprints. Where no trigger can possibly hold,
the ranks all know it (`acts`) and nothing is exchanged: a waiting schedule costs next to nothing. Everything it knows
is in `state()`, so a resumed run waits on as if it had never stopped. It knows neither the live run nor the session,
only what it asks of them (`Steerable`, `Host`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from operator import or_
from typing import Any, Protocol

from orchestrate.training.operations.base import Machine
from orchestrate.training.run.casting import Cast
from orchestrate.training.run.changes import Reshape
from orchestrate.training.run.stopwatch import Stopwatch
from orchestrate.training.schedule.file import Entry, Guard, Schedule
from orchestrate.training.schedule.position import Mark, Position, Queue, Watch
from orchestrate.training.schedule.ramps import Ramp
from orchestrate.training.schedule.stages import check_settings
from orchestrate.training.schedule.triggers import together
from orchestrate.training.settings.errors import OperationFailed, ScheduleError, Stopped
from orchestrate.training.settings.metrics import VAL_LOSS, falling, finite, rises, spoken, told
from orchestrate.training.settings.records import (
    Elapsed,
    Measured,
    Progress,
    Settings,
    differences,
    numbers_in,
    with_field,
)


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


class Orchestrator:
    """Fires the entries of a schedule on a run. The host may be set later: before the first `consult`."""

    host: Host

    def __init__(self, schedule: Schedule, run: Steerable, host: Host | None = None) -> None:
        self.schedule = schedule
        self.run = run
        if host is not None:
            self.host = host
        self.position = Position({name: Queue() for name in schedule.tracks})
        self.ramps: list[Ramp] = []
        # What the last N entries of a track ask for, at index N.
        self._asked = {
            name: list(accumulate((entry.metrics for entry in reversed(track)), or_, initial=frozenset()))
            for name, track in schedule.tracks.items()
        }

    # ------------------------------------------------------------------------------------------ state

    @property
    def pinned(self) -> set[str]:
        """Checkpoints that a guard may go back to."""
        return {watch.checkpoint for watch in self.position.watches if watch.checkpoint}

    @property
    def heads(self) -> list[Entry]:
        """The next pending entry of each track that has one."""
        return [entry for _, entry in self._heads()]

    def _heads(self) -> Iterator[tuple[Queue, Entry]]:
        for name, queue in self.position.queues.items():
            if queue.fired < len(track := self.schedule.tracks[name]):
                yield queue, track[queue.fired]

    def state(self) -> dict[str, Any]:
        return {"position": dataclasses.asdict(self.position), "ramps": [ramp.to_json() for ramp in self.ramps]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises ValueError for what it cannot have returned."""
        self.position = Position.from_json(state["position"]).fitted(self.schedule)
        self.ramps = [Ramp.from_json(ramp) for ramp in state["ramps"]]
        for ramp in self.ramps:
            try:
                for name, ends in ramp.fields.items():
                    for value in ends:
                        Settings.from_json(with_field(self.run.settings, name, value).to_json())
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"a ramp of {ramp.name} does not fit the settings ({error})") from None

    # ------------------------------------------------------------------------------------------ metrics

    @property
    def asked(self) -> frozenset[str]:
        """Names of the metrics that pending entries and open guards look at; the same on every rank."""
        pending = [self._asked[name][len(self.schedule.tracks[name]) - n] for name, n in self.position.fired.items()]
        return frozenset(watch.metric for watch in self.position.watches).union(*pending)

    def observe(self, logged: Mapping[str, float]) -> None:
        """Take note of what has just been logged, as far as it is asked for; the next round looks at it.

        Args:
            logged: values by name, equal on every rank, of this iteration.
        """
        position, iteration = self.position, self.run.progress.iter
        asked = self.asked
        position.latest = {name: position.latest[name] for name in position.latest if name in asked}
        for name in sorted(asked & logged.keys()):
            value = logged[name]
            position.latest[name] = (iteration, value if finite(value) else None)
            for queue, head in self._heads():
                compared = together(head.watched).get(name)
                if compared and finite(value):
                    values = (*queue.history.get(name, ()), value)
                    if len(values) > compared + 1:
                        values = (min(values[:-compared], key=partial(falling, name)), *values[-compared:])
                    queue.history[name] = values

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
        now = self._now(None)
        for watch in position.watches:
            if watch.metric in now or (watch.metric == VAL_LOSS and iteration >= watch.until_iter):
                return True
        return any(
            self._ends(queue, head, now) or self._may_fire(queue, head, look_at_clock, now)
            for queue, head in self._heads()
        )

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
        stops = self.run.settings.stops_asked
        if position.watches and not position.round_open and self._look_at_guards(val_loss):
            return
        position.round_iter = self.run.progress.iter
        self._move_ramps()
        # Resumed in the middle of a chain, the entries left in it see what the ones before them saw.
        if not position.round_open:
            position.round_loss = position.loss_before = val_loss
            for queue, _ in self._heads():
                queue.open = self.run.settings.stops_asked == stops  # not where a guard has just ended the run
                if finite(val_loss):
                    queue.history[VAL_LOSS] = (*queue.history.get(VAL_LOSS, ()), val_loss)
        while not position.owes_measure and (found := self._next(look_at_clock)):
            if not self._fire(*found):
                return  # by a signal: the round stays open, and a checkpoint made now resumes inside it
        if position.owes_measure and position.round_open:
            return
        for queue in position.queues.values():
            queue.open = False
        position.round_loss = position.loss_before = None

    def _next(self, look_at_clock: bool) -> tuple[Queue, Entry, str] | None:
        """The first in the file of what is due, and why; repetitions that are over are left on the way."""
        now = self._now(self.position.round_loss)
        went_on = True
        while went_on:
            went_on = False
            for queue, entry in self._heads():
                if not queue.open:
                    continue
                if why := self._ends(queue, entry, now):
                    assert entry.until
                    self._event("decision", entry, reason=f"the repetition ends: {why}")
                    self._advance(queue, entry.until.steps, entry.until.closes)
                    went_on = True
                    break
                if reason := self._due(queue, entry, look_at_clock, now):
                    return queue, entry, reason
        return None

    def _ends(self, queue: Queue, entry: Entry, now: Mapping[str, float]) -> str | None:
        """Why no further round of a repetition begins, at the first step of one; the same on every rank."""
        if entry.until is None:
            return None
        return entry.until.condition.fires(self._elapsed(queue.since, None), Measured(now, queue.history))

    def _since(self, queue: Queue, entry: Entry) -> Mark | None:
        """From when an entry's waits count; None while what it comes after has not fired."""
        return self.position.marks.get(entry.after) if entry.after else queue.since

    def _measured(self, queue: Queue, since: Mark, now: Mapping[str, float]) -> Measured:
        begun = max(since.iter, queue.since.iter)
        latest = {name: value for name, (at, value) in self.position.latest.items() if at > begun and value is not None}
        if losses := queue.history.get(VAL_LOSS):
            latest[VAL_LOSS] = losses[-1]
        return Measured(now, queue.history, latest)

    def _may_fire(self, queue: Queue, entry: Entry, look_at_clock: bool, now: Mapping[str, float]) -> bool:
        """Whether rank 0 may find the entry due: equal inputs give every rank the same answer without an exchange."""
        since = self._since(queue, entry)
        if since is None or self._moved_elsewhere(entry):
            return False
        if entry.operation.renumbers and self.run.settings.fading:
            return False  # layers keep their numbers and sizes while one of them is fading in
        guarded = entry.guard.metric if entry.guard else VAL_LOSS
        if guarded != VAL_LOSS and self.position.latest.get(guarded, (0, None))[1] is None:
            return False  # the guard would have nothing to compare with
        if not entry.triggers or (look_at_clock and any(trigger.reads_clock for trigger in entry.triggers)):
            return True
        elapsed, measured = self._elapsed(since, seconds=None), self._measured(queue, since, now)
        return any(trigger.fires(elapsed, measured) for trigger in entry.triggers)

    def _moved_elsewhere(self, entry: Entry) -> bool:
        """Whether a ramp of another track is moving what the entry changes: it waits until that has arrived."""
        moving = {name for ramp in self.ramps if ramp.track != entry.track for name in ramp.fields}
        return bool(moving) and not moving.isdisjoint(self._numbers(entry.operation.touches))

    def _numbers(self, fields: Iterable[str]) -> set[str]:
        return {number for name in fields for number in numbers_in(self.run.settings, name)}

    def _due(self, queue: Queue, entry: Entry, look_at_clock: bool, now: Mapping[str, float]) -> str | None:
        """Why the entry fires now, or None; rank 0's answer on every rank, exchanged only where it may be a yes."""
        if not self._may_fire(queue, entry, look_at_clock, now):
            return None
        since = self._since(queue, entry)
        assert since
        if not entry.triggers:
            return f"after {entry.after}: at once" if entry.after else "no trigger: at once"
        seconds = self.run.progress.seconds - since.seconds if look_at_clock else None
        elapsed, measured = self._elapsed(since, seconds), self._measured(queue, since, now)
        reasons = [reason for trigger in entry.triggers if (reason := trigger.fires(elapsed, measured))]
        return self.run.ranks.broadcast(", ".join(reasons) or None)

    def _elapsed(self, since: Mark, seconds: float | None) -> Elapsed:
        progress = self.run.progress
        return Elapsed(
            iter=progress.iter,
            tokens=progress.tokens,
            iters_waited=progress.iter - since.iter,
            tokens_waited=progress.tokens - since.tokens,
            seconds_waited=seconds,
        )

    def outlook(self, seconds: float, latest: Mapping[str, float]) -> list[tuple[Entry, list[str]]]:
        """The head of each track, and how near each of its triggers is; nothing is decided.

        Args:
            seconds: that the run has taken.
            latest: the last value of every metric.
        """
        found = []
        for queue, entry in self._heads():
            since = self._since(queue, entry)
            if since is None:
                found.append((entry, [f"waits for {entry.after}"]))
                continue
            elapsed, measured = self._elapsed(since, seconds - since.seconds), Measured({}, queue.history, latest)
            near = [trigger.near(elapsed, measured) or str(trigger) for trigger in entry.triggers] or ["at once"]
            found.append((entry, near))
        return found

    def follow(self, event: Mapping[str, Any]) -> None:
        """Go on behind what an event says is done with, without carrying it out: for those who only look on."""
        name = event.get("track", "")
        queue, track = self.position.queues.get(name), self.schedule.tracks.get(name, ())
        if queue is None or queue.fired >= len(track):
            return
        head, place = track[queue.fired], event.get("step") or event["entry"]
        if event["kind"] == "decision":
            if head.until and head.number == event["entry"]:
                self._advance(queue, head.until.steps, head.until.closes)
        elif queue.fired < place <= len(track):
            step = track[place - 1]
            reached = [step.closes] if event["kind"] == "error" else [step.label, step.closes]
            self._advance(queue, place - queue.fired, *reached)

    # ------------------------------------------------------------------------------------------ firing

    def _event(self, kind: str, entry: Entry, **fields: Any) -> None:
        self.host.event(kind, **entry.told, **fields)

    def _fire(self, queue: Queue, entry: Entry, reason: str) -> bool:
        """Carry out one entry; False where a signal came before."""
        run, host = self.run, self.host
        loss_before = self.position.loss_before
        guard = entry.guard
        if (entry.reevaluate or (guard and guard.metric == VAL_LOSS)) and loss_before is None:
            loss_before = self.host.measure("before an operation")
            if loss_before is None:
                return False  # the entry stays at the head
            self.position.loss_before = loss_before
        snapshot = ""
        # With a name of its own: this boundary may save again, when the entry has fired.
        mark = f"_before_entry_{entry.number}" + (f"_{entry.round}" if entry.rounds > 1 else "")
        if guard and guard.then == "revert":
            snapshot = self.host.save(f"before entry {entry.title}, which has a guard", mark=mark)
        elif 0 < run.progress.iter == run.progress.best_iter and self._changes_the_measured(entry):
            self.host.save("best validation loss, before an entry", mark=mark)
        # Not before: a resume from there decides again, and a way back to there was not decided.
        self._event("decision", entry, reason=reason)
        before, goal, started = run.settings, self._settled(), time.perf_counter()
        try:
            with run.stopwatch.part("operation"):
                cast = self._apply(entry)
        except (ScheduleError, OperationFailed) as error:
            self._failed(queue, entry, error)
            return True
        run.check_ranks_agree(str(entry))
        if guard:
            value = loss_before if guard.metric == VAL_LOSS else self.position.latest[guard.metric][1]
            self._watch(entry, guard, value, snapshot)
        self._advance(queue, 1, entry.label, entry.closes)
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
        self._event(
            "operation",
            entry,
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
        # The track's part in the round is over after a measurement, as what it would look at is of the model before. A
        # stop ends it for all tracks: what follows belongs to whoever goes on from here.
        stops = run.settings.stops_asked != before.stops_asked
        for other in self.position.queues.values() if stops else [queue] if entry.reevaluate else []:
            other.open = False
        if run.settings.checkpoints_asked != before.checkpoints_asked:
            host.save("asked for by the schedule")
        return True

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
            entry.track,
            entry.step,
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
        self._event(
            "decision",
            self._watched(watch),
            reason=f"guard: {metric} {outcome} ({watch.then})",
            limit=watch.limit,
            **{f"{watch.metric}_before": watch.before, watch.metric: value},
        )

    def _revert(self, watch: Watch, value: float) -> None:
        """Go back to just before the entry, mark it as reverted, and go on with the samples that come next."""
        from_iter, metric, entry = self.run.progress.iter, watch.metric, self._watched(watch)
        self.load_state(self.host.go_back(watch.checkpoint))
        position = self.position
        queue = position.queues[watch.track]
        if queue.fired != watch.place - 1:
            raise Stopped(f"checkpoint {watch.checkpoint} is not the state before entry {entry.title}")
        position.reverted += (watch.entry,)
        self._advance(queue, 1, entry.closes)
        for queue in position.queues.values():
            queue.open = False
        position.round_loss, position.owes_measure = None, False
        position.round_iter = self.run.progress.iter
        self.run.check_ranks_agree(f"going back before entry {entry.title}")
        self._event(
            "rollback",
            entry,
            reason=f"guard: {spoken(metric)} {told(metric, value)} "
            f"{'<' if rises(metric) else '>'} {told(metric, watch.limit)}",
            from_iter=from_iter,
            checkpoint=watch.checkpoint,
            **{f"{metric}_before": watch.before, metric: value},
        )
        self.host.keep(f"entry {entry.title} reverted")

    def _watched(self, watch: Watch) -> Entry:
        return self.schedule.tracks[watch.track][watch.place - 1]

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

    def _failed(self, queue: Queue, entry: Entry, error: Exception) -> None:
        self._event("error", entry, message=str(error), on_error=entry.on_error)
        if entry.on_error != "skip":
            raise OperationFailed(f"entry {entry.title} ({entry}) failed and the run is as before: {error}") from error
        self.position.skipped += (entry.number,)
        self._advance(queue, 1, entry.closes)

    def _advance(self, queue: Queue, steps: int, *labels: str) -> None:
        """The head and what is left out with it is done with, and so is what the labels name."""
        progress, position = self.run.progress, self.position
        now = Mark(progress.iter, progress.tokens, self.run.ranks.broadcast(progress.seconds))
        queue.fired += steps
        queue.since, queue.history, position.loss_before = now, {}, None
        named = [label for label in labels if label]
        position.marks |= dict.fromkeys(named, now)
        for other, head in self._heads():
            if head.after in named:
                other.history = {}

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
        names = self._numbers(names)
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
        """Steps that are still pending; told at the end of the run."""
        fired = self.position.fired
        return [entry for name, track in self.schedule.tracks.items() for entry in track[fired[name] :]]

    def kept_waiting(self) -> list[str]:
        """What is to be said of entries that come after one that has not fired."""
        marks = self.position.marks
        return [
            f"entry {head.title} waits after {head.after}, which has not fired"
            for head in self.heads
            if head.after and head.after not in marks
        ]
