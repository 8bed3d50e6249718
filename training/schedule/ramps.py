"""Ramps: numbers that move gradually from the values in force to an operation's, a pure function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from orchestrate.training.schedule.file import Entry, RampStyle
from orchestrate.training.settings.records import EXACTLY, Settings, get_field, numbers_in, present_name
from orchestrate.training.settings.values import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Ramp:
    """Numbers under way from the values in force to an operation's, a pure function of the iteration."""

    __pydantic_config__ = EXACTLY

    entry: PositiveInt
    name: str
    start_iter: NonNegativeInt
    over: PositiveInt
    style: RampStyle
    fields: dict[str, tuple[int | float, int | float]]
    """Dotted field name of Settings: (from, to). Whole numbers stay whole when they are read back."""
    exponent: PositiveFloat = 1.0
    """Of the style power."""
    track: str = ""
    """Of the entry: those of other tracks leave these numbers alone until they have arrived."""

    @classmethod
    def between(cls, entry: Entry, before: Settings, after: Settings, start_iter: int) -> Ramp:
        assert entry.over
        if entry.operation.fades:
            fields = {f"fading.{layer}": (0.0, 1.0) for layer in after.fading}
        else:
            names = [name for field in entry.operation.touches for name in numbers_in(after, field)]
            fields = {name: (get_field(before, name), get_field(after, name)) for name in names}
        name, style = entry.operation.name, entry.style
        return cls(entry.number, name, start_iter, entry.over, style, fields, entry.exponent, entry.track)

    def done(self, iteration: int) -> bool:
        return iteration >= self.start_iter + self.over

    def at(self, iteration: int) -> dict[str, float]:
        """The values at an iteration: the start values at start_iter, exactly the end values from start_iter + over."""
        return {name: self._value(name, *ends, iteration) for name, ends in self.fields.items()}

    def _value(self, name: str, start: float, end: float, iteration: int) -> float:
        if self.done(iteration):
            return end
        share = (iteration - self.start_iter) / self.over
        match self.style:
            case "constant":
                share = 0.0
            case "cosine":
                share = 0.5 * (1.0 - math.cos(math.pi * share))
            case "power":
                share **= self.exponent
        value = start + (end - start) * share
        if isinstance(end, int):
            # Accumulation moves in steps that both ends share, so whatever number of processes divides both ends
            # divides every value between.
            step = math.gcd(int(start), end) if name == "grad_accum" else 1
            return max(step, round(value / step) * step)
        return value

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "fields": {name: list(ends) for name, ends in self.fields.items()}}

    @classmethod
    def from_json(cls, values: Any) -> Ramp:
        """Raises ValueError (pydantic's) for what `to_json` cannot have made, now or in an older version."""
        if isinstance(values, dict) and isinstance(fields := values.get("fields"), dict):
            values = {**values, "fields": {present_name(str(name)): ends for name, ends in fields.items()}}
        return TypeAdapter(cls).validate_python(values)


def in_smaller_pieces(ramps: Sequence[Ramp], before: Settings, smaller: Settings) -> list[Ramp]:
    """The same ramps after micro-batches were made smaller: the global batch goes the way that it was going.

    Where no number divides both ends of a ramp of batch_size, micro-batches are one sequence from here on.
    """
    moved = {name: ends for ramp in ramps for name, ends in ramp.fields.items()}
    start, end = (smaller.grad_accum // before.grad_accum,) * 2
    if sizes := moved.get("batch_size"):
        common = math.gcd(*map(int, sizes))
        least = next((factor for factor in range(2, common + 1) if common % factor == 0), 0)
        start, end = (least, least) if least else (int(sizes[0]), int(sizes[1]))
        moved.setdefault("grad_accum", (before.grad_accum, before.grad_accum))
        moved["batch_size"] = int(sizes[0]) // start, int(sizes[1]) // end
    if "grad_accum" in moved:
        moved["grad_accum"] = int(moved["grad_accum"][0]) * start, int(moved["grad_accum"][1]) * end
    found = []
    for ramp in ramps:
        names = list(ramp.fields)
        if "batch_size" in names and not any("grad_accum" in other.fields for other in ramps):
            names.append("grad_accum")
        found.append(replace(ramp, fields={name: moved[name] for name in names}))
    return found


def without(ramps: Sequence[Ramp], names: Collection[str]) -> list[Ramp]:
    """The ramps of what is not among these numbers."""
    kept = [replace(r, fields={name: ends for name, ends in r.fields.items() if name not in names}) for r in ramps]
    return [ramp for ramp in kept if ramp.fields]
