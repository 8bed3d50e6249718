"""Faults on purpose, to see that a run survives them: --inject=nan@120,oom@200:rank1,kill@250.

A fault is KIND@ITER[:rankN]: it strikes in the step that would make iteration ITER + 1, on one rank or on all. Each
strikes once per run folder, also over restarts: a marker is written before it does.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

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


class Injector:
    """Strikes the faults of one rank.

    Args:
        marks: folder that remembers which faults have struck (the run folder).
    """

    def __init__(self, text: str, rank: int, marks: str | Path) -> None:
        self.faults = [fault for fault in parse_faults(text) if fault.rank in (None, rank)]
        self._rank, self._marks = rank, Path(marks) / "injected"

    def strike(self, iteration: int, loss: torch.Tensor) -> torch.Tensor:
        """The loss, spoilt where a fault says so; or an exception, or the end of this process."""
        for fault in self.faults:
            if fault.iter == iteration and self._first_time(fault):
                match fault.kind:
                    case "nan":
                        loss = loss * float("nan")
                    case "spike":
                        loss = loss * 1000.0
                    case "oom":
                        raise torch.OutOfMemoryError(f"injected: {fault}")
                    case "raise":
                        raise RuntimeError(f"injected: {fault}")
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "term":
                        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    def _first_time(self, fault: Fault) -> bool:
        self._marks.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self._marks / f"{fault.kind}_{fault.iter}_rank{self._rank}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
