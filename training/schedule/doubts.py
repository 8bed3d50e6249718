"""What a schedule says and can hardly mean: told by --plan, and refused by nobody.

Only what is certain before the run is told: an entry that a metric may fire can come at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrate.training.schedule.file import Entry, Schedule
from orchestrate.training.schedule.position import Position, Queue
from orchestrate.training.schedule.stages import Stage
from orchestrate.training.schedule.triggers import AllOf, AtIter, Moment, Trigger
from orchestrate.training.settings.records import numbers_in
from orchestrate.training.settings.values import MOST_PROBLEMS


def doubts(schedule: Schedule, position: Position, stages: list[Stage], max_iters: int) -> list[str]:
    """A sentence for each, of a repeated entry one; `stages` are those of the plan from this position on."""
    if schedule.source and not schedule.entries:
        return [f"{schedule.source}: the schedule has no entries"]
    end = f"the run ends at {max_iters:,} (max_iters)"
    told = [
        f"{schedule.place(entry)}: {entry}: not before iteration {first:,.0f}, and {end}"
        for entry, first in _earliest(schedule, position)
        if first > max_iters
    ]
    idle: dict[int, Entry] = {}
    for before, stage in zip(stages, stages[1:], strict=False):
        entry = stage.entry
        if entry and stage.settings == before.settings and not entry.operation.decided_on_machine:
            idle.setdefault(entry.number, entry)
    told += [
        f"{schedule.place(entry)}: {entry}: changes nothing: what it asks for is in force by then"
        for entry in idle.values()
    ]
    for track in schedule.tracks.values():
        told += _backwards(schedule, track)
    return (told + _cut_off(schedule, stages))[:MOST_PROBLEMS]


def _earliest(schedule: Schedule, position: Position) -> Iterator[tuple[Entry, float]]:
    """Each pending entry's first round, and the iteration before which it cannot fire."""
    for name, track in schedule.tracks.items():
        queue = position.queues.get(name, Queue())
        first = float(queue.since.iter)
        left_out = 0
        for entry in track[queue.fired :]:
            left_out = entry.until.steps if entry.until and not left_out else max(0, left_out - 1)
            if left_out:
                continue  # a metric may end the repetition before it
            # What an entry comes after may have fired at any time. Of tokens nothing is known: the pace may change.
            since = Moment(0 if entry.after else first, math.inf, 1)
            first = max(first, min((_not_before(one, since) for one in entry.triggers), default=0.0))
            if entry.round == 1:
                yield entry, first


def _not_before(one: Trigger, since: Moment) -> float:
    """The iteration before which a trigger cannot hold, as far as that is certain."""
    if isinstance(one, AllOf):
        return max(_not_before(part, since) for part in one.value)
    known = one.at_latest(since, since)
    return 0.0 if math.isinf(known) or one.looks_at else known


def _backwards(schedule: Schedule, track: tuple[Entry, ...]) -> list[str]:
    """Entries whose iteration is over when those before them have fired."""
    told, latest = [], -1
    for entry in track:
        at = min((one.value for one in entry.triggers if isinstance(one, AtIter)), default=None)
        if at is None:
            continue
        if at < latest:
            told.append(
                f"{schedule.place(entry)}: {entry}: at_iter {at} is over when the entry before it that waits for "
                f"iteration {latest} has fired: it fires at once then"
            )
        elif entry.round == 2 and at == latest:
            told.append(f"{schedule.place(entry)}: {entry}: at_iter {at} is over in every round but the first")
        if len(entry.triggers) == 1:
            latest = max(latest, at)
    return told


def _cut_off(schedule: Schedule, stages: list[Stage]) -> list[str]:
    """Ramps that a later entry of the track takes over before they arrive."""
    told: dict[int, str] = {}
    tracks: dict[str, list[tuple[Entry, Stage]]] = {}
    for stage in stages:
        if stage.entry:
            tracks.setdefault(stage.entry.track, []).append((stage.entry, stage))
    for track in tracks.values():
        for i, (ramp, stage) in enumerate(track):
            if not ramp.over or ramp.operation.fades or math.isinf(stage.by) or ramp.number in told:
                continue
            moved = _numbers(ramp, stage)
            for entry, later in track[i + 1 :]:
                if later.by >= stage.by + ramp.over:
                    break
                if both := sorted(moved & _numbers(entry, stage)):
                    told[ramp.number] = (
                        f"{schedule.place(ramp)}: {ramp}: moves over {ramp.over} iterations, and entry {entry.title} "
                        f"takes {', '.join(both)} over after {later.by - stage.by:.0f} at the latest"
                    )
                    break
    return list(told.values())


def _numbers(entry: Entry, stage: Stage) -> set[str]:
    return {number for name in entry.operation.touches for number in numbers_in(stage.settings, name)}
