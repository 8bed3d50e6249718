"""A schedule's file: its tracks, and their entries, each validated by itself.

The file (YAML or JSON) is parsed with line numbers, so that every error names file, line, what was given and what is
allowed; all errors come at once (`Refused`). What is repeated is written out here, a step for each round, so nothing
behind knows of repetitions but what a step says of itself. Whether the entries fit each other and the model is
stages.py's to say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, ValidationError, model_validator

from orchestrate.training.operations import Operation, make
from orchestrate.training.schedule.triggers import TRIGGERS, OnMetric, Trigger, together
from orchestrate.training.settings.errors import Refused, ScheduleError
from orchestrate.training.settings.metrics import NAMES, VAL_LOSS, MetricName, in_nats, is_metric, rises
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import (
    MOST_PROBLEMS,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    nearest,
    problems_of,
    read_at_most,
    shown,
)


class Guard(BaseModel):
    """What to do when an entry hurts: a metric's values in the iterations after it are compared with the one before it.

    val_loss is measured right before the entry and at the end of the window where there is no evaluation. Of another
    metric the value logged last before the entry counts, and the entry waits until there is one. The last value that is
    looked at is the first one at or after the end of the window.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
    metric: MetricName = VAL_LOSS
    """The metric that is compared."""
    max_increase: NonNegativeFloat = 0.05
    """How much higher the metric may be than right before the entry; must be given where it is not a loss, in nats."""
    max_decrease: NonNegativeFloat = 0.0
    """How much lower a task's score may be: more is better of it, so this is given in the place of max_increase."""
    within_iters: PositiveInt = 200
    """Iterations in which its values count."""
    then: Literal["revert", "keep", "stop"] = "revert"
    """Go back to the state before the entry | only log that it hurt | end the run."""

    @model_validator(mode="after")
    def _in_units_of_the_metric(self) -> Guard:
        limits = {"max_increase", "max_decrease"}.intersection(self.model_fields_set)
        if rises(self.metric) and limits != {"max_decrease"}:
            raise ValueError(f"must give max_decrease and no max_increase: more is better of {self.metric}")
        if not rises(self.metric) and "max_decrease" in limits:
            raise ValueError(f"max_decrease is for scores of tasks: less is better of {self.metric}")
        if not in_nats(self.metric) and not limits:
            raise ValueError(
                f"must give max_increase: its default {self.max_increase} is in nats, {self.metric} is not"
            )
        return self


RampStyle = Literal["constant", "linear", "cosine", "power"]
"""How `over: N` moves a number: not at all until its end | evenly | by half a cosine | by the share of N to the power
`exponent`. All begin at the value in force and end at the operation's, exactly."""


Name = Annotated[str, Field(min_length=1, max_length=60)]
"""Of a label or a track."""


class Repeat(BaseModel):
    """How often an entry or a block is done: N times, or at most so often and no more once a metric is there.

    It is done once in any case. `until` is looked at while the next round has not begun.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
    times: PositiveInt
    """Rounds, at most."""
    until: OnMetric | None = None
    """No further round once this metric is there."""

    @model_validator(mode="before")
    @classmethod
    def _or_a_number(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"times": given}
        if not isinstance(given, dict | Repeat):
            raise ValueError("must be a number of rounds, or a mapping of times and until")
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 1}, handler(core)]}


class _Block(BaseModel):
    """Entries that are repeated together."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    repeat: Repeat
    do: Annotated[list[Any], Field(min_length=1)]
    label: Name = ""


class EntryFields(BaseModel):
    """The fields of an entry that are neither the operation's argument nor a trigger."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """The operation."""
    reevaluate: bool = False
    """Measure val_loss right before (unless just done) and after, log both, and end this boundary for the track."""
    desc: str = ""
    """A remark; it goes into the log."""
    over: PositiveInt | None = None
    """Iterations in which the number moves there gradually, or in which new weights fade in."""
    style: RampStyle = "linear"
    """How `over` moves a number: constant holds the old value for all of it, power has an `exponent`."""
    exponent: PositiveFloat | None = None
    """Of style power: the share of `over` to this power."""
    on_error: Literal["stop", "skip"] = "stop"
    """What follows where the entry cannot be carried out in the run: stop it, or go on without the entry."""
    guard: Guard | None = None
    """What takes the entry back where it hurts."""
    label: Name = ""
    """A name for this entry, for `after`; a repetition's is for its end."""
    after: Name = ""
    """The label of an entry or a block: waits count from when that has fired, and until then this entry does not."""
    repeat: Repeat = Repeat(times=1)
    """How often it is done: a number of rounds, or {times, until}."""


# Fields of an entry that no trigger may be called by.
RESERVED = ("name", "value", *[field for field in EntryFields.model_fields if field != "name"])


def entry_fields() -> tuple[str, ...]:
    """Every field that an entry may have; the triggers among them are those registered now."""
    return (*RESERVED, *TRIGGERS)


def title(number: int, round: int, rounds: int) -> str:
    """An entry's number, and the round where there are several: 3, or 3 (round 2 of 5)."""
    return f"{number} (round {round} of {rounds})" if rounds > 1 else str(number)


@dataclass(frozen=True)
class Until:
    """What ends a repetition before its last round."""

    condition: Trigger
    steps: int
    """How many of the track are left out then: this round and those behind it."""
    closes: str
    """As `Entry.closes`, of the last of them."""


@dataclass(frozen=True)
class Entry:
    """One step of the plan: an operation, when it fires, and how. What is repeated is a step for each round."""

    number: int
    """1 for the first in the file, the same in each round."""
    line: int
    """Of the schedule file; 0 where unknown."""
    operation: Operation
    triggers: tuple[Trigger, ...]
    reevaluate: bool
    desc: str
    over: int | None
    style: RampStyle
    exponent: float
    """1.0 where the style is not power."""
    on_error: str
    guard: Guard | None
    given: Mapping[str, Any]
    """As it was written, but for `repeat`; for the log and to recognise it after a resume."""
    label: str = ""
    after: str = ""
    """The label from whose firing waits count; empty where they count from the step before."""
    track: str = ""
    step: int = 0
    """Place in its track, from 1."""
    round: int = 1
    rounds: int = 1
    until: Until | None = None
    """At the first step of each further round."""
    closes: str = ""
    """The label of the repetition that is over with this step, whatever became of its rounds."""

    @property
    def value(self) -> Any:
        return self.given.get("value")

    @property
    def watched(self) -> tuple[Trigger, ...]:
        """Its triggers, and what may end the repetition instead."""
        return (*self.triggers, self.until.condition) if self.until else self.triggers

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics that its triggers, its guard and its repetition look at."""
        return frozenset({*together(self.watched), *([self.guard.metric] if self.guard else [])})

    @property
    def title(self) -> str:
        """Its number, and the round where there are several."""
        return title(self.number, self.round, self.rounds)

    @property
    def told(self) -> dict[str, Any]:
        """What every event about it says."""
        facts: dict[str, Any] = {"entry": self.number, "name": self.operation.name}
        if self.track:
            facts["track"] = self.track
        if self.rounds > 1:
            facts |= {"round": self.round, "rounds": self.rounds}
        return facts if self.step == self.number else {**facts, "step": self.step}

    def plan(self, settings: Settings) -> Settings:
        """The settings after this entry, once any ramp of it has arrived. Pure. Raises ScheduleError."""
        after = self.operation.plan(settings)
        if self.over and self.operation.fades:
            self.operation.fade(settings, after)  # raises where it cannot be faded in
        return after

    def __str__(self) -> str:
        value = "" if self.value is None else f" {json.dumps(self.value)}"
        return f"{self.given['name']}{value}"


@dataclass(frozen=True)
class Schedule:
    """Tracks of entries, each in the order in which they fire, and the text they were read from."""

    tracks: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """By name, in the order of the file. A plain list is the track without a name."""
    source: str = ""
    """The file's name, for messages."""
    text: str = ""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The steps of all tracks, one track after the other."""
        return tuple(entry for track in self.tracks.values() for entry in track)

    def place(self, entry: Entry) -> str:
        """Where an entry stands, for messages."""
        return (
            f"{self.source}:{entry.line}: entry {entry.title}" if entry.line else f"{self.source}: entry {entry.title}"
        )


# ---------------------------------------------------------------------------------------------- reading the file


# No schedule that people or programs write is near these. They are counted with every alias written out, and before
# anything is built, so that a short file cannot become a long one. A vocabulary map is the longest thing in a schedule.
LONGEST_FILE = 8 * 2**20
"""Bytes."""
MOST_VALUES = 300_000
MOST_ENTRIES, MOST_TRACKS = 10_000, 100
DEEPEST = 40
_LONGEST_NUMBER = 256
"""Characters. The time to read a number grows with the square of its digits."""


class _Composer(yaml.composer.Composer):
    """Composes YAML nodes and counts them; an alias counts as much as what it stands for."""

    def __init__(self) -> None:
        yaml.composer.Composer.__init__(self)
        self._values = self._depth = 0
        self._sizes: dict[str, int] = {}  # of anchors whose node is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        mark, before = event.start_mark, self._values
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise yaml.composer.ComposerError(None, None, f"*{event.anchor} stands inside &{event.anchor}", mark)
            self._values += self._sizes.get(event.anchor, 0)
        else:
            self._values += 1
            self._depth += 1
        if self._values > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES:,} values, aliases included", mark)
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._depth -= 1
            if event.anchor is not None:
                self._sizes[event.anchor] = self._values - before
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _LONGEST_NUMBER:
            raise yaml.composer.ComposerError(None, None, f"a number of {len(node.value)} characters", mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A key may stand once among those that are written here; what `<<` brings is there to be overridden."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def resolve(self, kind: type, value: str, implicit: Any) -> str:
        """The tag of a node. A long plain scalar is text: the patterns of numbers are never tried on it."""
        if kind is yaml.ScalarNode and implicit[0] and len(value) > _LONGEST_NUMBER:
            implicit = (False, True)
        return super().resolve(kind, value, implicit)


def _loader(base: type) -> type:
    """Safe YAML of bounded size in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key given twice is an error.

    Args:
        base: one of PyYAML's safe loaders; the one in C reads four times as fast and need not be there.
    """

    class Loader(_Composer, base):
        def __init__(self, text: str) -> None:
            base.__init__(self, text)
            _Composer.__init__(self)
            self.lines: dict[int, list[int]] = {}
            """id of a list -> the line of each of its items."""

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            made = base.construct_object(self, node, deep)
            if isinstance(node, yaml.SequenceNode):
                self.lines[id(made)] = [item.start_mark.line + 1 for item in node.value]
            return made

    Loader.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$"
            r"|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    )
    # Plain integers must still be integers: the resolver that was added last is asked last, and int comes first.
    return Loader


_Loader = _loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)


Lines = Callable[[list], list[int]]
"""The line of each item of a list in the document."""


def _parse_yaml(text: str) -> tuple[Any, Lines]:
    """The document and where its lists are. Raises ValueError with "line N: ..." in the message."""
    loader = _Loader(text)
    try:
        document = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
    finally:
        loader.dispose()
    return document, lambda items: loader.lines.get(id(items), [0] * len(items))


class _Decoder(json.JSONDecoder):
    """Notes where the items of every list begin: `starts`, by the list's id."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.starts: dict[int, list[int]] = {}
        self.parse_array = self._array
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _array(self, text_and_end: tuple[str, int], scan: Callable[[str, int], Any]) -> tuple[list[Any], int]:
        starts: list[int] = []

        def noted(text: str, at: int) -> Any:
            starts.append(at)
            return scan(text, at)

        items, end = json.decoder.JSONArray(text_and_end, noted)  # type: ignore[attr-defined]
        self.starts[id(items)] = starts
        return items, end


def _parse_json(text: str) -> tuple[Any, Lines]:
    """The document and where its lists are. Raises ValueError with "line N: ..." in the message."""
    decoder = _Decoder(object_pairs_hook=_no_doubles, parse_int=_whole_number)
    try:
        document = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg})") from None
    _check_size(document)

    def lines(items: list) -> list[int]:
        found, line, seen = [], 1, 0
        for at in decoder.starts.get(id(items), []):
            line, seen = line + text.count("\n", seen, at), at
            found.append(line)
        return found

    return document, lines


def _whole_number(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    return int(text)


def _check_size(document: Any) -> None:
    """Raises ValueError for a JSON document that is longer or deeper than any schedule."""
    level, values = [document], 0
    for _ in range(DEEPEST):
        values += len(level)
        if values > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        level = [inner for value in level if isinstance(value, list | dict) for inner in _inner(value)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def _inner(value: list | dict) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{shown(counts.most_common(1)[0][0])} is given twice")
    return made


def read_schedule(path: str | Path) -> Schedule:
    """Read and validate a schedule file. Raises Refused with every problem that can be seen without settings."""
    try:
        raw = read_at_most(path, LONGEST_FILE)
    except OSError as error:
        raise Refused(f"schedule {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise Refused(f"schedule {path}: {error}") from None
    try:
        return parse_schedule(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise Refused(f"schedule {path}: not UTF-8 text (byte {error.start})") from None


def parse_schedule(text: str, source: str) -> Schedule:
    """A schedule from its text; `source` is the name for messages and tells JSON by its ending. Raises Refused."""
    try:
        document, lines = (_parse_json if source.endswith(".json") else _parse_yaml)(text)
    except RecursionError:
        raise Refused(f"{source}: nested too deeply to be a schedule") from None
    except ValueError as error:
        raise Refused(f"{source}: {error}") from None
    reader = _Reader(source, lines)
    tracks = reader.tracks(document)
    if not reader.problems:
        reader.check_order(tracks)
    if reader.problems:
        raise Refused(reader.problems)
    return Schedule(tracks, source, text)


class _Reader:
    """Reads the tracks of a document, and gathers every problem of them."""

    def __init__(self, source: str, lines: Lines) -> None:
        self.source, self.lines = source, lines
        self.problems: list[str] = []
        self._entries = self._steps = 0
        self._labels: dict[str, str] = {}
        """Label -> where it is given."""

    def tracks(self, document: Any) -> dict[str, tuple[Entry, ...]]:
        """The tracks by name. Raises Refused where it is none, or so much is wrong that the rest is not looked at."""
        source, lists = self.source, {"": document}
        if isinstance(document, dict):
            for key in [key for key in document if key not in ("operations", "tracks")][:MOST_PROBLEMS]:
                self.problems.append(
                    f"{source}: unknown key {shown(key)} beside `operations`; known: operations, tracks"
                )
            if not {"operations", "tracks"} & document.keys():
                problem = f"{source}: a mapping needs the key `operations` with a list of entries, or `tracks`"
                raise Refused([*self.problems, problem])
            lists = {}
            for key in document:
                if key == "operations":
                    lists[""] = document[key]
                elif key == "tracks":
                    lists |= self._named(document[key])
        for name, items in lists.items():
            if items is not None and not isinstance(items, list):
                of, given = (f"track {shown(name)} is" if name else "a schedule is"), shown(items)
                raise Refused(
                    [*self.problems, f"{source}: {of} a list of entries (or {{operations: [...]}}), got {given}"]
                )
        written = [self._inside(items or []) for items in lists.values()]
        if (count := sum(map(len, written))) > MOST_ENTRIES:
            raise Refused(f"{source}: a schedule has at most {MOST_ENTRIES:,} entries, got {count:,}")
        flat = [item for items in written for item in items]
        completed = [i for i, given in enumerate(flat, 1) if isinstance(given, dict) and "completed" in given]
        if completed:
            numbers = ", ".join(map(str, completed[:10])) + (", ..." if len(completed) > 10 else "")
            self.problems.append(
                f"{source}: entries {numbers}: remove the field `completed`: what has fired is kept in the run folder, "
                "and a resume goes on from there"
            )
        return {name: self._track(name, items) if items else () for name, items in lists.items()}

    def _named(self, tracks: Any) -> dict[str, Any]:
        if not isinstance(tracks, dict) or not tracks:
            raise Refused(f"{self.source}: tracks must be a mapping of names to lists of entries, got {shown(tracks)}")
        if len(tracks) > MOST_TRACKS:
            raise Refused(f"{self.source}: a schedule has at most {MOST_TRACKS} tracks, got {len(tracks):,}")
        for name in tracks:
            try:
                TypeAdapter(Name).validate_python(name)
            except ValidationError:
                self.problems.append(f"{self.source}: a track's name is text of 1 to 60 characters, got {shown(name)}")
        return {str(name): items for name, items in tracks.items()}

    def _inside(self, items: list[Any]) -> list[Any]:
        """The entries of a list, those of its blocks in their place."""
        found: list[Any] = []
        for item in items:
            is_block = isinstance(item, dict) and isinstance(item.get("do"), list)
            found += item["do"] if is_block else [item]
        return found

    def _track(self, name: str, items: list[Any]) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for item, line in zip(items, self.lines(items), strict=True):
            if isinstance(item, dict) and "do" in item:
                found += self._block(item, line)
            else:
                found += self._repeated(item, line)
        return tuple(replace(entry, track=name, step=step) for step, entry in enumerate(found, 1))

    def _block(self, given: dict[Any, Any], line: int) -> list[Entry]:
        """The steps of a block."""
        first, count = self._entries + 1, len(given["do"]) if isinstance(given["do"], list) else 0
        place = f"{self.source}:{line}: the block of entries {first} to {self._entries + count}"
        try:
            block = _Block.model_validate({str(key): value for key, value in given.items()})
        except ValidationError as error:
            found = [(".".join(map(str, location)), text) for location, text in problems_of(error, _Block)]
            self.problems += [f"{place}: {location} {text}" for location, text in found]
            self._entries += count
            return []
        body = []
        for item, at in zip(given["do"], self.lines(given["do"]), strict=True):
            if isinstance(item, dict) and (again := {"do", "repeat"} & item.keys()):
                self._entries += 1
                self.problems.append(
                    f"{self.source}:{at}: entry {self._entries}: `{min(again)}` cannot stand inside a block, which is "
                    "repeated itself: write the inner rounds out"
                )
            elif (entry := self._one(item, at)) is not None:
                body.append(entry)
        self._name(block.label, place)
        return self._rounds(body, block.repeat, block.label)

    def _repeated(self, given: Any, line: int) -> list[Entry]:
        """The steps of an entry."""
        entry = self._one(given, line)
        if entry is None:
            return []
        repeat = Repeat.model_validate(1 if given.get("repeat") is None else given["repeat"])
        if repeat.times == 1:
            return self._rounds([entry], repeat, "")
        return self._rounds([replace(entry, label="")], repeat, entry.label)

    def _rounds(self, body: list[Entry], repeat: Repeat, label: str) -> list[Entry]:
        """A step for each entry and round; `label` is that of the whole."""
        self._steps += len(body) * repeat.times
        if self._steps > MOST_ENTRIES:
            raise Refused(
                [
                    *self.problems,
                    f"{self.source}: a schedule has at most {MOST_ENTRIES:,} entries, every round counted",
                ]
            )
        labels, steps = {entry.label for entry in body}, []
        for round in range(1, repeat.times + 1):
            for i, entry in enumerate(body):
                until = None
                if repeat.until and round > 1 and i == 0:
                    left = len(body) * (repeat.times - round + 1)
                    until = Until(TRIGGERS["trigger"](value=repeat.until), left, label)
                steps.append(
                    replace(
                        entry,
                        round=round,
                        rounds=repeat.times,
                        until=until,
                        # A wait begins anew in each round: from there on what stands before it counts.
                        after=entry.after if round == 1 or entry.after in labels else "",
                        closes=label if round == repeat.times and i == len(body) - 1 else "",
                    )
                )
        return steps

    def _one(self, given: Any, line: int) -> Entry | None:
        """The next entry; None where something is wrong with it. Raises Refused where too much is by now."""
        self._entries += 1
        place = f"{self.source}:{line}: entry {self._entries}"
        if len(self.problems) > MOST_PROBLEMS:
            raise Refused([*self.problems, f"{place} and those after it were not looked at"])
        try:
            entry = _entry(self._entries, line, given)
        except ScheduleError as error:
            self.problems += [f"{place}: {problem}" for problem in error.problems]
            return None
        self._name(entry.label, place)
        return entry

    def _name(self, label: str, place: str) -> None:
        if label and label in self._labels:
            self.problems.append(f"{place}: label {shown(label)} is that of {self._labels[label]} already")
        elif label:
            self._labels[label] = place

    def check_order(self, tracks: Mapping[str, tuple[Entry, ...]]) -> None:
        """Every `after` names what can fire before it."""
        unknown = {e.number: e for track in tracks.values() for e in track if e.after and e.after not in self._labels}
        self.problems += [
            f"{self.source}:{entry.line}: entry {entry.number}: after {shown(entry.after)}: no entry and no block has "
            f"this label{nearest(entry.after, self._labels)}"
            for entry in unknown.values()
        ]
        done, known, went_on = dict.fromkeys(tracks, 0), {""}, not unknown
        while went_on:
            went_on = False
            for name, track in tracks.items():
                while done[name] < len(track) and track[done[name]].after in known:
                    known |= {track[done[name]].label, track[done[name]].closes}
                    done[name], went_on = done[name] + 1, True
        stuck = [] if unknown else [track[done[name]] for name, track in tracks.items() if done[name] < len(track)]
        self.problems += [
            f"{self.source}:{entry.line}: entry {entry.number}: after {shown(entry.after)}: "
            f"{self._labels[entry.after]} waits for this entry, itself or in a circle of others: it would never fire"
            for entry in stuck
        ]


def _entry(number: int, line: int, given: Any) -> Entry:
    """One entry, validated by itself. Raises ScheduleError with all its problems."""
    if not isinstance(given, dict):
        raise ScheduleError(f"an entry is a mapping with `name`, got {shown(given)}")
    if "name" not in given:
        raise ScheduleError(f"has no `name`; got the fields {', '.join(map(shown, list(given)[:10])) or 'none'}")
    known = entry_fields()
    unknown = [key for key in given if key not in known and key != "completed"][:MOST_PROBLEMS]
    problems = [f"unknown field {shown(key)}{nearest(key, known)}" for key in unknown]
    fields = {
        key: value
        for key, value in given.items()
        # A person writes `trigger_loss: null` for no trigger.
        if key in known and not (value is None and key not in ("name", "value"))
    }
    title = f"{given['name'][:60]}: " if isinstance(given["name"], str) else ""

    operation = common = None
    try:
        operation = make(given["name"], {"value": fields["value"]} if "value" in fields else {})
    except ScheduleError as error:
        problems += error.problems
    try:
        common = EntryFields(**{key: fields[key] for key in EntryFields.model_fields if key in fields})
    except ValidationError as error:
        problems += [
            f"{title}{'.'.join(map(str, loc))} {message}"
            for loc, message in problems_of(error, EntryFields)
            if loc[0] != "name"
        ]
    triggers: list[Trigger] = []
    for name, trigger in TRIGGERS.items():
        if name not in fields:
            continue
        try:
            triggers.append(trigger(value=fields[name]))
        except ValidationError as error:
            problems += [
                f"{title}{'.'.join([name, *map(str, loc[1:])])} {message}"
                for loc, message in problems_of(error, trigger)
            ]
    problems += [
        f"{title}{one.field} looks at {shown(name)}, which is no metric{nearest(name, NAMES)}"
        for one in triggers
        for name in one.looks_at
        if not is_metric(name)
    ]
    if operation and common and common.over and not (operation.ramps or operation.fades):
        problems.append(f"{title}`over` moves a number or fades new weights in; {operation.name} does neither")
    if "style" in fields and "over" not in fields:
        problems.append(f"{title}`style` says how `over` moves a number, and there is no `over`")
    if common and (common.style == "power") != (common.exponent is not None):
        problems.append(f"{title}style power and `exponent` go together: got {common.style} and {common.exponent}")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        problems.append(f"{title}only text, numbers, true, false, null, lists and mappings are allowed in an entry")
    if problems or operation is None or common is None:
        raise ScheduleError(problems)
    return Entry(
        number=number,
        line=line,
        operation=operation,
        triggers=tuple(triggers),
        reevaluate=common.reevaluate,
        desc=common.desc,
        over=common.over,
        style=common.style,
        exponent=1.0 if common.exponent is None else common.exponent,
        on_error=common.on_error,
        guard=common.guard,
        given={key: value for key, value in given.items() if key != "repeat"},
        label=common.label,
        after=common.after,
    )
