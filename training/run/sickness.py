"""Steps that must not reach the weights: what was wrong, where it began, and when a host learns of it.

Whether a step was healthy is a number on the device. A CPU is asked at once. A GPU computes behind the host, so there
the answer to one step is read after the next: no step waits. `settle` waits for the last answer. It comes first where
something is decided, saved, restored or ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from orchestrate.training.run.device import on_its_way
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.settings.records import Place, Progress

OUT_OF_MEMORY, NOT_FINITE, SPIKE = "out of memory", "not finite", "spike"
# A GradScaler tries scales that overflow; that it skips those steps is its business, and no sickness.
OVERFLOW = "overflow"
# A loss can be called a spike after this many, and the running mean remembers about that many.
SPIKE_WARMUP, SPIKE_MEMORY = 20, 100


@dataclass(frozen=True)
class Sick:
    """A step that did not update the weights; the same on every rank."""

    cause: str
    """out of memory, not finite, or spike."""
    at: Place
    """Where the step began."""
    samples: int
    """How many samples it was to see, over all ranks."""
    batch_size: int
    """Samples in one of its micro-steps on one rank."""

    def __str__(self) -> str:
        first = self.at.cursor.sample
        last = first + self.samples - 1
        return f"{self.cause} in the step after iteration {self.at.iter}, samples {first} to {last}"


class Diagnosis:
    """What became of the steps made so far.

    Args:
        progress: of the run; its count of sick steps in a row ends where a step is known not to be one.
        late: whether the answer to a step is read after the next one.
    """

    def __init__(self, ranks: Ranks, progress: Progress, late: bool) -> None:
        self.ranks, self.progress, self.late = ranks, progress, late
        self._pending: tuple[Callable[[], float], Sick] | None = None

    @property
    def pending(self) -> bool:
        """Whether the outcome of the last step is not known yet."""
        return self._pending is not None

    def of(self, healthy: Tensor, otherwise: Sick) -> Sick | None:
        """After a step: what was wrong with it, or, where answers are late, with the one before. None: nothing.

        Args:
            healthy: () bool on the device, equal on every rank.
            otherwise: what this rank knows of the step in case it was not.
        """
        due, self._pending = self._pending, (on_its_way(healthy), otherwise)
        return self._told(due) if self.late else self.settle()

    def settle(self) -> Sick | None:
        """What was wrong with the last step, waiting for the device. Every rank must ask."""
        due, self._pending = self._pending, None
        return self._told(due)

    def take_back(self) -> None:
        """Alone, after an exception: be before the last step if it did not update the weights. Talks to no rank."""
        due, self._pending = self._pending, None
        if due is not None and due[1].cause != OVERFLOW and not due[0]():
            self.progress.go(due[1].at)

    def drop(self) -> None:
        """Forget the last step: the run goes back to before it."""
        self._pending = None

    def _told(self, due: tuple[Callable[[], float], Sick] | None) -> Sick | None:
        if due is None:
            return None
        if not due[0]():
            # Every rank comes here, because the number that was read is the same everywhere. One rank may know more.
            causes = self.ranks.gather(due[1].cause)
            cause = OUT_OF_MEMORY if OUT_OF_MEMORY in causes else due[1].cause
            if cause != OVERFLOW:
                return replace(due[1], cause=cause)
        self.progress.sick_steps = 0
        return None


def is_spike(loss: float, sigma: float, progress: Progress) -> bool:
    """Whether a training loss is more than `sigma` deviations above its running mean, which it joins if it is not."""
    p = progress
    if not np.isfinite(loss):
        return False
    if p.losses_seen >= SPIKE_WARMUP and loss > p.loss_mean + sigma * max(p.loss_variance, 1e-12) ** 0.5:
        return True
    p.losses_seen += 1
    weight = max(1.0 / p.losses_seen, 1.0 / SPIKE_MEMORY)
    distance = loss - p.loss_mean
    p.loss_mean += weight * distance
    p.loss_variance = (1 - weight) * (p.loss_variance + weight * distance * distance)
    return False
