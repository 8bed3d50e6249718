"""Where each parameter of a reshaped model came from, and how an optimizer's state follows it.

Moments follow the scale of the GRADIENT, not of the weight: where an unchanged function is written with a weight that
is c times what it was, the gradient is 1/c of what it was. A mean of gradients scales with it, a mean of their squares
with its square. An optimizer declares what it keeps and how that follows (`Slot`): no optimizer is known here.

What is new has no moments. Left at zero beside a step count that says they are long settled, Adam would divide a first
gradient by the root of almost nothing: with beta2 = 0.999 the update is 3 times the learning rate at once and 6 times
it ten steps later; counted from step 0 it is a full learning rate for every element, however small its gradient. So a
new element starts with exp_avg 0 and with the exp_avg_sq of its kin (the mean over what is known of the same parameter,
or of `prior`), as its slots say: its update is as large as its gradient is beside theirs, and warms up as 1 - beta1^t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
"""An optimizer's state: parameter name -> slot name -> tensor."""


@dataclass(frozen=True)
class Slot:
    """One tensor that an optimizer keeps for a parameter, and how it follows the parameter through a lineage.

    Attributes:
        per: what it has a number for: each "element" (the parameter's shape), each "row" (all dimensions but the first
            are 1), or the "parameter" as a whole (shape (), copied as it is: a count of steps).
        grad_power, weight_power: new = old * grad_scale ** grad_power * weight_scale ** weight_power.
        new: what starts where there is no image: "zero", or the mean of its "kin".
    """

    per: Literal["element", "row", "parameter"] = "element"
    grad_power: int = 0
    weight_power: int = 0
    new: Literal["zero", "kin"] = "zero"

    def shape(self, parameter: torch.Size) -> torch.Size:
        """The slot's shape, from the parameter's."""
        if self.per == "element":
            return parameter
        return torch.Size([]) if self.per == "parameter" else torch.Size([*parameter[:1], *[1] * len(parameter[1:])])


@dataclass(frozen=True)
class Origin:
    """Where one parameter of the new model came from.

    Attributes:
        name: the old parameter, or None where there is no image (the moments start afresh).
        index: per dimension, the old index of each new one (-1: new), or None for all as they were; () for the same
            shape throughout.
        weight_scale, grad_scale: new = old * scale, for the value and for its gradient.
        prior: without `name`, the old parameter that is the new one's kin; None for the optimizer's own start, as at
            step 0.
        exact: whether the moments are those that the new model would have had. Where they are not, what is carried
            is an approximation, and `note` says of what.
        note: why there is no exact image, or what the mapping leaves out.
    """

    name: str | None
    index: tuple[Tensor | None, ...] = ()
    weight_scale: float | Tensor = 1.0
    grad_scale: float | Tensor = 1.0
    prior: str | None = None
    exact: bool = True
    note: str = ""


Lineage = dict[str, Origin]
"""Every parameter of the new model, in model order."""


def follow(old: Tensor, origin: Origin, shape: torch.Size, scale: float | Tensor) -> Tensor:
    """`old` along the origin's index, times scale; zero where it is new. A copy unless nothing changes."""
    new = old
    if old.device.type == "meta":  # only shapes: arithmetic there would import torch's compiler for seconds
        index = origin.index or (None,) * old.dim()
        new = torch.empty([s if i is None else len(i) for s, i in zip(old.shape, index, strict=True)], device="meta")
        assert new.shape == shape, (origin, tuple(new.shape), tuple(shape))
        return new
    for dim, index in enumerate(origin.index):
        if index is not None:
            new = new.index_select(dim, index.clamp(min=0).to(old.device))
    mask = known(origin, old.device)
    if mask is not None:
        new = torch.where(mask, new, torch.zeros((), dtype=new.dtype, device=new.device))
    assert new.shape == shape, (origin, tuple(new.shape), tuple(shape))
    if isinstance(scale, Tensor):
        return new * scale.to(device=new.device, dtype=new.dtype)
    return new if scale == 1.0 else new * scale


def known(origin: Origin, device: torch.device) -> Tensor | None:
    """Where the new parameter has an image in the old one, broadcastable to its shape; None for everywhere."""
    mask = None
    for dim, index in enumerate(origin.index):
        if index is not None and bool((index < 0).any()):
            here = (index >= 0).to(device).view([-1 if d == dim else 1 for d in range(len(origin.index))])
            mask = here if mask is None else mask & here
    return mask


def carry(
    state: Mapping[str, Mapping[str, Tensor]],
    lineage: Lineage,
    shapes: Mapping[str, torch.Size],
    slots: Mapping[str, Slot],
) -> State:
    """An optimizer's state for the new model. A parameter with neither image nor prior has none after."""
    carried: State = {}
    taken: set[str] = set()
    for name, origin in lineage.items():
        source = origin.name if origin.name is not None else origin.prior
        old = state.get(source) if source is not None else None
        if old is None or source is None:
            continue
        assert old.keys() <= slots.keys(), (source, list(old), list(slots))
        new = {key: _image(old[key], slot, origin, shapes[name]) for key, slot in slots.items() if key in old}
        if source in taken:  # a second image of one parameter has moments of its own
            new = {key: value.clone() for key, value in new.items()}
        if origin.name is not None:
            taken.add(source)
        carried[name] = new
    return carried


def _image(old: Tensor, slot: Slot, origin: Origin, parameter: torch.Size) -> Tensor:
    """One slot of a parameter of the new model, which has the shape `parameter`."""
    shape = slot.shape(parameter)
    if slot.per == "parameter":
        return old.clone()
    if origin.name is None:
        return old.new_zeros(shape) if slot.new == "zero" else old.mean().expand(shape).clone()
    scale: float | Tensor = 1.0
    if slot.grad_power:
        scale = origin.grad_scale**slot.grad_power
    if slot.weight_power:
        scale = scale * origin.weight_scale**slot.weight_power
    if slot.per == "row":
        origin = replace(origin, index=tuple(None if dim else index for dim, index in enumerate(origin.index)))
        if isinstance(scale, Tensor) and len(shape) > 1:
            scale = scale.expand(parameter).mean(tuple(range(1, len(shape))), keepdim=True)
    new, mask = follow(old, origin, shape, scale), known(origin, old.device)
    return new if mask is None or slot.new == "zero" else torch.where(mask, new, old.mean())
