"""When an entry fires: each trigger is one small pure class, `fires(waited, measured) -> reason | None`.

A trigger sees only numbers that are the same on every rank, but for the clock, which rank 0 reads; so what rank 0
decides every other rank could have decided too. A trigger is one class under `@trigger`: the schedule's field, its
validation and the documentation follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from orchestrate.training.settings.records import Measured, Waited
from orchestrate.training.settings.values import Finite, NonNegativeFloat, NonNegativeInt, PositiveInt


class Trigger(BaseModel):
    """A condition of an entry; any one that holds fires it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    field: ClassVar[str]
    reads_clock: ClassVar[bool] = False

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        """The reason for firing now, or None."""
        raise NotImplementedError


TRIGGERS: dict[str, type[Trigger]] = {}


def trigger(field: str) -> Callable[[type[Trigger]], type[Trigger]]:
    """Class decorator: make the trigger a field of a schedule's entries. Raises ValueError for a name that is taken."""

    def register(cls: type[Trigger]) -> type[Trigger]:
        if field in TRIGGERS:
            raise ValueError(f"there is a trigger {field} already")
        cls.field = field
        TRIGGERS[field] = cls
        return cls

    return register


@trigger("trigger_loss")
class TriggerLoss(Trigger):
    """The validation loss is at or below this."""

    value: Finite

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        if measured.val_loss is not None and measured.val_loss <= self.value:
            return f"val loss {measured.val_loss:.4f} <= {self.value:g}"
        return None


@trigger("max_wait_iters")
class MaxWaitIters(Trigger):
    """So many iterations have passed since the previous entry fired, or since the start."""

    value: NonNegativeInt

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        if waited.iters_waited >= self.value:
            return f"waited {waited.iters_waited} iterations (max_wait_iters {self.value})"
        return None


@trigger("max_wait_tokens")
class MaxWaitTokens(Trigger):
    """So many training tokens have passed since the previous entry fired, or since the start."""

    value: NonNegativeInt

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        if waited.tokens_waited >= self.value:
            return f"waited {waited.tokens_waited} tokens (max_wait_tokens {self.value})"
        return None


@trigger("max_wait_seconds")
class MaxWaitSeconds(Trigger):
    """So many seconds of running have passed since the previous entry fired; looked at every log_interval."""

    reads_clock: ClassVar[bool] = True
    value: NonNegativeFloat

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        if waited.seconds_waited is not None and waited.seconds_waited >= self.value:
            return f"waited {waited.seconds_waited:.1f} s (max_wait_seconds {self.value:g})"
        return None


@trigger("at_iter")
class AtIter(Trigger):
    """The run has done this many iterations."""

    value: NonNegativeInt

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        return f"iteration {waited.iter} (at_iter {self.value})" if waited.iter >= self.value else None


@trigger("at_tokens")
class AtTokens(Trigger):
    """The run has seen this many training tokens."""

    value: NonNegativeInt

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        return f"{waited.tokens} tokens (at_tokens {self.value})" if waited.tokens >= self.value else None


class Plateau(BaseModel):
    """`evals` evaluations in a row without a gain of `min_delta` on the best loss before them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    evals: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.01


@trigger("trigger_plateau")
class TriggerPlateau(Trigger):
    """The validation loss has stopped falling: {evals: 5, min_delta: 0.01}. Counted since the previous entry fired."""

    value: Plateau

    def fires(self, waited: Waited, measured: Measured) -> str | None:
        evals, history = self.value.evals, measured.history
        if measured.val_loss is None or len(history) <= evals:
            return None
        before, recent = min(history[:-evals]), min(history[-evals:])
        if recent > before - self.value.min_delta:
            margin = f"min_delta {self.value.min_delta:g}"
            return f"plateau: {recent:.4f} in {evals} evaluations, {before:.4f} before ({margin})"
        return None
