"""Optimizers whose state is known by parameter name, and what the rest of the code may ask of one.

torch keeps optimizer state by position; after a change of the model a position can mean another parameter. Here the
state goes in and out by name, the groups follow the order of the model, and the state of frozen parameters waits
aside until they train again. An optimizer declares its slots; growth, checkpoints, the plan and sharding ask for that
declaration and know no slot by name. Nothing here knows about operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from orchestrate.model.lineage import Slot, State
from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.sharding import is_sharded, local
from orchestrate.training.settings.records import Settings


class Group(NamedTuple):
    """Parameters that one rule holds for."""

    names: list[str]
    factor: float
    """Of the learning rate."""
    decays: bool
    """Whether weight decay is applied."""


class Optimizer:
    """The named trainable parameters of a model, and how they are updated. A subclass declares one method.

    torch's fused implementation is used where it has one for the device (AdamW on the CPU: 4.7 times faster than the
    loop).

    Args:
        model: gives the parameters and their order.
        trainable: names of the parameters to update.
        state: slots by name, taken over without a copy; names that do not train are kept for later.

    Attributes:
        inner: torch's optimizer, for a GradScaler.
        note: what a person should know of how it works on this machine, or nothing.
    """

    name: ClassVar[str]
    slots: ClassVar[Mapping[str, Slot]]
    """What it keeps for a parameter. torch's own names: checkpoints hold them."""
    implementation: ClassVar[Callable[..., torch.optim.Optimizer]]

    def __init__(self, model: nn.Module, trainable: Iterable[str], state: Mapping[str, dict[str, Tensor]]) -> None:
        wanted = set(trainable)
        everything = dict(model.named_parameters())
        self._parameters = {name: p for name, p in everything.items() if name in wanted}
        assert len(self._parameters) == len(wanted), sorted(wanted - set(everything))
        groups = self.groups(model)
        assert sorted(name for group in groups for name in group.names) == sorted(everything), "each in one group"
        self._fused, self._heeds_veto = self._probe()
        self.inner = self.implementation(
            [
                {"params": parameters, "factor": group.factor, "decays": group.decays}
                for group in groups
                if (parameters := [self._parameters[name] for name in group.names if name in wanted])
            ],
            lr=0.0,  # set before every step
            fused=self._fused,
        )
        self._waiting: State = {}
        for name, slots in state.items():
            if name in self._parameters:
                self.inner.state[self._parameters[name]] = dict(slots)
            elif name in everything:
                self._waiting[name] = dict(slots)

    @classmethod
    def groups(cls, model: nn.Module) -> list[Group]:
        """The rule. Tensors of two and more dimensions decay, others (biases, norms) do not, as in nanoGPT."""
        named = dict(model.named_parameters())
        decayed = [name for name, p in named.items() if p.dim() >= 2]
        return [Group(decayed, 1.0, True), Group([name for name, p in named.items() if p.dim() < 2], 1.0, False)]

    @staticmethod
    def options(settings: Settings) -> dict[str, Any]:
        """Its numbers beside rate and weight decay, as torch calls them."""
        raise NotImplementedError

    @classmethod
    def state_shapes(cls, name: str, shape: torch.Size) -> dict[str, torch.Size]:
        """The shape of every slot of a parameter of this name and shape, once it has trained."""
        return {key: slot.shape(shape) for key, slot in cls.slots.items()}

    @classmethod
    def state_bytes(cls, name: str, shape: torch.Size, share: int = 1) -> int:
        """Bytes of these slots on one rank, where `share` ranks hold a part each of what is not a single number."""
        shapes = cls.state_shapes(name, shape).values()
        return 4 * sum(math.prod(s) for s in shapes if s) // share + 4 * sum(not s for s in shapes)

    @property
    def names(self) -> list[str]:
        """The parameters that train, in model order."""
        return list(self._parameters)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train, in model order."""
        return list(self._parameters.values())

    def state_by_name(self) -> State:
        """The slots of every parameter that has some, frozen ones included. Shares memory with the optimizer."""
        state: State = {name: dict(slots) for name, slots in self._waiting.items()}
        for name, parameter in self._parameters.items():
            slots = self.inner.state.get(parameter)
            if slots:
                state[name] = dict(slots)
        return state

    def set(self, lr: float, settings: Settings) -> None:
        """Set what the next step uses; each group's rate is `lr` times its factor."""
        for group in self.inner.param_groups:
            group.update(self.options(settings), lr=lr * group["factor"])
            group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0

    def step(self, veto: Tensor | None = None) -> None:
        """Update from the gradients. Where `veto`, a number on the device, is not 0, nothing changes.

        Also with a GradScaler: unscale, make a veto of what is not finite, step, update the scale.
        """
        if veto is not None and not self._heeds_veto:
            if veto.item():
                return
            veto = None
        self._begin(self.inner)
        self.inner.found_inf = veto  # the fused kernels look at this on the device: no host waits to know
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    @staticmethod
    def _begin(inner: torch.optim.Optimizer) -> None:
        """What a first step needs that torch does not make itself."""

    @property
    def note(self) -> str:
        if self._heeds_veto:
            return ""
        like = next(iter(self._parameters.values()))
        where = f"{'sharded ' if is_sharded(like) else ''}parameters on {like.device.type}"
        if self._fused:
            told = f"torch's fused kernel for {where} updates in spite of a veto"
        else:
            told = f"torch has no fused kernel for {where}"
        return f"{self.name}: {told}, so every step waits until it is known whether its gradients are sound"

    def _probe(self) -> tuple[bool, bool]:
        """(torch has a fused kernel for these parameters, it heeds a veto): tried once in a process, not believed."""
        like = min(self.parameters, key=lambda p: local(p)[0].numel() or math.inf)
        key = (type(self), like.device.type, like.dtype, is_sharded(like))
        if key not in _PROBED:
            trial = nn.Parameter(torch.ones_like(like.detach()))
            trial.grad = torch.full_like(trial, math.nan)
            try:
                inner = self.implementation([trial], lr=1.0, fused=True)
                self._begin(inner)
                inner.found_inf = torch.ones((), device=like.device)
                inner.step()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return _PROBED.setdefault(key, (False, False))
            intact = bool((local(trial.detach())[0] == 1).all())
            _PROBED[key] = True, intact and not any(bool(local(v)[0].any()) for v in inner.state[trial].values())
        return _PROBED[key]


_PROBED: dict[tuple[Any, ...], tuple[bool, bool]] = {}


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    name = "adamw"
    slots: ClassVar = {
        "exp_avg": Slot(grad_power=1),
        "exp_avg_sq": Slot(grad_power=2, new="kin"),
        "step": Slot(per="parameter"),
    }
    implementation = torch.optim.AdamW

    @staticmethod
    def options(settings: Settings) -> dict[str, Any]:
        return {"betas": (settings.beta1, settings.beta2)}


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak 1964): m <- momentum * m + g, p <- p - lr * m.

    Weight decay is added to the gradient, as torch does it. At momentum 0 the buffers rest.
    """

    name = "sgd"
    slots: ClassVar = {"momentum_buffer": Slot(grad_power=1)}
    implementation = staticmethod(functools.partial(torch.optim.SGD, momentum=0.9))

    @staticmethod
    def options(settings: Settings) -> dict[str, Any]:
        return {"momentum": settings.momentum}

    @staticmethod
    def _begin(inner: torch.optim.Optimizer) -> None:
        # torch's fused step makes buffers of uninitialised memory, which a veto leaves so, and only where none has one.
        for group in inner.param_groups:
            for p in group["params"]:
                if p not in inner.state:
                    inner.state[p]["momentum_buffer"] = torch.zeros_like(p)


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.name: cls for cls in (AdamW, SGD)}


def make_optimizer(settings: Settings, model: nn.Module, trainable: Iterable[str], state: State) -> Optimizer:
    """The optimizer that the settings name, over these parameters; see `Optimizer`."""
    return OPTIMIZERS[settings.optimizer](model, trainable, state)
