"""Where a run stands in its schedule: plain values, which a checkpoint holds.

What an earlier version saved is brought up to date here. Nothing here decides or changes anything of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from orchestrate.training.schedule.file import Schedule
from orchestrate.training.settings.metrics import VAL_LOSS, MetricName
from orchestrate.training.settings.records import EXACTLY
from orchestrate.training.settings.values import Finite, NonNegativeInt, PositiveInt
from orchestrate.training.store import checkpoint


@dataclass(frozen=True)
class Mark:
    """A moment of the run, from which waits count."""

    __pydantic_config__ = EXACTLY

    iter: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Queue:
    """Where the head of one track stands, and since when it has waited."""

    __pydantic_config__ = EXACTLY

    fired: NonNegativeInt = 0
    """Steps done with (fired, skipped, or left out because a repetition ended)."""
    since: Mark = Mark()
    """When the step before was done with; the start of the run for the first."""
    history: dict[str, tuple[Finite, ...]] = field(default_factory=dict)
    """Values since the head became the head: all of val_loss; of other metrics that it looks back on, the best of the
    oldest and then as many as are compared."""
    open: bool = False
    """Whether the track still has a part in the round under way: a checkpoint in the middle of one resumes there."""


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
    track: str = ""
    step: NonNegativeInt = 0
    """Place in its track, from 1. Saved by earlier versions as 0: their entries' numbers are their places."""

    @property
    def place(self) -> int:
        return self.step or self.entry


@dataclass
class Position:
    """How far the schedule has come."""

    __pydantic_config__ = EXACTLY

    queues: dict[str, Queue] = field(default_factory=dict)
    """By the names of the tracks, in the order of the file."""
    marks: dict[str, Mark] = field(default_factory=dict)
    """Label -> when what it names has fired."""
    latest: dict[str, tuple[NonNegativeInt, Finite | None]] = field(default_factory=dict)
    """(iteration, value) of what was logged last, for the metrics that are asked for; None for what is not finite."""
    round_loss: float | None = None
    """The loss of the round under way: a checkpoint between two entries of a chain resumes in the middle of it."""
    round_iter: int = -1
    """Iteration of the latest round; a resumed run does not hold the same round again."""
    loss_before: float | None = None
    """The loss of the very model that an entry of this round is about to change, where it has been measured."""
    owes_measure: bool = False
    """A signal cut short the evaluation after an operation; a resume makes it."""
    skipped: tuple[int, ...] = ()
    reverted: tuple[int, ...] = ()
    watches: tuple[Watch, ...] = ()

    @property
    def round_open(self) -> bool:
        return any(queue.open for queue in self.queues.values())

    @property
    def fired(self) -> dict[str, int]:
        """How many steps of each track are done with."""
        return {name: queue.fired for name, queue in self.queues.items()}

    def fitted(self, schedule: Schedule) -> Position:
        """The place in a schedule that a resume may have changed behind it. Raises ValueError where that has no such.

        A new track begins at its first entry. A new label of what has fired counts from when its track's last step did,
        and one that names what has not fired is not reached, whatever it named before.
        """
        tracks = schedule.tracks
        for name, fired in self.fired.items():
            if fired > (there := len(tracks.get(name, ()))):
                raise ValueError(f"{fired} entries{f' of track {name}' if name else ''} have fired of {there}")
        for watch in self.watches:
            if not 0 < watch.place <= self.fired.get(watch.track, 0):
                raise ValueError(f"entry {watch.entry} is watched and has not fired")
        queues = {name: self.queues.get(name, Queue()) for name in tracks}
        failed, marks = {*self.skipped, *self.reverted}, dict[str, Mark]()
        for name, queue in queues.items():
            for entry in tracks[name][: queue.fired]:
                reached = [entry.closes] if entry.number in failed else [entry.closes, entry.label]
                marks |= dict.fromkeys(filter(None, reached), queue.since)
        done = [entry for name, queue in queues.items() for entry in tracks[name][: queue.fired]]
        labels = {label for entry in done for label in (entry.label, entry.closes)}
        marks |= {label: mark for label, mark in self.marks.items() if label in labels}
        return replace(self, queues=queues, marks=marks)

    @classmethod
    def from_json(cls, values: Any) -> Position:
        """Raises ValueError (pydantic's) for what was not saved, by this version or an earlier one."""
        if isinstance(values, dict):
            values = dict(values)
            if "fired" in values:
                values["queues"] = {"": _only_queue(values)}
            if isinstance(watches := values.get("watches"), list):
                values["watches"] = [_present_watch(watch) for watch in watches]
        return TypeAdapter(cls).validate_python(values)


def _only_queue(saved: dict[str, Any]) -> dict[str, Any]:
    """The queue of an earlier version, which had one, taken out of what it saved; still earlier it knew one metric."""
    since = {name: saved.pop(f"since_{name}") for name in ("iter", "tokens", "seconds") if f"since_{name}" in saved}
    queue = {"fired": saved.pop("fired"), "since": since, "open": saved.pop("round_open", False)}
    if "losses" in saved:
        saved["history"] = {VAL_LOSS: saved.pop("losses")}
    return {**queue, "history": saved.pop("history", {})}


def _present_watch(saved: Any) -> Any:
    """A watch as it is saved today: earlier versions had guards on the validation loss only."""
    if not isinstance(saved, dict) or "loss_before" not in saved:
        return saved
    return {"before" if key == "loss_before" else key: value for key, value in saved.items()}
