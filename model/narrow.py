"""Weights kept in a shorter number type than is computed in: which those are, and how layers compute with them.

Only matrices that do not train are kept so: an update is far smaller than what bfloat16 can tell apart. A weight of a
longer type is computed with as torch does it. This file must not decide when a weight changes its type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kept_as(name: str, parameter: Tensor, trains: bool, weights_dtype: str) -> torch.dtype:
    """The type in which a parameter is kept: at least float32, but for frozen matrices under `weights_dtype`.

    The factors of an adapter are small, and its product is computed in their type.
    """
    if not trains and parameter.dim() >= 2 and "lora_" not in name and weights_dtype == "bfloat16":
        return torch.bfloat16
    return wide(parameter.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that something of this type is computed in: float32, or float64 where it is that."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the type of `x`, or of autocast. No longer copy of a frozen weight outlives the call."""
    if weight.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    on = torch.is_autocast_enabled(x.device.type)
    if (torch.get_autocast_dtype(x.device.type) if on else x.dtype) == torch.bfloat16:
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias) if weight.requires_grad else _Widened.apply(x, weight, bias)


class _Widened(torch.autograd.Function):
    """A product with a weight that does not train: autograd by itself would keep its longer copy for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        of_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return of_x, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class WithoutDrawing:
    """On meta, a module without torch's initial values: there is nothing to set, and thousands of modules take long."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(WithoutDrawing, nn.Linear):
    """nn.Linear whose weight may be kept shorter than it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding whose rows come out in the type that is computed in.

    It starts without torch's initial values: every weight is set later, and drawing normals on meta imports the
    compiler.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns, _weight=torch.empty(rows, columns))

    def forward(self, ids: Tensor) -> Tensor:
        found = super().forward(ids)
        return found.to(wide(found.dtype))
