"""Operations on the learning rate, the optimizer's numbers and dropout: none touches a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Strict

from orchestrate.model.config import ModelConfig, layer_of_parameter
from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import Lineage, Origin
from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.operations.layers import LayerNames, layers
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import (
    OPTIMIZER_NUMBERS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)


@operation("set_lr")
class SetLearningRate(Operation):
    """Set the peak learning rate; the schedule of the rate (warmup, decay) goes on and scales from it."""

    touches: ClassVar = ("learning_rate",)
    ramps: ClassVar = True
    value: NonNegativeFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, learning_rate=self.value)


@operation("change_lr")
class ChangeLearningRate(Operation):
    """Multiply the learning rate by a factor: the whole curve, so both learning_rate and min_lr."""

    touches: ClassVar = ("learning_rate", "min_lr")
    ramps: ClassVar = True
    value: PositiveFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(
            settings,
            learning_rate=settings.learning_rate * self.value,
            min_lr=settings.min_lr * self.value,
        )


@operation("set_min_lr")
class SetMinLearningRate(Operation):
    """Set the learning rate at which the decay ends."""

    touches: ClassVar = ("min_lr",)
    ramps: ClassVar = True
    value: NonNegativeFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, min_lr=self.value)


@operation("set_warmup_iters")
class SetWarmupIters(Operation):
    """Set the length of the warmup, counted from the (re)start of the learning-rate schedule."""

    touches: ClassVar = ("warmup_iters",)
    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, warmup_iters=self.value)


@operation("set_lr_decay_iters")
class SetDecayIters(Operation):
    """Set where the decay ends, counted from the (re)start of the learning-rate schedule."""

    touches: ClassVar = ("lr_decay_iters",)
    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, lr_decay_iters=self.value)


@operation("set_lr_schedule")
class SetLearningRateSchedule(Operation):
    """Follow another learning-rate schedule from here on: cosine, linear, constant or wsd."""

    touches: ClassVar = ("lr_schedule", "decay_lr")
    value: Literal["cosine", "linear", "constant", "wsd"]

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, lr_schedule=self.value, decay_lr=True)


@operation("reset_lr_schedule")
class ResetLearningRateSchedule(Operation):
    """Start the learning-rate schedule anew at this iteration, warmup included. Takes no value."""

    touches: ClassVar = ("lr_restarts",)

    def plan(self, settings: Settings) -> Settings:
        if not settings.decay_lr:
            raise ScheduleError("reset_lr_schedule has nothing to restart: decay_lr is False")
        return replace(settings, lr_restarts=settings.lr_restarts + 1)


@operation("set_weight_decay")
class SetWeightDecay(Operation):
    """Set the weight decay of the decayed group (tensors of two and more dimensions)."""

    touches: ClassVar = ("weight_decay",)
    ramps: ClassVar = True
    value: NonNegativeFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, weight_decay=self.value)


@operation("change_weight_decay")
class ChangeWeightDecay(Operation):
    """Multiply the weight decay by a factor."""

    touches: ClassVar = ("weight_decay",)
    ramps: ClassVar = True
    value: NonNegativeFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, weight_decay=settings.weight_decay * self.value)


@operation("set_betas")
class SetBetas(Operation):
    """Set AdamW's betas, [beta1, beta2]; the moments are kept."""

    touches: ClassVar = ("beta1", "beta2")
    ramps: ClassVar = True
    value: Annotated[tuple[Fraction, Fraction], Strict(False)]

    def plan(self, settings: Settings) -> Settings:
        if "beta1" not in OPTIMIZER_NUMBERS[settings.optimizer]:
            raise ScheduleError(f"set_betas: {settings.optimizer} has no betas")
        return replace(settings, beta1=self.value[0], beta2=self.value[1])


@operation("set_momentum")
class SetMomentum(Operation):
    """Set the momentum of SGD; its buffers are kept."""

    touches: ClassVar = ("momentum",)
    ramps: ClassVar = True
    value: Fraction

    def plan(self, settings: Settings) -> Settings:
        if "momentum" not in OPTIMIZER_NUMBERS[settings.optimizer]:
            raise ScheduleError(f"set_momentum: {settings.optimizer} has no momentum of its own")
        return replace(settings, momentum=self.value)


@operation("set_grad_clip")
class SetGradClip(Operation):
    """Set the largest global gradient norm; 0 switches clipping off."""

    touches: ClassVar = ("grad_clip",)
    ramps: ClassVar = True
    value: NonNegativeFloat

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, grad_clip=self.value)


@operation("set_dropout")
class SetDropout(Operation):
    """Set the dropout probability of the whole model."""

    touches: ClassVar = ("dropout",)
    ramps: ClassVar = True
    value: Fraction

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, dropout=self.value)


@operation("set_lora_dropout")
class SetLoraDropout(Operation):
    """Set the dropout probability of what the LoRA adapters of Linear layers read."""

    touches: ClassVar = ("lora_dropout",)
    ramps: ClassVar = True
    source: ClassVar = "Hu et al. 2021 (LoRA, arXiv:2106.09685)"
    value: Fraction

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, lora_dropout=self.value)


@operation("rewarm_lr")
class RewarmLearningRate(Operation):
    """Let the rate climb back from 0 to its curve over so many iterations; the curve itself goes on."""

    touches: ClassVar = ("rewarm_iters", "rewarms")
    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, rewarm_iters=self.value, rewarms=settings.rewarms + 1)


@operation("reset_moments")
class ResetMoments(Operation):
    """Forget the optimizer's moments of the named layers (a name, a glob, a list), or of all without a value."""

    keeps: ClassVar = "the function; the moments of the layers that are not named"
    touches: ClassVar = ("reshapes_asked",)
    value: LayerNames | None = None

    def plan(self, settings: Settings) -> Settings:
        if self.value is not None:
            layers(settings.model, self.value)  # raises for a name that is not there
        return replace(settings, reshapes_asked=settings.reshapes_asked + 1)

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        names = [name for name, _ in model.named_parameters()]
        gone = set(layers(target, "*" if self.value is None else self.value))
        return model, {
            name: Origin(None, note="reset") if layer_of_parameter(name) in gone else Origin(name) for name in names
        }
