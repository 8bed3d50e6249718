"""The number types that configurations and schedules share, how much of a file is read, and errors in one wording.

Validation is pydantic's, in strict mode (text is not a number, true is not 1). One thing is more generous: a float
without a fraction, such as 1e9, is taken where a whole number is meant, because people write token counts that way.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from orchestrate.model.config import BLOCK_LAYERS

T = TypeVar("T")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_TAG = re.compile(r"\[|^[A-Z]|^(constrained-)?(int|float|str)$")

_LIST = re.compile(r"a valid (list|tuple)")
Location = tuple[int | str, ...]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
SourceName = Annotated[str, Field(min_length=1, max_length=1000)]
"""Of a data set in a mixture: as `dataset` takes it."""
MOST_SOURCES = 64
OptimizerName = Literal["adamw", "sgd"]
WeightsDtype = Literal["float32", "bfloat16"]
OPTIMIZER_NUMBERS: dict[str, tuple[str, ...]] = {"adamw": ("beta1", "beta2"), "sgd": ("momentum",)}
"""The numbers that each optimizer has, beside learning rate and weight decay, as Settings and configurations say."""


LARGEST_BITS = 1024
"""Of a whole number in a configuration or a schedule: as many as a float can hold."""
MOST_PROBLEMS = 50
"""That are told of one file: a person reads no more, and a file of nothing but mistakes ends soon."""


def weighty(weights: dict[str, float]) -> dict[str, float]:
    """Raises ValueError where weights are given and none is above 0, or where they are too large to add up."""
    if weights and not 0 < sum(weights.values()) < math.inf:
        raise ValueError("must have a weight above 0, and a finite sum")
    return weights


def not_empty(weights: dict[str, float]) -> dict[str, float]:
    """Raises ValueError where there are no weights."""
    if not weights:
        raise ValueError("must name a data set")
    return weights


def shares_of(weights: Mapping[str, float]) -> dict[str, float]:
    """The same shares, which add up to 1; those that do already stay to the bit."""
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def read_at_most(path: str | Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises OSError, and ValueError for a longer one."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)  # not its size first: a device or a pipe has none
    if len(content) > limit:
        raise ValueError(f"it is longer than {limit:,} bytes")
    return content


def is_large(value: Any) -> bool:
    """Whether a value is a whole number of more bits than arithmetic with it is safe for."""
    return isinstance(value, int) and value.bit_length() > LARGEST_BITS


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The known name closest to this one, or nothing when none is close."""
    return next(iter(difflib.get_close_matches(name[:100], list(known), n=1, cutoff=cutoff)), "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to this one, or nothing when none is close."""
    found = closest(str(name), known)
    return f"; did you mean {found}?" if found else ""


def shown(value: Any, limit: int = 80) -> str:
    """A value as it is quoted in a message: its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"a {type(value).__name__} of too many digits to show"
    return cut(text, limit)


def cut(text: str, limit: int) -> str:
    """At most so many characters of a text, three of them dots where there were more."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def brief(value: Any) -> str:
    """A value in one short piece of a line.

    Adapters are names and ranks, fades names and shares, layers ranges of names, equal numbers N x value, and entries
    of a schedule their names.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        groups: dict[str, list[str]] = {}
        for name, spec in value.items():
            groups.setdefault(_number(spec), []).append(name)
        facts = [f"{', '.join(layer_ranges(names))}: {number}" for number, names in groups.items()]
        return "{" + "; ".join(facts[:4]) + ("; ...}" if len(facts) > 4 else "}")
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "[" + ", ".join(layer_ranges(value)) + "]"
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        names = [str(item["name"]) for item in value]
        counted = "1 entry" if len(names) == 1 else f"{len(names)} entries"
        return f"{counted} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
    if isinstance(value, list) and len(value) > 2 and value.count(value[0]) == len(value):
        return f"[{len(value)} x {value[0]}]"
    return cut(f"{value:.4g}" if isinstance(value, float) else str(value), 60)


def changed(name: str, before: Any, after: Any) -> str:
    """A change of a field of Settings in one short piece of a line: of lists and mappings what is other than before."""
    if isinstance(before, list) and isinstance(after, list) and all(isinstance(item, str) for item in before + after):
        told = {name: [item for item in after if item not in before]}
        told[f"no longer {name}"] = [item for item in before if item not in after]
        if any(told.values()):
            return ", ".join(f"{', '.join(layer_ranges(items))} {what}" for what, items in told.items() if items)
    if isinstance(before, dict) and isinstance(after, dict):
        groups: dict[str, list[str]] = {}
        for item in dict.fromkeys([*before, *after]):
            if before.get(item) != after.get(item):
                groups.setdefault(_moved(before.get(item), after.get(item)), []).append(item)
        return f"{name} " + "; ".join(f"{', '.join(layer_ranges(items))}: {moved}" for moved, items in groups.items())
    return f"{name} {brief(before)} -> {brief(after)}"


def _moved(before: Any, after: Any) -> str:
    """What a member of a mapping was and is; of an adapter with the rank that it had, what else is new."""
    if isinstance(before, dict) and isinstance(after, dict) and _number(before) == _number(after):
        return ", ".join(
            f"{key} {brief(before.get(key))} -> {brief(new)}" for key, new in after.items() if before.get(key) != new
        )
    return f"{_number(before)} -> {_number(after)}"


def _number(value: Any) -> str:
    """What a member of a mapping in Settings comes down to: an adapter to its rank, a fade to its share."""
    number = value.get("rank", value.get("share")) if isinstance(value, dict) else value
    return "none" if number is None else brief(number)


def layer_ranges(names: Sequence[str]) -> list[str]:
    """Names of layers in few words: block.N for all the layers of a block, and mlp.0-3 for consecutive numbers."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        kind, _, number = name.partition(".")
        if kind in BLOCK_LAYERS and number.isdecimal():
            numbers.setdefault(kind, set()).add(int(number))
    whole = set.intersection(*(numbers.get(kind, set()) for kind in BLOCK_LAYERS))
    left = {"block": set(whole), **{kind: members - whole for kind, members in numbers.items()}}
    found = []
    for name in names:
        kind, _, number = name.partition(".")
        if kind not in numbers or not number.isdecimal():
            found.append(name)
            continue
        kind = "block" if int(number) in whole else kind
        first = last = int(number)
        while first - 1 in left[kind]:
            first -= 1
        while last + 1 in left[kind]:
            last += 1
        if first in left[kind]:  # told once, where its first member stands
            found.append(f"{kind}.{first}" if first == last else f"{kind}.{first}-{last}")
            left[kind] -= set(range(first, last + 1))
    return found


def registered(known: dict[str, type[T]], name: str, attribute: str, what: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: keep a class by its name, which it then has as this attribute too. Raises ValueError.

    Args:
        what: "an operation" and the like, for the message where the name is taken.
    """

    def register(cls: type[T]) -> type[T]:
        if name in known:
            raise ValueError(f"there is {what} {name} already")
        setattr(cls, attribute, name)
        known[name] = cls
        return cls

    return register


def problems_of(error: ValidationError, model: type[BaseModel] | None = None) -> list[tuple[Location, str]]:
    """pydantic's errors as (location, 'what is allowed, got what was given') pairs in plain words.

    What several readings of one value say is one problem. With the `model` that was validated, a mapping's problem
    names the fields that are allowed in it.
    """
    found: dict[Location, list[str]] = {}
    given: dict[Location, str] = {}
    for detail in error.errors(include_url=False, include_context=True)[:MOST_PROBLEMS]:
        # Of a value that may be several things, pydantic puts the name of each into the location; a key that somebody
        # gave may look like one.
        *parts, last = detail["loc"] or ("",)
        key = detail["type"] in ("missing", "extra_forbidden", "unexpected_keyword_argument")
        location = tuple(part for part in parts if not (isinstance(part, str) and _TAG.search(part)))
        if detail["loc"] and (key or not (isinstance(last, str) and _TAG.search(last))):
            location += (last,)
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        message = _LIST.sub("a list", message).replace("a valid string", "text")
        match detail["type"]:
            case "missing":
                message = "is missing"
            case "extra_forbidden" | "unexpected_keyword_argument":
                allowed = _fields(_inside(model, detail["loc"][:-1]))
                hint = nearest(str(location[-1]), allowed) or ";"
                message = "is no field here" + (f"{hint} allowed: {', '.join(allowed)}" if allowed else "")
            case "model_type" | "dict_type" | "dataclass_type" | "model_attributes_type":
                allowed = _fields(_inside(model, detail["loc"]))
                message = "must be a mapping" + (f" of {', '.join(allowed)}" if allowed else "")
        if not key:
            given[location] = shown(detail["input"])
        found.setdefault(location, []).append(message)
    # Where one reading of a value got as far as a field in it, that it is no other reading is not the news.
    inner = {location[:n] for location in found for n in range(1, len(location))}
    return [
        (location, _or(messages) + (f", got {given[location]}" if location in given else ""))
        for location, messages in found.items()
        if location not in inner
    ]


def _or(messages: list[str]) -> str:
    """What several readings of a value ask for, as one sentence."""
    first, *others = dict.fromkeys(messages)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _inside(model: type[BaseModel] | None, location: Location) -> list[type[BaseModel]]:
    """The models that may stand at a place inside a model."""
    found = [model] if model else []
    for part in location:
        named = [cls for cls in found if cls.__name__ == part]
        fields = [field for cls in found for name, field in cls.model_fields.items() if part in (name, field.alias)]
        found = named or [cls for field in fields for cls in _models(field.annotation)] or found
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [cls for part in get_args(annotation) for cls in _models(part)]


def _fields(models: list[type[BaseModel]]) -> list[str]:
    return [field.alias or name for cls in models for name, field in cls.model_fields.items()]
