"""Where each parameter of a reshaped model came from, and how AdamW's moments follow it.

Moments follow the scale of the GRADIENT, not of the weight: where an unchanged function is written with a weight that
is c times what it was, the gradient is 1/c of what it was. exp_avg scales with it, exp_avg_sq with its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Origin:
    """Where one parameter of the new model came from.

    Attributes:
        name: the old parameter, or None where there is no exact image (the moments start afresh).
        index: per dimension, the old index of each new one (-1: new), or None for all as they were; () for the same
            shape throughout.
        weight_scale, grad_scale: new = old * scale, for the value and for its gradient.
        note: why there is no image, or what the mapping leaves out.
    """

    name: str | None
    index: tuple[Tensor | None, ...] = ()
    weight_scale: float | Tensor = 1.0
    grad_scale: float | Tensor = 1.0
    note: str = ""


Lineage = dict[str, Origin]
"""Every parameter of the new model, in model order."""


def follow(old: Tensor, origin: Origin, shape: torch.Size, scale: float | Tensor) -> Tensor:
    """`old` along the origin's index, times scale; zero where it is new. A copy unless nothing changes."""
    new = old
    for dim, index in enumerate(origin.index):
        if index is None:
            continue
        index = index.to(old.device)
        new = new.index_select(dim, index.clamp(min=0))
        known = (index >= 0).view([-1 if d == dim else 1 for d in range(new.dim())])
        new = torch.where(known, new, torch.zeros((), dtype=new.dtype, device=new.device))
    assert new.shape == shape, (origin, tuple(new.shape), tuple(shape))
    return new if isinstance(scale, float) and scale == 1.0 else new * scale


def carry(
    state: Mapping[str, Mapping[str, Tensor]], lineage: Lineage, shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state for the new model. Parameters without an image, or without state before, have none after."""
    carried: dict[str, dict[str, Tensor]] = {}
    for name, origin in lineage.items():
        old = state.get(origin.name) if origin.name is not None else None
        if old is None:
            continue
        carried[name] = {
            "exp_avg": follow(old["exp_avg"], origin, shapes[name], origin.grad_scale),
            "exp_avg_sq": follow(old["exp_avg_sq"], origin, shapes[name], origin.grad_scale**2),
            "step": old["step"],
        }
    return carried
