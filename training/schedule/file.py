"""A schedule's file and its entries, each validated by itself.

The file (YAML or JSON) is parsed with line numbers, so that every error names file, line, what was given and what is
allowed; all errors come at once (`Refused`). Whether the entries fit each other and the model is stages.py's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrate.training.operations import Operation, make
from orchestrate.training.schedule.triggers import TRIGGERS, Trigger
from orchestrate.training.settings.errors import Refused, ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import (
    NonNegativeFloat,
    PositiveInt,
    nearest,
    problems_of,
    shown,
)


class Guard(BaseModel):
    """What to do when an entry hurts: looked at on every evaluation in the iterations after it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    max_increase: NonNegativeFloat = 0.05
    """How much worse, in nats, the validation loss may be than right before the entry."""
    within_iters: PositiveInt = 200
    then: Literal["revert", "keep", "stop"] = "revert"


class _EntryFields(BaseModel):
    """The fields of an entry that are neither the operation's argument nor a trigger."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    reevaluate: bool = False
    desc: str = ""
    over: PositiveInt | None = None
    style: Literal["linear", "cosine"] = "linear"
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
    style: str
    on_error: str
    guard: Guard | None
    given: Mapping[str, Any]
    """As it was written, for the log and to recognise it after a resume."""

    @property
    def value(self) -> Any:
        return self.given.get("value")

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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# Plain integers must still be integers: the resolver that was added last is asked last, and int comes first.


def _parse(text: str, is_json: bool) -> tuple[Any, list[int]]:
    """The document and the line of each entry. Raises ValueError with "line N: ..." in the message."""
    document: Any = None
    if is_json:
        try:
            document = json.loads(text, object_pairs_hook=_no_doubles)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}: not JSON ({error.msg})") from None
        text = text.replace("\t", " ")  # inside JSON only white space can be a tab, and YAML takes none
    try:
        node = yaml.compose(text, Loader=_Loader)
        if not is_json:
            loader = _Loader(text)
            try:
                document = loader.get_single_data()
            finally:
                loader.dispose()
    except yaml.MarkedYAMLError as error:
        if is_json:
            return document, []
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        if is_json:
            return document, []
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "operations"), None)
    lines = []
    if isinstance(node, yaml.SequenceNode):
        lines = [item.start_mark.line + 1 for item in node.value]
    return document, lines


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice")
    return dict(pairs)


def read_schedule(path: str | Path) -> Schedule:
    """Read and validate a schedule file. Raises Refused with every problem that can be seen without settings."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"schedule {path}: cannot be read ({error.strerror})") from None
    try:
        return parse_schedule(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise Refused(f"schedule {path}: not UTF-8 text (byte {error.start})") from None


def parse_schedule(text: str, source: str) -> Schedule:
    """A schedule from its text; `source` is the name for messages and tells JSON by its ending. Raises Refused."""
    try:
        document, lines = _parse(text, source.endswith(".json"))
    except RecursionError:
        raise Refused(f"{source}: nested too deeply to be a schedule") from None
    except ValueError as error:
        raise Refused(f"{source}: {error}") from None
    problems: list[str] = []
    if isinstance(document, dict):
        for key in document:
            if key != "operations":
                problems.append(f"{source}: unknown key {shown(key)} beside `operations`")
        if "operations" not in document:
            raise Refused([*problems, f"{source}: a mapping needs the key `operations` with a list of entries"])
        document = document["operations"]
    if document is None:
        document = []
    if not isinstance(document, list):
        raise Refused(f"{source}: a schedule is a list of entries (or {{operations: [...]}}), got {shown(document)}")

    entries = []
    for i, given in enumerate(document):
        line = lines[i] if i < len(lines) else 0
        place = f"{source}:{line}: entry {i + 1}" if line else f"{source}: entry {i + 1}"
        try:
            entries.append(_entry(i + 1, line, given))
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
        raise ScheduleError(f"has no `name`; got the fields {', '.join(map(str, given)) or 'none'}")
    problems = [
        f"unknown field {shown(key)}{nearest(key, entry_fields())}" for key in given if key not in entry_fields()
    ]
    fields = {
        key: value
        for key, value in given.items()
        # A person writes `trigger_loss: null` for no trigger.
        if key in entry_fields() and not (value is None and key not in ("name", "value"))
    }
    title = f"{given['name']}: " if isinstance(given["name"], str) else ""

    operation = common = None
    try:
        operation = make(given["name"], {"value": fields["value"]} if "value" in fields else {})
    except ScheduleError as error:
        problems += error.problems
    try:
        common = _EntryFields(**{key: fields[key] for key in _EntryFields.model_fields if key in fields})
    except ValidationError as error:
        problems += [
            f"{title}{'.'.join(map(str, loc))} {message}" for loc, message in problems_of(error) if loc[0] != "name"
        ]
    triggers = []
    for name, trigger in TRIGGERS.items():
        if name not in fields:
            continue
        try:
            triggers.append(trigger(value=fields[name]))
        except ValidationError as error:
            problems += [
                f"{title}{'.'.join([name, *map(str, loc[1:])])} {message}" for loc, message in problems_of(error)
            ]
    if operation and common and common.over and not (operation.ramps or operation.fades):
        problems.append(f"{title}`over` moves a number or fades new weights in; {operation.name} does neither")
    if "style" in fields and "over" not in fields:
        problems.append(f"{title}`style` says how `over` moves a number, and there is no `over`")
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
        on_error=common.on_error,
        guard=common.guard,
        given=given,
    )
