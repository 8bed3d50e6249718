"""The number types that configurations and schedules share, and their errors in one wording.

Validation is pydantic's, in strict mode (text is not a number, true is not 1). One thing is more generous: a float
without a fraction, such as 1e9, is taken where a whole number is meant, because people write token counts that way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_TAG = re.compile(r"\[|^[A-Z]|^(constrained-)?(int|float|str)$")

Whole = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
OptimizerName = Literal["adamw", "sgd"]
OPTIMIZER_NUMBERS: dict[str, tuple[str, ...]] = {"adamw": ("beta1", "beta2"), "sgd": ("momentum",)}
"""The numbers that each optimizer has, beside learning rate and weight decay, as Settings and configurations say."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to this one, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any, limit: int = 80) -> str:
    """A value as it is quoted in a message: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def brief(value: Any) -> str:
    """A value of Settings in one short piece of a line; adapters as names and ranks, fades as names and
    shares, equal numbers as N x value."""
    if isinstance(value, dict):
        facts = [f"{name}: {spec.get('rank', spec.get('share'))}" for name, spec in value.items()]
        return "{" + ", ".join(facts[:4]) + (", ...}" if len(facts) > 4 else "}")
    if isinstance(value, list) and len(value) > 2 and value.count(value[0]) == len(value):
        return f"[{len(value)} x {value[0]}]"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def problems_of(error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """pydantic's errors as (location, 'what is allowed, got what was given') pairs in plain words."""
    found = []
    for detail in error.errors(include_url=False, include_context=True):
        # Of a value that may be several things, pydantic puts the name of each into the location.
        location = tuple(part for part in detail["loc"] if not (isinstance(part, str) and _TAG.search(part)))
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if detail["type"] == "missing":
            found.append((location, "is missing"))
        else:
            found.append((location, f"{message}, got {shown(detail['input'])}"))
    # Where one reading of a value got as far as a field in it, that it is no other reading is not the news.
    inner = {location[:n] for location, _ in found for n in range(1, len(location))}
    return [(location, message) for location, message in found if location not in inner]
