"""Operations on the batch: sequences per micro-step, micro-steps per iteration, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator

from orchestrate.training.operations.base import Machine, Operation, operation
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import PositiveFloat, PositiveInt


def _scaled(what: str, value: int, factor: float) -> int:
    """value * factor as a whole number; refuses a result that is none, or that is below 1."""
    result = value * factor
    # 1e-9 forgives the rounding of factors such as 1/3; anything more would change the batch silently.
    if round(result) < 1 or abs(result - round(result)) > 1e-9 * max(1.0, result):
        raise ScheduleError(f"{what} {value} times {factor:g} is {result:g}, which is not a whole number of at least 1")
    return round(result)


@operation("set_batch_size")
class SetBatchSize(Operation):
    """Set the sequences in one micro-step on one rank."""

    touches: ClassVar = ("batch_size",)
    ramps: ClassVar = True
    value: PositiveInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, batch_size=self.value)


@operation("change_batch_size")
class ChangeBatchSize(Operation):
    """Multiply the micro-batch by a factor; the result must be a whole number."""

    touches: ClassVar = ("batch_size",)
    ramps: ClassVar = True
    value: PositiveFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, batch_size=_scaled("batch_size", settings.batch_size, self.value))


@operation("set_batch_size_relative")
class SetBatchSizeRelative(Operation):
    """Multiply the micro-batch by a factor, rounding down to a whole number of at least 1."""

    touches: ClassVar = ("batch_size",)
    ramps: ClassVar = True
    value: PositiveFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, batch_size=max(1, int(settings.batch_size * self.value + 1e-9)))


@operation("set_grad_accum")
class SetGradAccum(Operation):
    """Set the micro-steps in one iteration, counted over all ranks."""

    touches: ClassVar = ("grad_accum",)
    ramps: ClassVar = True
    value: PositiveInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, grad_accum=self.value)


@operation("change_grad_accum")
class ChangeGradAccum(Operation):
    """Multiply the micro-steps in one iteration by a factor; the result must be a whole number."""

    touches: ClassVar = ("grad_accum",)
    ramps: ClassVar = True
    value: PositiveFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, grad_accum=_scaled("grad_accum", settings.grad_accum, self.value))


class MemoryTarget(BaseModel):
    """How much memory a micro-step may use, and what must stay as it is."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    target: PositiveFloat = 0.8
    """Share of the device's memory (on CPU: of the host's) that training may use at its peak."""
    keep_global_batch: bool = False
    """Change the accumulation so that batch_size * grad_accum stays what it is."""
    max_batch_size: PositiveInt = 1024
    """Never try more than this."""


@operation("adjust_batch_size")
class AdjustBatchSize(Operation):
    """Set the micro-batch to the largest that fits a share of memory, found by trying.

    value: a share such as 0.8, or {target: 0.8, keep_global_batch: true, max_batch_size: 64}. With keep_global_batch
    the accumulation is changed so that the global batch stays the same, and only splits of it are tried. A plan made
    ahead cannot know the result and shows the batch unchanged.
    """

    touches: ClassVar = ("batch_size", "grad_accum")
    decided_on_machine: ClassVar = True
    value: PositiveFloat | MemoryTarget

    @field_validator("value", mode="before")
    @classmethod
    def _no_percent(cls, value: Any) -> Any:
        if isinstance(value, dict) and "target_vram_percent" in value:
            raise ValueError("must give a share of memory: target: 0.8 instead of target_vram_percent: 80")
        return value

    @property
    def wanted(self) -> MemoryTarget:
        return self.value if isinstance(self.value, MemoryTarget) else MemoryTarget(target=self.value)

    def plan(self, settings: Settings) -> Settings:
        if self.wanted.target > 1:
            raise ScheduleError(f"adjust_batch_size: target must be a share in (0, 1], got {self.wanted.target:g}")
        return settings

    def resolve(self, machine: Machine) -> Operation:
        self.plan(machine.settings)
        wanted, settings = self.wanted, machine.settings
        if not wanted.keep_global_batch:
            fits = machine.largest_batch(wanted.target, range(1, wanted.max_batch_size + 1))
            return SetSplit(value=(fits, settings.grad_accum))
        total, world = settings.samples_per_iter, machine.ranks.world_size
        splits = [
            size
            for size in range(1, min(total, wanted.max_batch_size) + 1)
            if total % size == 0 and (total // size) % world == 0
        ]
        fits = machine.largest_batch(wanted.target, splits)
        return SetSplit(value=(fits, total // fits))


class SetSplit(Operation):
    """What adjust_batch_size comes down to: (batch_size, grad_accum) at once. Not a name in schedules."""

    name: ClassVar = "adjust_batch_size"
    touches: ClassVar = ("batch_size", "grad_accum")
    value: tuple[PositiveInt, PositiveInt]

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, batch_size=self.value[0], grad_accum=self.value[1])
