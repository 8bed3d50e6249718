"""A model's weights in the number types that its settings ask for, and what rounding them did.

Frozen matrices are rounded where `weights_dtype` is bfloat16 (model/narrow.py says which). What trains again is float32
again, with the values that it had: that is exact. The model that is given is left as it is, because a change of the run
may yet fail on another rank.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from orchestrate.model.gpt import GPT, put_parameter
from orchestrate.model.narrow import kept_as


@dataclass(frozen=True)
class Cast:
    """What changed its number type, in weights."""

    rounded: int = 0
    """From float32 to bfloat16."""
    error: float = 0.0
    """Root mean square of what rounding changed, as a share of that of the weights that were rounded."""
    widened: int = 0
    """From bfloat16 to float32, exactly."""

    def __bool__(self) -> bool:
        return bool(self.rounded or self.widened)

    def __str__(self) -> str:
        told = []
        if self.rounded:
            told.append(f"{self.rounded:,} frozen weights rounded to bfloat16, by {self.error:.1e} of their size")
        if self.widened:
            told.append(f"{self.widened:,} weights float32 again, as they were")
        return "; ".join(told)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_kept(model: GPT, trains: Set[str], weights_dtype: str) -> bool:
    """Whether every parameter has the type that it is to be kept in."""
    return all(p.dtype == kept_as(name, p, name in trains, weights_dtype) for name, p in model.named_parameters())


@torch.no_grad()
def kept(model: GPT, trains: Set[str], weights_dtype: str) -> tuple[GPT, Cast]:
    """The model with every parameter in the type that it is to be kept in, and what that changed.

    Parameters that have it already are the same objects in both models. The model must be whole on this rank.
    """
    if is_kept(model, trains, weights_dtype):
        return model, Cast()
    with torch.device("meta"):
        made = GPT(model.config)
    rounded = widened = 0
    lost = size = 0.0
    for name, old in model.named_parameters():
        dtype = kept_as(name, old, name in trains, weights_dtype)
        new = old if old.dtype == dtype else nn.Parameter(old.detach().to(dtype), requires_grad=False)
        put_parameter(made, name, new)
        if new is old:
            continue
        if dtype != torch.bfloat16:
            widened += old.numel()
            continue
        rounded += old.numel()
        if not old.is_meta:
            lost += float((old - new).square().sum())
            size += float(old.square().sum())
    made.reset_buffers(next(model.parameters()).device)
    return made, Cast(rounded, (lost / size) ** 0.5 if size else 0.0, widened)
