"""A run of plain values, for the orchestrator to steer where nothing trains: a plan's replay, a benchmark.

It is both what the orchestrator changes (`Steerable`) and whom it works for (`Host`), on one process. It must not touch
a model or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrate.training.run.casting import Cast
from orchestrate.training.run.changes import Reshape
from orchestrate.training.run.stopwatch import Stopwatch
from orchestrate.training.settings.records import Progress, Settings


class Alone:
    """One process: every exchange returns what was put in."""

    world_size = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class DryRun:
    """Follows settings as a run would, and remembers the events.

    Args:
        progress: how far it has come; whoever drives it moves that on.

    Attributes:
        loss: what every measurement gives.
        events: (iteration, kind, fields) of each.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.ranks, self.stopwatch = Alone(), Stopwatch()
        self.loss = 0.0
        self.events: list[tuple[int, str, dict[str, Any]]] = []

    def adopt(self, target: Settings, reshape: Reshape | None = None) -> Cast:
        self.settings = target
        return Cast()

    def largest_batch(self, target: float, candidates: Sequence[int]) -> int:
        """The batch in force: what fits more is for a machine to say."""
        return self.settings.batch_size

    def check_ranks_agree(self, what: str) -> None: ...

    def parameter_counts(self) -> tuple[int, int]:
        return 0, 0

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((self.progress.iter, kind, fields))

    def measure(self, why: str) -> float | None:
        return self.loss

    def save(self, why: str, *, mark: str = "") -> str:
        return ""

    def go_back(self, name: str) -> dict[str, Any]:
        raise NotImplementedError("nothing is saved, so there is nothing to go back to")

    def keep(self, why: str) -> None: ...
