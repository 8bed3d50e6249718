"""Strikes the faults of --inject, to see that a run survives them.

Each strikes once per run folder, also over restarts: a marker is written before it does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from orchestrate.training.settings.faults import Fault, parse_faults


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
