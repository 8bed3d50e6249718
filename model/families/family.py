"""What a family of published models is: the options that it fixes, and its names for the others and for the weights.

A family declares what it can hold. Every option of ModelConfig that it does not name has its default there, so an
option that is new in this project is refused by every family until one says that it has it. Both directions of the
weights follow from one declaration of their places (`Family.places`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from orchestrate.model.config import OPTIONS, ModelConfig
from orchestrate.model.gpt import GPT

Weights = dict[str, Tensor]
HEAD = "lm_head.weight"
"""The output head in all families; where it is tied, files may hold the embedding a second time under this name."""
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Place:
    """Where a parameter of ours lies among theirs.

    Attributes:
        names: theirs; several lie one below the other in ours.
        shapes: the shape of each of them here.
        turned: whether they keep a matrix as (in, out).
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    turned: bool = False

    def theirs(self) -> dict[str, torch.Size]:
        """Their names with the shapes that they have there."""
        return {
            name: torch.Size(reversed(shape)) if self.turned else shape
            for name, shape in zip(self.names, self.shapes, strict=True)
        }

    def read(self, read: Callable[[str], Tensor], into: Tensor) -> None:
        """Copy theirs into ours, one after the other, whatever their number type is."""
        rows = [shape[0] for shape in self.shapes]
        for name, part in zip(self.names, into.split(rows), strict=True):
            value = read(name)
            part.copy_(value.t() if self.turned else value)


@dataclass(frozen=True)
class Family:
    """One architecture as Hugging Face's transformers have it.

    Attributes:
        name: transformers' model type.
        title: its name in messages.
        preset: options that all its models have.
        keys: transformers' configuration key -> the option that it sets, for what differs from model to model.
        modules: our module -> theirs, both without their prefix in a block; a tuple where ours is several of theirs.
        base: what all their names but the head's begin with; files of a model without a head may leave it out.
        blocks: what their names begin with in a block, by its number.
        turned: our modules whose matrix they keep as (in, out).
        ignored: what tensors are called that old files hold beside the weights.
        values: their value -> ours, for options whose values have other names there.
        allowed: their keys that have no counterpart here, and the values that mean nothing is lost.
        by_weights: options that differ from model to model though no key of theirs says so: biases that a model of
            ours lacks are zeros there, and a file without any is a model without.
        more: options that no plain key sets, but `read_more` and `write_more` do.
        read_more: reads those from their configuration into ours; returns what cannot be represented.
        write_more: their keys for those; raises ValueError with what cannot be represented.
    """

    name: str
    title: str
    preset: Mapping[str, Any]
    keys: Mapping[str, str]
    modules: Mapping[str, str | tuple[str, ...]]
    base: str
    blocks: str
    turned: tuple[str, ...] = ()
    ignored: str = r"(?!)"
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    by_weights: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    read_more: Callable[[Any, dict[str, Any]], list[str]] = lambda theirs, ours: []
    write_more: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}

    def config(self, theirs: Any, names: Collection[str] | None = None) -> ModelConfig:
        """Our configuration of one of transformers'. Raises ValueError with everything that has no counterpart.

        Args:
            names: what the tensors of its files are called, where that is known.
        """
        ours = {**self.preset, **{name: getattr(theirs, key, None) for key, name in self.keys.items()}}
        if "bias" in self.by_weights and names is not None and not any(name.endswith(".bias") for name in names):
            ours["bias"] = False
        problems = []
        for key, allowed in self.allowed.items():
            if (value := getattr(theirs, key, allowed[0])) not in allowed:
                problems.append(key if value is True else f"{key} {value!r}")
        for key, name in self.keys.items():
            if name in self.values and ours[name] not in self.values[name]:
                problems.append(f"{key} {ours[name]!r}")
            elif name in self.values:
                ours[name] = self.values[name][ours[name]]
        problems += self.read_more(theirs, ours)
        if problems:
            raise ValueError(f"cannot be represented: {', '.join(problems)}")
        return ModelConfig(**ours)

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of transformers' configuration for a model that the family can hold."""
        theirs: dict[str, Any] = {"model_type": self.name}
        for key, name in self.keys.items():
            value = config.n_hidden[0] if name == "n_hidden" else getattr(config, name)
            back = {ours: other for other, ours in reversed(list(self.values.get(name, {}).items()))}
            theirs[key] = back.get(value, value) if back else value
        return {**theirs, **self.write_more(config)}

    def lacks(self, config: ModelConfig) -> list[str]:
        """What of this model the family cannot hold; [] if it can hold it exactly."""
        problems = ["adapters (merge_lora_weights first)"] if config.lora else []
        if len(set(config.n_hidden)) > 1:
            problems.append("MLPs of different widths")
        differing = {name: getattr(config, name) for name in (*self.keys.values(), *self.by_weights, *self.more)}
        try:
            held = ModelConfig(**{**self.preset, **differing})
            self.write_more(config)
        except ValueError as error:
            return [*problems, str(error)]
        problems += [
            f"{name} {getattr(config, name)!r}"
            for name in OPTIONS
            if getattr(config, name) != getattr(held, name)
            or (name in self.values and getattr(config, name) not in self.values[name].values())
        ]
        return problems

    def places(self, config: ModelConfig) -> dict[str, Place]:
        """Where each parameter of a model of this shape lies among theirs, in the model's order."""
        with torch.device("meta"):
            model = GPT(config)
        found = {}
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            block = _BLOCK.match(path)
            module = block[2] if block else path
            theirs = self.modules[module]
            theirs = (theirs,) if isinstance(theirs, str) else theirs
            prefix = self.blocks.format(block[1]) if block else ""
            # Ours is several of theirs for queries, keys and values only.
            rows = [len(parameter)] if len(theirs) == 1 else model.transformer["h"][0].attn.widths
            shapes = tuple(torch.Size([count, *parameter.shape[1:]]) for count in rows)
            turned = leaf == "weight" and module in self.turned
            found[name] = Place(tuple(f"{prefix}{part}.{leaf}" for part in theirs), shapes, turned)
        return found

    def to_hf(self, config: ModelConfig, weights: Weights) -> Weights:
        """Our names and tensors as theirs, with the head also where it is tied; views where they can be."""
        theirs: Weights = {}
        whole = replace(config, bias=True) if "bias" in self.by_weights else config
        like = next(iter(weights.values()))
        for name, place in self.places(whole).items():
            rows = [shape[0] for shape in place.shapes]
            value = weights[name] if name in weights else like.new_zeros(sum(rows))
            for part, other in zip(value.split(rows), place.names, strict=True):
                theirs[other] = part.t() if place.turned else part
        return {**theirs, HEAD: weights["transformer.wte.weight" if config.tie_weights else HEAD]}
