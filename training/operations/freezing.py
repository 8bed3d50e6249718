"""Operations that freeze and unfreeze layers. Frozen parameters keep their value and their moments."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from orchestrate.model.config import layer_names
from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.operations.layers import LayerNames, layers
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings


def _with_frozen(settings: Settings, frozen: set[str]) -> Settings:
    """Model order, so that equal sets are equal Settings."""
    return replace(settings, frozen=tuple(name for name in layer_names(settings.model) if name in frozen))


@operation("freeze_layer")
class FreezeLayer(Operation):
    """Stop training the named layers (a name, a glob such as `block.*`, or a list); their moments are kept."""

    touches: ClassVar = ("frozen",)
    value: LayerNames

    def plan(self, settings: Settings) -> Settings:
        frozen = set(settings.frozen) | set(layers(settings.model, self.value))
        if frozen == set(layer_names(settings.model)):
            raise ScheduleError("freeze_layer would leave nothing to train: every layer would be frozen")
        return _with_frozen(settings, frozen)


@operation("unfreeze_layer")
class UnfreezeLayer(Operation):
    """Train the named layers again (a name, a glob such as `block.*`, or a list), with the moments they had."""

    touches: ClassVar = ("frozen",)
    value: LayerNames

    def plan(self, settings: Settings) -> Settings:
        return _with_frozen(settings, set(settings.frozen) - set(layers(settings.model, self.value)))
