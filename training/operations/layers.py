"""Layer names in an operation's value: one name, a glob or a list, resolved against the model of that moment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrate.model.config import ModelConfig, expand_adapters, expand_layers
from orchestrate.training.settings.errors import ScheduleError

LayerNames = str | Annotated[list[str], Field(min_length=1)]


def layers(config: ModelConfig, names: LayerNames) -> list[str]:
    """Leaf layer names in model order. Raises ScheduleError for a name that the model does not have."""
    try:
        return expand_layers(config, names)
    except ValueError as error:
        raise ScheduleError(str(error)) from None


def adapters(config: ModelConfig, names: LayerNames) -> list[str]:
    """Leaf layers and projections in model order (expand_adapters). Raises ScheduleError likewise."""
    try:
        return expand_adapters(config, names)
    except ValueError as error:
        raise ScheduleError(str(error)) from None
