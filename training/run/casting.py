"""Weights in the number types that settings ask for, and what rounding them did.

Frozen matrices are rounded where `weights_dtype` is bfloat16 (model/narrow.py says which). What trains again is float32
again, with the values that it had: that is exact. The model that is given is left as it is, because a change of the run
may yet fail on another rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrate.model.gpt import GPT, adapted_modules, put_parameter
from orchestrate.model.lora import trainable_parameters
from orchestrate.model.narrow import kept_as
from orchestrate.training.settings.records import Settings


@dataclass(frozen=True)
class Cast:
    """What changed its number type, in weights."""

    rounded: int = 0
    """From a longer type to bfloat16."""
    lost: float = 0.0
    """Sum of the squares of what rounding changed, and of the weights that were rounded."""
    size: float = 0.0
    widened: int = 0
    """From bfloat16 to float32, exactly."""

    def __bool__(self) -> bool:
        return bool(self.rounded or self.widened)

    def __add__(self, other: Cast) -> Cast:
        sums = self.rounded + other.rounded, self.lost + other.lost, self.size + other.size
        return Cast(*sums, self.widened + other.widened)

    @property
    def error(self) -> float:
        """Root mean square of what rounding changed, as a share of that of the weights that were rounded."""
        return (self.lost / self.size) ** 0.5 if self.size else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"rounded": self.rounded, "error": self.error, "widened": self.widened}


def in_words(cast: Mapping[str, Any]) -> str:
    """A cast, as events say it, in one sentence."""
    facts = []
    if cast["rounded"]:
        how = f"by {cast['error']:.1e} of their size" if cast["error"] else "without a change of their values"
        facts.append(f"{cast['rounded']:,} frozen weights rounded to bfloat16, {how}")
    if cast["widened"]:
        facts.append(f"{cast['widened']:,} weights float32 again, as they were")
    return "; ".join(facts)


def types_of(model: GPT, trains: Set[str], weights_dtype: str) -> dict[str, torch.dtype]:
    """The type in which each parameter is to be kept."""
    return {name: kept_as(name, p, name in trains, weights_dtype) for name, p in model.named_parameters()}


class Casting:
    """Puts values, one by one, into the types in which they are kept.

    Args:
        types: of parameters by name; a value of another name stays as it is.

    Attributes:
        cast: what that changed so far.
    """

    def __init__(self, types: Mapping[str, torch.dtype]) -> None:
        self.types, self.cast = types, Cast()

    @classmethod
    def at_start(cls, settings: Settings) -> Casting:
        """For the weights of others, which have no adapters yet. What PiSSA takes its part of is rounded after that."""
        with torch.device("meta"):
            model = GPT(settings.model)
        types = types_of(model, trainable_parameters(model, settings.frozen), settings.weights_dtype)
        found = {name.replace(".base_layer.", "."): dtype for name, dtype in types.items()}
        for path, specs in adapted_modules(settings.model).items():
            if any(spec.init_lora_weights == "pissa" for spec in specs.values()):
                del found[f"{path}.weight"]
        return cls(found)

    @torch.no_grad()
    def __call__(self, name: str, value: Tensor) -> Tensor:
        new = value.detach().to(self.types.get(name, value.dtype))
        if new.dtype == value.dtype:
            return value
        if new.dtype != torch.bfloat16:
            self.cast += Cast(widened=value.numel())
        elif value.is_meta:
            self.cast += Cast(value.numel())
        else:
            self.cast += Cast(value.numel(), float((value - new).square().sum()), float(value.square().sum()))
        return new


def kept(model: GPT, trains: Set[str], weights_dtype: str) -> tuple[GPT, Cast]:
    """The model with every parameter in the type that it is to be kept in, and what that changed.

    Parameters that have it already are the same objects in both models, and a model in which all do is returned as it
    is. The model must be whole on this rank.
    """
    casting = Casting(types_of(model, trains, weights_dtype))
    if is_kept(model, casting.types):
        return model, Cast()
    with torch.device("meta"):
        made = GPT(model.config)
    for name, old in model.named_parameters():
        new = casting(name, old)
        put_parameter(made, name, old if new is old else nn.Parameter(new, requires_grad=False))
    made.reset_buffers(next(model.parameters()).device)
    return made, casting.cast


def is_kept(model: GPT, types: Mapping[str, torch.dtype]) -> bool:
    """Whether every parameter has its type."""
    return all(p.dtype == types[name] for name, p in model.named_parameters())
