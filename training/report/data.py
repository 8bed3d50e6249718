"""What there is to show of a run: series of numbers, markers, operations, the plan beside what happened.

Reads the run folder and nothing else, and draws nothing: the page, a terminal view and trackers show the same. Metrics
are read line by line and kept as numbers, and a long series is thinned so that its extremes stay. Nothing that a folder
says is trusted: what is no line is counted, what is no number left out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrate.training.schedule.file import LONGEST_FILE, Entry, Schedule, parse_schedule, title
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import PARTS, VAL_LOSS, numbers, spoken, told
from orchestrate.training.settings.values import brief, read_at_most
from orchestrate.training.store.run_folder import METRICS, SCHEDULE, RunRecord, SavedCheckpoint, read_run

AXES = ("iter", "tokens", "seconds")
"""What a series can be drawn over."""
MOST_POINTS = 2000
"""Of one series."""
MOST_NAMES = 300
"""Of series."""
MOST_BUCKETS = 200
"""Of a series of times, which are means."""
MOST_MARKERS = 500
"""Of one kind."""
MOST_TEXTS = 20
"""The last samples of the run."""
MOST_LINES = 10**7
"""Of metrics.jsonl: as 8-byte numbers they fit the memory of a machine that trains."""
LONGEST_TEXT = 1000
"""Characters of one text on the page."""
PARTS_OF = "seconds_by_part."


@dataclass(frozen=True)
class Series:
    """Numbers of one name over iterations, tokens and seconds, in the order in which they were measured."""

    name: str
    """A metric's (docs/run_folder.md), or one that is derived from the lines: sequences, tokens_per_iter."""
    void: bool
    """Whether this is what the run went back from. Its branches are parted by a point that is NaN."""
    at: Mapping[str, np.ndarray]
    """By AXES: where each value was measured."""
    values: np.ndarray


@dataclass(frozen=True)
class Marker:
    """Something that happened, at a place on each of AXES."""

    kind: str
    """Of the event. Decisions are guard, repetition or ramp; those that an operation follows are told by it alone."""
    at: Mapping[str, float]
    title: str
    details: tuple[str, ...]
    void: bool


@dataclass(frozen=True)
class OperationRow:
    """An operation that was carried out."""

    entry: str
    """Its number, and the round where there are several; empty of a recovery."""
    at: Mapping[str, float]
    what: str
    desc: str
    reason: str
    changes: tuple[str, ...]
    losses: tuple[float, float] | None
    """Validation loss right before and after, where it was measured."""
    around: tuple[float | None, float | None]
    """At the evaluations next before and after, where it was not."""
    over: int | None
    seconds: float
    parameters: int
    trainable: int
    void: bool


@dataclass(frozen=True)
class PlanRow:
    """An entry of the schedule, and what became of it."""

    number: int
    what: str
    when: str
    desc: str
    happened: str


@dataclass(frozen=True)
class Text:
    """A text that the model wrote."""

    iter: int
    prompt: str
    text: str
    void: bool


@dataclass(frozen=True)
class Story:
    """One run, as far as it can be shown."""

    folder: Path
    name: str
    facts: Mapping[str, str]
    """What it is and how it stands: a name and a text each."""
    state: str
    """How it ended, or that it has not."""
    series: list[Series]
    markers: list[Marker]
    operations: list[OperationRow]
    plan: list[PlanRow]
    texts: list[Text]
    seconds_by_part: Mapping[str, float]
    """Over the whole run, what was taken back included."""
    evaluations: Series | None
    """val_loss of the regular evaluations that count, unthinned: what runs are compared by."""
    notes: list[str]
    ended: bool

    def of(self, name: str, void: bool = False) -> Series | None:
        """The series of a name."""
        return next((s for s in self.series if s.name == name and s.void == void), None)


def read_story(folder: str | Path, schedule: Schedule | None = None) -> Story:
    """Read a run folder. Raises Refused for none, and for one without a line of a run.

    Args:
        schedule: where it is at hand; otherwise the folder's own is read.
    """
    folder, lines = Path(folder), _Lines()
    record = read_run(folder, MOST_LINES, lines.take)
    lines.finish()
    if not record.events and not lines.count:
        hurt = ", ".join(f"{count} lines of {name} cannot be read" for name, count in record.foreign.items() if count)
        raise Refused(f"{folder}: not a run folder, or nothing is logged in it yet{f' ({hurt})' if hurt else ''}")
    clock = _Clock(lines, record.events)
    plan, notes = _plan(folder, record.events, schedule)
    notes = _doubts(record, lines) + notes
    state, ended = _state(record.events)
    evaluations = lines.evaluations
    return Story(
        folder=folder,
        name=folder.resolve().name,
        facts=_facts(record, clock.valid, evaluations),
        state=state,
        series=[*lines.series, *_parameters(record.events, clock)],
        markers=_fewer(_markers(record.events, clock), notes),
        operations=_operations(record.events, clock, evaluations),
        plan=plan,
        texts=_texts(record.events),
        seconds_by_part=lines.parts,
        evaluations=evaluations,
        notes=notes,
        ended=ended,
    )


# ---------------------------------------------------------------------------------------------- metrics

_NO_SERIES = ("best_val_loss", "batch_size", "grad_accum")
"""Numbers of a line that others say better."""


class _Lines:
    """Takes lines of metrics one by one and keeps their numbers, those of lines with the same names in one table.

    Attributes:
        count: lines taken; `impossible`: those left out, because a number in them is beyond what a float holds.
    """

    def __init__(self) -> None:
        self.count = self.impossible = 0
        self._tables: dict[tuple[Any, ...], array] = {}
        """(train, extra, void, *names) -> rows of the line's index and its numbers."""
        self._ways: list[tuple[int, bool]] = []
        """Index of the first line of each stretch without going back, and whether it is void."""
        self._iter = 0.0

    def take(self, line: Mapping[str, Any]) -> None:
        """One line, as run_folder.py declares it."""
        found, void = numbers(line), bool(line.get("void"))
        try:
            row = array("d", (self.count, *found.values()))
        except OverflowError:
            self.impossible += 1
            return
        if not self._ways or self._ways[-1][1] != void or found["iter"] < self._iter:
            self._ways.append((self.count, void))
        self._iter = found["iter"]
        key = (line["kind"] == "train", "why" in line, void, *found)
        if key not in self._tables:
            self._tables[key] = array("d")
        self._tables[key].extend(row)
        self.count += 1

    def finish(self) -> None:
        """To be called after the last line; what follows is asked for then."""
        self.at = {axis: np.zeros(self.count) for axis in AXES}
        train, regular = np.zeros(self.count, dtype=bool), np.zeros(self.count, dtype=bool)
        found: dict[tuple[str, bool], list[tuple[np.ndarray, np.ndarray]]] = {}
        for (is_train, extra, void, *names), table in self._tables.items():
            rows = np.frombuffer(table).reshape(-1, 1 + len(names)).T
            index, columns = rows[0].astype(np.int64), dict(zip(names, rows[1:], strict=True))
            train[index], regular[index] = is_train, not extra
            for axis in AXES:
                self.at[axis][index] = columns.pop(axis)
            if not extra and {"batch_size", "grad_accum"} <= columns.keys():
                columns["sequences"] = columns["batch_size"] * columns["grad_accum"]
                if "sequence_length" in columns:
                    columns["tokens_per_iter"] = columns["sequences"] * columns["sequence_length"]
            for name, values in columns.items():
                # Around an operation only losses are new; the rest repeats the line before.
                if name not in _NO_SERIES and (not extra or name.startswith(VAL_LOSS)):
                    found.setdefault((name, void), []).append((index, values))
        steps = np.diff(self.at["iter"][train], prepend=0.0)
        iters = np.ones(self.count)
        iters[train] = np.where(steps > 0, steps, 1.0)
        self.parts: dict[str, float] = {}
        """Seconds by part, those of what was taken back too."""
        self.left_out = len(dict.fromkeys(name for name, _ in found)) - MOST_NAMES
        kept = list(dict.fromkeys(name for name, _ in found))[:MOST_NAMES]
        self.series: list[Series] = []
        self.evaluations: Series | None = None
        """Of the validation loss: all that count, without the extra ones around operations."""
        for (name, void), pieces in found.items():
            index, values = (np.concatenate(column) for column in zip(*pieces, strict=True))
            order = np.argsort(index, kind="stable")
            order = order[np.isfinite(values[order])]
            index, values = index[order], values[order]
            if name not in kept or not len(index):
                continue
            if name == VAL_LOSS and not void and regular[index].any():
                self.evaluations = self._series(name, void, index[regular[index]], values[regular[index]])
            if name.startswith(PARTS_OF):
                part = name.removeprefix(PARTS_OF)
                self.parts[part] = self.parts.get(part, 0.0) + float(values.sum())
                values = values / iters[index]
            self.series.append(thinned(self._series(name, void, index, values)))

    def _series(self, name: str, void: bool, index: np.ndarray, values: np.ndarray) -> Series:
        at = {axis: places[index] for axis, places in self.at.items()}
        if void:  # what was taken back is drawn branch by branch
            branch = np.searchsorted([start for start, _ in self._ways], index, side="right")
            gaps = np.flatnonzero(np.diff(branch)) + 1
            at = {axis: np.insert(places, gaps, math.nan) for axis, places in at.items()}
            values = np.insert(values, gaps, math.nan)
        return Series(name, void, at, values)

    def branches(self) -> tuple[Branch, list[Branch]]:
        """The lines that count, and each stretch of those taken back."""
        ends = [*(start for start, _ in self._ways), self.count][1:]
        counts = np.zeros(self.count, dtype=bool)
        void = []
        for (start, is_void), end in zip(self._ways, ends, strict=True):
            counts[start:end] = not is_void
            if is_void:
                iters = self.at["iter"]
                begin = start - 1 if start and iters[start - 1] <= iters[start] else start  # where the ways part
                void.append({axis: at[begin:end] for axis, at in self.at.items()})
        return {axis: at[counts] for axis, at in self.at.items()}, void


Branch = Mapping[str, np.ndarray]
"""By AXES: the places of lines."""


def _real(number: Any) -> float | None:
    """A finite number as a float."""
    try:
        value = float(number)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def thinned(series: Series) -> Series:
    """At most about MOST_POINTS points: of each stretch the lowest and the highest, and both ends of the series.

    Times by part are means of stretches instead, because what is shown of them is their sum.
    """
    count = len(series.values)
    mean = series.name.startswith(PARTS_OF)
    if count <= (MOST_BUCKETS if mean else MOST_POINTS):
        return series
    stretches = np.array_split(np.arange(count), MOST_BUCKETS if mean else MOST_POINTS // 2)
    if mean:
        means = np.array([np.nanmean(series.values[s]) if _any(series.values[s]) else np.nan for s in stretches])
        ends = np.array([s[-1] for s in stretches])
        return Series(series.name, series.void, {axis: at[ends] for axis, at in series.at.items()}, means)
    kept = {0, count - 1}
    for s in stretches:
        values = series.values[s]
        if _any(values):
            kept |= {int(s[np.nanargmin(values)]), int(s[np.nanargmax(values)])}
        kept |= {int(i) for i in s[np.isnan(values)][:1]}  # where a branch ends
    order = np.array(sorted(kept))
    return Series(series.name, series.void, {axis: at[order] for axis, at in series.at.items()}, series.values[order])


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def mark(series: Series, axis: str, place: float) -> float | None:
    """The value at a place, between the two measured next to it; None outside of what was measured."""
    at = series.at[axis]
    if not len(at) or not at[0] <= place <= at[-1]:
        return None
    return float(np.interp(place, at, series.values))


# ---------------------------------------------------------------------------------------------- events


class _Clock:
    """Where events lie: they say an iteration and a time of day, and the lines of metrics say the rest."""

    def __init__(self, lines: _Lines, events: Iterable[Mapping[str, Any]]) -> None:
        self.valid, self._void = lines.branches()
        self._seconds: dict[int, float] = {}
        start: tuple[float, float] | None = None
        for event in events:
            time, iteration = _real(event["time"]), _real(event["iter"])
            if time is None or iteration is None:
                continue
            if event["kind"] in ("start", "resume"):
                start = time, 0.0 if event["kind"] == "start" else _at(self.valid, iteration, "seconds")
            if start is not None and time >= start[0]:
                self._seconds[id(event)] = start[1] + time - start[0]

    def place(self, event: Mapping[str, Any]) -> dict[str, float] | None:
        """Where an event lies: a rollback where the way ends that was left, everything else where it says."""
        left = event["kind"] == "rollback"
        iteration = _real(event["from_iter"] if left else event["iter"])
        if iteration is None:
            return None
        branch, seconds = self.valid, self._seconds.get(id(event))
        if (left or event.get("void")) and self._void:
            near = [way for way in self._void if way["iter"][0] <= iteration <= way["iter"][-1]] or self._void
            branch = min(near, key=lambda way: abs(way["seconds"][-1] - (seconds or 0.0)))
        if seconds is None:
            seconds = _at(branch, iteration, "seconds")
        return {"iter": iteration, "tokens": _at(branch, iteration, "tokens"), "seconds": seconds}


def _at(branch: Branch, iteration: float, axis: str) -> float:
    """How far the run was at an iteration, between the two lines next to it; it begins with nothing."""
    iters, values = branch["iter"], branch[axis]
    if not len(iters):
        return 0.0
    if iteration < iters[0]:
        return float(np.interp(iteration, [0.0, iters[0]], [0.0, values[0]]))
    return float(np.interp(iteration, iters, values))


def _parameters(events: Iterable[Mapping[str, Any]], clock: _Clock) -> list[Series]:
    """How many parameters there were, from the events that say so."""
    known = [e for e in events if not e.get("void") and "parameters_total" in e]
    placed = [(place, e) for e in known if (place := clock.place(e)) is not None]
    found = []
    for name in ("parameters_total", "parameters_trainable"):
        rows = [(place, value) for place, e in placed if (value := _real(e[name])) is not None]
        if rows:
            if len(clock.valid["iter"]):  # as many to this day
                rows.append(({axis: float(at[-1]) for axis, at in clock.valid.items()}, rows[-1][1]))
            at = {axis: np.array([place[axis] for place, _ in rows]) for axis in AXES}
            found.append(Series(name, False, at, np.array([value for _, value in rows])))
    return found


def _short(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "..."


def _value(value: Any) -> str:
    return "" if value is None else f" {brief(value)}"


def _what(event: Mapping[str, Any]) -> str:
    return _short(f"{event['name']}{_value(event['value'])}")


def _changes(event: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = event["settings_before"], event["settings_after"]
    return tuple(
        _short(f"{name} {brief(before.get(name))} -> {brief(value)}")
        for name, value in list(after.items())[:20]
        if name != "reshapes_asked"  # a counter that tells a person nothing
    )


def _numbered(event: Mapping[str, Any]) -> str:
    if event.get("entry") is None:
        return ""
    return f"[{_entry(event)}] "


def _entry(event: Mapping[str, Any]) -> str:
    return title(event["entry"], event.get("round", 1), event.get("rounds", 1))


_ENDS = {"guard:": "guard", "the repetition ends": "repetition"}
"""How the reasons of decisions begin that are no firing."""


def _markers(events: Sequence[Mapping[str, Any]], clock: _Clock) -> list[Marker]:
    """What happened, in order."""
    followed = {(e.get("entry"), e["iter"]) for e in events if e["kind"] in ("operation", "error")}
    carried_out: set[int | None] = set()
    found = []
    for event in events:
        kind = event["kind"]
        if kind == "operation":
            carried_out.add(event["entry"])
        if kind == "samples" or (kind == "override" and not event["applied"]):
            continue
        if kind == "decision":
            fires = (event["entry"], event["iter"]) in followed or event["entry"] not in carried_out
            said = (kind for start, kind in _ENDS.items() if event["reason"].startswith(start))
            kind = next(said, "ramp")
            if fires and kind == "ramp":
                continue  # the operation says it again
        if (place := clock.place(event)) is None:
            continue
        title, details = _words(event)
        texts = tuple(_short(text) for text in details if text)
        found.append(Marker(kind, place, _short(title), texts, bool(event.get("void"))))
    return found


def _words(event: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What happened, in a few words, and what more there is to say."""
    kind, number = event["kind"], _numbered(event)
    if kind == "operation":
        losses = event["val_loss_before"], event["val_loss_after"]
        return f"{number}{_what(event)}", [
            event["desc"],
            f"because: {event['reason']}",
            *_changes(event),
            f"over {event['over']} iterations" if event["over"] else "",
            f"val loss {losses[0]:.4f} -> {losses[1]:.4f}" if None not in losses else "",
            f"{event['seconds']:.3g} s; {event['parameters_total']:,} parameters, "
            f"{event['parameters_trainable']:,} trainable",
        ]
    if kind == "decision":
        return f"{number}{event['name']}: {event['reason']}", _measured(event)
    if kind == "rollback":
        back = f"back to iteration {event['iter']} from {event['from_iter']}"
        of_entry = f"{number}{event['name']} is taken back" if "name" in event else ""
        return back, [of_entry, event["reason"], *_measured(event), *event.get("problems", [])]
    if kind == "resume":
        return f"resumed from {Path(event['checkpoint']).name}", [
            *(f"passed over: {problem}" for problem in event["problems"]),
            f"{event['world_size']} x {event['device']}, torch {event['torch']}",
        ]
    if kind == "override":
        return f"{event['key']} {brief(event['before'])} -> {brief(event['after'])}", [event["reason"]]
    if kind == "checkpoint":
        return f"checkpoint: {event['reason']}", [event["path"], f"{event['seconds']:.3g} s"]
    if kind == "emergency":
        saved = event.get("path", "nothing was saved")
        return f"emergency: {event['reason']}", [saved]
    if kind == "error":
        return f"{number}{event['message']}", [event.get("name", ""), event.get("action") or event.get("on_error", "")]
    if kind == "signal":
        return f"signal {event['signal']}", []
    if kind == "end":
        return f"end: {event['reason']}", []
    return "the run begins", [f"{event['world_size']} x {event['device']}, torch {event['torch']}"]


def _measured(event: Mapping[str, Any]) -> list[str]:
    """What a guard looked at."""
    found = []
    for key, before in event.items():
        if key.endswith("_before") and (name := key.removesuffix("_before")) in event:
            values = [value for one in (before, event[name]) if (value := _number(one)) is not None]
            found.append(f"{spoken(name)} {' -> '.join(told(name, value) for value in values)}")
    limit = _number(event.get("limit"))
    return [*found, *([f"allowed: {limit:.6g}"] if limit is not None else [])]


def _number(value: Any) -> float | None:
    return _real(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _fewer(markers: list[Marker], notes: list[str]) -> list[Marker]:
    """At most MOST_MARKERS of a kind, evenly chosen; the first and the last are among them."""
    left_out: set[int] = set()
    for kind in dict.fromkeys(marker.kind for marker in markers):
        places = [i for i, marker in enumerate(markers) if marker.kind == kind]
        if len(places) > MOST_MARKERS:
            chosen = {places[i] for i in np.linspace(0, len(places) - 1, MOST_MARKERS).round().astype(int)}
            left_out |= set(places) - chosen
            notes.append(f"{len(chosen)} of {len(places):,} markers of the kind {kind} are shown")
    return [marker for i, marker in enumerate(markers) if i not in left_out]


def _operations(events: Iterable[Mapping[str, Any]], clock: _Clock, evaluations: Series | None) -> list[OperationRow]:
    rows = []
    for event in events:
        if event["kind"] != "operation" or (place := clock.place(event)) is None:
            continue
        before, after = event["val_loss_before"], event["val_loss_after"]
        around: tuple[float | None, float | None] = None, None
        if evaluations is not None and not event.get("void"):
            iters, values = evaluations.at["iter"], evaluations.values
            next_one = int(np.searchsorted(iters, place["iter"], side="right"))
            around = (
                float(values[next_one - 1]) if next_one else None,
                float(values[next_one]) if next_one < len(values) else None,
            )
        rows.append(
            OperationRow(
                entry="" if event["entry"] is None else _entry(event),
                at=place,
                what=_what(event),
                desc=_short(event["desc"]),
                reason=_short(event["reason"]),
                changes=_changes(event),
                losses=(before, after) if before is not None and after is not None else None,
                around=around,
                over=event["over"],
                seconds=event["seconds"],
                parameters=event["parameters_total"],
                trainable=event["parameters_trainable"],
                void=bool(event.get("void")),
            )
        )
    return rows


def _texts(events: Iterable[Mapping[str, Any]]) -> list[Text]:
    """The last ones."""
    samples = [event for event in events if event["kind"] == "samples"][-MOST_TEXTS:]
    texts = [
        Text(event["iter"], _short(text["prompt"]), _short(text["text"]), bool(event.get("void")))
        for event in samples
        for text in event["texts"]
    ]
    return texts[-MOST_TEXTS:]


# ---------------------------------------------------------------------------------------------- plan


def _plan(
    folder: Path, events: Sequence[Mapping[str, Any]], schedule: Schedule | None
) -> tuple[list[PlanRow], list[str]]:
    """The schedule's entries and what became of each; notes where it cannot be read."""
    try:
        schedule = schedule or _schedule(folder)
    except Refused as error:
        return [], [f"the plan is not shown: {_short(error.problems[0])}"]
    happened: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if isinstance(number := event.get("entry"), int):
            happened.setdefault(number, []).append(event)
    first = {entry.number: entry for entry in reversed(schedule.entries)}  # of its rounds
    return [
        PlanRow(number, _short(entry), _short(_when(entry)), _short(entry.desc), _happened(happened.get(number, [])))
        for number, entry in sorted(first.items())
    ], []


def _when(entry: Entry) -> str:
    guard = entry.guard
    facts = [
        " or ".join(map(str, entry.triggers)) or "at once",
        f"after {entry.after}" if entry.after else "",
        f"{entry.rounds} rounds" if entry.rounds > 1 else "",
        f"track {entry.track}" if entry.track else "",
        f"over {entry.over} iterations" if entry.over else "",
        f"guard: {guard.metric}, {guard.within_iters} iterations, then {guard.then}" if guard else "",
    ]
    return "; ".join(filter(None, facts))


def _schedule(folder: Path) -> Schedule:
    """The schedule of the latest start. Raises Refused."""
    path = folder / SCHEDULE
    try:
        text = read_at_most(path, LONGEST_FILE).decode("utf-8")
    except FileNotFoundError:
        return Schedule()
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read ({error})") from None
    try:
        return parse_schedule(text, str(path))
    except Refused as refused:
        try:  # it may be in JSON that is no YAML
            return parse_schedule(text, f"{path}.json")
        except Refused:
            raise refused from None


def _happened(events: Sequence[Mapping[str, Any]]) -> str:
    """What became of an entry, from the events about it; nothing where it has not fired."""
    said = []
    for event in events:
        which = f"round {event['round']}, " if event.get("rounds", 1) > 1 else ""
        if event["kind"] == "operation":
            back = " (taken back)" if event.get("void") else ""
            said.append(f"{which}iteration {event['iter']}: {event['reason']}{back}")
        elif event.get("void"):
            continue
        elif event["kind"] == "rollback":
            said.append(f"{which}taken back at {event['from_iter']}: {event['reason']}")
        elif event["kind"] == "error":
            said.append(f"{which}failed at iteration {event['iter']}: {event['message']}")
        elif event["reason"].startswith(tuple(_ENDS)):
            said.append(f"iteration {event['iter']}: {event['reason']}")
    if len(said) > 2 * _ENDS_SHOWN:
        said[_ENDS_SHOWN:-_ENDS_SHOWN] = [f"{len(said) - 2 * _ENDS_SHOWN} more"]
    return _short("; ".join(said))


_ENDS_SHOWN = 3
"""Of what happened to one entry: so many of the first, and of the last."""


# ---------------------------------------------------------------------------------------------- facts


def _state(events: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """How the run ended, in words, and whether it did."""
    last = next((e for e in reversed(events) if e["kind"] in ("start", "resume", "end", "emergency")), None)
    if last is None or last["kind"] in ("start", "resume"):
        return "no end is recorded: it is under way, or was killed", False
    when = f"at iteration {last['iter']}"
    if last["kind"] == "emergency":
        return _short(f"died {when}: {last['reason']}"), True
    return _short(f"ended {when}: {last['reason']}"), True


def _facts(record: RunRecord, valid: Branch, evaluations: Series | None) -> dict[str, str]:
    last = {axis: float(at[-1]) if len(at) else 0.0 for axis, at in valid.items()}
    begins = [e for e in record.events if e["kind"] in ("start", "resume")]
    facts = {
        "iterations": f"{last['iter']:,.0f}",
        "tokens": f"{last['tokens']:,.0f}",
        "time": duration(last["seconds"]),
    }
    if evaluations is not None:
        best = int(np.nanargmin(evaluations.values))
        facts["best val loss"] = f"{evaluations.values[best]:.4f} at iteration {evaluations.at['iter'][best]:,.0f}"
        facts["last val loss"] = f"{evaluations.values[-1]:.4f}"
    known = [e for e in record.events if "parameters_total" in e and not e.get("void")]
    if known:
        total, trainable = known[-1]["parameters_total"], known[-1]["parameters_trainable"]
        facts["parameters"] = f"{total:,}, {trainable:,} trainable"
    if begins:
        first, now = begins[0], begins[-1]
        facts["model"] = _shapes(record.events)
        facts["data"] = brief(now["config"].get("dataset"))
        facts["machine"] = f"{now['world_size']} x {now['device']}, {now['dtype']}, torch {now['torch']}"
        if code := now.get("code"):
            facts["code"] = f"{code['commit'][:12]}{_CLEAN[code['clean']]}"
        if parent := first.get("parent"):
            facts["weights of"] = f"{parent.get('run')}, {parent.get('checkpoint')}"
        facts["starts"] = f"{len(begins)}"
    facts["checkpoints"] = ", ".join(map(_checkpoint, record.checkpoints[:4])) or "none"
    return {name: _short(text) for name, text in facts.items() if text}


def _shapes(events: Iterable[Mapping[str, Any]]) -> str:
    """The model at the start and now: 2 -> 4 layers, 64 wide."""
    first: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for event in events:
        if event["kind"] in ("start", "resume") and isinstance(model := event["settings"].get("model"), Mapping):
            now = dict(model)
            first = first or now
        elif event["kind"] == "operation" and not event.get("void"):
            after = event["settings_after"].items()
            now = {**now, **{name.removeprefix("model."): value for name, value in after}}
    words = {"n_layer": "layers", "n_embd": "wide", "n_head": "heads", "block_size": "tokens", "vocab_size": "words"}
    values = {name: list(dict.fromkeys([brief(first[name]), brief(now[name])])) for name in words if name in first}
    return ", ".join(f"{' -> '.join(both)} {words[name]}" for name, both in values.items())


_CLEAN = {True: "", False: ", with changes that are not committed", None: ""}


def _checkpoint(saved: SavedCheckpoint) -> str:
    links = [link for link in ("latest", "best") if getattr(saved, link)]
    return saved.name + (f" ({', '.join(links)})" if links else "")


def duration(seconds: float) -> str:
    """Seconds for a person: 12.3 s, 4 min 5 s, 3 h 12 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    for unit, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller)} {small}"
    raise AssertionError


def _doubts(record: RunRecord, lines: _Lines) -> list[str]:
    """What a reader must know before believing the rest."""
    notes = [
        f"{count} line{'s' if count > 1 else ''} of {name} cannot be read and {'are' if count > 1 else 'is'} left out"
        for name, count in record.foreign.items()
        if count
    ]
    if lines.impossible:
        notes.append(f"{lines.impossible} lines of {METRICS} hold numbers that cannot be and are left out")
    if lines.left_out > 0:
        notes.append(f"{lines.left_out} names of numbers are left out beyond the first {MOST_NAMES}")
    if not record.events:
        notes.append("there are no events: what happened beside the losses is not known")
    return notes


def known_parts(names: Iterable[str]) -> list[str]:
    """Parts of the loop in their usual order, those of other versions behind."""
    given = list(names)
    return [part for part in PARTS if part in given] + sorted(set(given) - set(PARTS))
