"""A schedule's file and its entries, each validated by itself.

The file (YAML or JSON) is parsed with line numbers, so that every error names file, line, what was given and what is
allowed; all errors come at once (`Refused`). Whether the entries fit each other and the model is stages.py's to say.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrate.training.operations import Operation, make
from orchestrate.training.schedule.triggers import TRIGGERS, Trigger
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

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    metric: MetricName = VAL_LOSS
    max_increase: NonNegativeFloat = 0.05
    """How much higher the metric may be than right before the entry; must be given where it is not a loss, in nats."""
    max_decrease: NonNegativeFloat = 0.0
    """How much lower a task's score may be: more is better of it, so this is given in the place of max_increase."""
    within_iters: PositiveInt = 200
    then: Literal["revert", "keep", "stop"] = "revert"

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


class _EntryFields(BaseModel):
    """The fields of an entry that are neither the operation's argument nor a trigger."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    reevaluate: bool = False
    desc: str = ""
    over: PositiveInt | None = None
    style: RampStyle = "linear"
    exponent: PositiveFloat | None = None
    on_error: Literal["stop", "skip"] = "stop"
    guard: Guard | None = None


# Fields of an entry that no trigger may be called by.
RESERVED = ("name", "value", *[field for field in _EntryFields.model_fields if field != "name"])


def entry_fields() -> tuple[str, ...]:
    """Every field that an entry may have; the triggers among them are those registered now."""
    return (*RESERVED, *TRIGGERS)


@dataclass(frozen=True)
class Entry:
    """One line of the plan: an operation, when it fires, and how."""

    number: int
    """1 for the first."""
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
    """As it was written, for the log and to recognise it after a resume."""

    @property
    def value(self) -> Any:
        return self.given.get("value")

    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics that its triggers and its guard look at."""
        guarded = [self.guard.metric] if self.guard else []
        return frozenset(guarded).union(*(trigger.looks_at for trigger in self.triggers))

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
    """Entries in the order in which they fire, and the text they were read from."""

    entries: tuple[Entry, ...] = ()
    source: str = ""
    """The file's name, for messages."""
    text: str = ""

    @property
    def as_given(self) -> list[Mapping[str, Any]]:
        return [entry.given for entry in self.entries]


# ---------------------------------------------------------------------------------------------- reading the file


# No schedule that people or programs write is near these. They are counted with every alias written out, and before
# anything is built, so that a short file cannot become a long one. A vocabulary map is the longest thing in a schedule.
LONGEST_FILE = 8 * 2**20
"""Bytes."""
MOST_VALUES = 300_000
MOST_ENTRIES = 10_000
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


def _parse_yaml(text: str) -> tuple[Any, list[int]]:
    """The document and the line of each entry. Raises ValueError with "line N: ..." in the message."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
    finally:
        loader.dispose()
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "operations"), None)
    return document, [item.start_mark.line + 1 for item in node.value] if isinstance(node, yaml.SequenceNode) else []


def _parse_json(text: str) -> tuple[Any, list[int]]:
    """The document and the line of each entry. Raises ValueError with "line N: ..." in the message."""
    try:
        document = json.loads(text, object_pairs_hook=_no_doubles, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON ({error.msg})") from None
    _check_size(document)
    entries = document.get("operations") if isinstance(document, dict) else document
    lines: list[int] = []
    if not isinstance(entries, list):
        return document, lines
    at = _SKIPPED.match(text).end() + 1  # behind the first bracket
    decode = json.JSONDecoder().raw_decode
    if isinstance(document, dict):
        key = ""
        while key != "operations":
            key, at = decode(text, _SKIPPED.match(text, at).end())
            at = _SKIPPED.match(text, at).end()
            at = decode(text, at)[1] if key != "operations" else at + 1
    line, seen = 1, 0
    for _ in entries:
        at = _SKIPPED.match(text, at).end()
        line, seen = line + text.count("\n", seen, at), at
        lines.append(line)
        at = decode(text, at)[1]
    return document, lines


_SKIPPED = re.compile(r"[\s,:]*")


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
    problems: list[str] = []
    if isinstance(document, dict):
        for key in [key for key in document if key != "operations"][:MOST_PROBLEMS]:
            problems.append(f"{source}: unknown key {shown(key)} beside `operations`")
        if "operations" not in document:
            raise Refused([*problems, f"{source}: a mapping needs the key `operations` with a list of entries"])
        document = document["operations"]
    if document is None:
        document = []
    if not isinstance(document, list):
        raise Refused(f"{source}: a schedule is a list of entries (or {{operations: [...]}}), got {shown(document)}")

    if len(document) > MOST_ENTRIES:
        raise Refused(f"{source}: a schedule has at most {MOST_ENTRIES:,} entries, got {len(document):,}")

    entries = []
    completed = [i for i, given in enumerate(document, 1) if isinstance(given, dict) and "completed" in given]
    if completed:
        numbers = ", ".join(map(str, completed[:10])) + (", ..." if len(completed) > 10 else "")
        problems.append(
            f"{source}: entries {numbers}: remove the field `completed`: what has fired is kept in the run folder, "
            "and a resume goes on from there"
        )
    for number, (given, line) in enumerate(zip(document, lines, strict=True), 1):
        place = f"{source}:{line}: entry {number}"
        if len(problems) > MOST_PROBLEMS:
            raise Refused([*problems, f"{place} and those after it were not looked at"])
        try:
            entries.append(_entry(number, line, given))
        except ScheduleError as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        raise Refused(problems)
    return Schedule(tuple(entries), source, text)


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
        common = _EntryFields(**{key: fields[key] for key in _EntryFields.model_fields if key in fields})
    except ValidationError as error:
        problems += [
            f"{title}{'.'.join(map(str, loc))} {message}"
            for loc, message in problems_of(error, _EntryFields)
            if loc[0] != "name"
        ]
    triggers = []
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
        given=given,
    )
