"""Faults on purpose, as a configuration names them: --inject=nan@120,oom@200:rank1,kill@250.

A fault is KIND@ITER[:rankN]: it strikes in the step that would make iteration ITER + 1, on one rank or on all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = {
    "nan": "the loss becomes NaN",
    "spike": "the loss becomes a thousand times what it is",
    "oom": "the device's memory runs out in the forward pass",
    "raise": "an exception that nobody expects",
    "kill": "SIGKILL to this process",
    "term": "SIGTERM to this process",
}
_FAULT = re.compile(r"(\w+)@(\d+)(?::rank(\d+))?")


@dataclass(frozen=True)
class Fault:
    """One fault: what, when, and on which rank (None: on all)."""

    kind: str
    iter: int
    rank: int | None

    def __str__(self) -> str:
        return f"{self.kind}@{self.iter}" + ("" if self.rank is None else f":rank{self.rank}")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of a comma-separated list. Raises ValueError."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _FAULT.fullmatch(part)
        if match is None or match[1] not in KINDS:
            raise ValueError(f"inject: {part!r} is no fault; allowed: KIND@ITER[:rankN] with KIND {', '.join(KINDS)}")
        faults.append(Fault(match[1], int(match[2]), None if match[3] is None else int(match[3])))
    return tuple(faults)
