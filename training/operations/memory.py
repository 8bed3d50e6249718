"""Operations that save memory: what is kept for the backward pass, and how frozen weights are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import WeightsDtype


@operation("set_activation_checkpointing")
class SetActivationCheckpointing(Operation):
    """Keep only the input of each block for the backward pass and compute its inside again there; or stop doing so.

    A step takes about a third longer. Losses and gradients are the same to the bit, with dropout too.
    """

    source: ClassVar = "Chen et al. 2016 (arXiv:1604.06174)"
    touches: ClassVar = ("activation_checkpointing",)
    value: bool

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, activation_checkpointing=self.value)


@operation("set_weights_dtype")
class SetWeightsDtype(Operation):
    """Keep matrices that do not train (of frozen layers, and under adapters) in bfloat16, or in float32.

    What trains is float32 always. Rounding to bfloat16 changes the function a little, by up to 1/256 of each weight,
    and cannot be undone; the event says by how much. From then on a matrix is rounded when it is frozen or gets an
    adapter, and where an adapter is folded into it while it stays frozen. The way back to float32 is exact.
    """

    keeps: ClassVar = "the function but for rounding; every moment"
    touches: ClassVar = ("weights_dtype",)
    value: WeightsDtype

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, weights_dtype=self.value)
