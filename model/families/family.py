"""What a family of published models is: the options that it fixes, and its names for the others and for the weights.

A family declares what it can hold. Every option of ModelConfig that it does not name has its default there, so an
option that is new in this project is refused by every family until one says that it has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orchestrate.model.config import OPTIONS, ModelConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture as Hugging Face's transformers have it.

    Attributes:
        name: transformers' model type.
        title: its name in messages.
        preset: options that all its models have.
        keys: transformers' configuration key -> the option that it sets, for what differs from model to model.
        values: their value -> ours, for options whose values have other names there.
        allowed: their keys that have no counterpart here, and the values that mean nothing is lost.
        by_weights: options that differ from model to model though no key of theirs says so: the weights can hold both.
        read_more: reads what no plain key says, from their configuration into ours; returns what cannot be represented.
        from_hf, to_hf: their names and tensors as ours, and ours as theirs.
    """

    name: str
    title: str
    preset: Mapping[str, Any]
    keys: Mapping[str, str]
    from_hf: Callable[[ModelConfig, Weights], Weights]
    to_hf: Callable[[ModelConfig, Weights], Weights]
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    by_weights: tuple[str, ...] = ()
    read_more: Callable[[Any, dict[str, Any]], list[str]] = lambda theirs, ours: []

    def config(self, theirs: Any) -> ModelConfig:
        """Our configuration of one of transformers'. Raises ValueError with everything that has no counterpart."""
        ours = {**self.preset, **{name: getattr(theirs, key, None) for key, name in self.keys.items()}}
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
        return theirs

    def lacks(self, config: ModelConfig) -> list[str]:
        """What of this model the family cannot hold; [] if it can hold it exactly."""
        problems = ["adapters (merge_lora_weights first)"] if config.lora else []
        if len(set(config.n_hidden)) > 1:
            problems.append("MLPs of different widths")
        differing = {name: getattr(config, name) for name in (*self.keys.values(), *self.by_weights)}
        try:
            held = ModelConfig(**{**self.preset, **differing})
        except ValueError as error:
            return [*problems, str(error)]
        problems += [
            f"{name} {getattr(config, name)!r}"
            for name in OPTIONS
            if getattr(config, name) != getattr(held, name)
            or (name in self.values and getattr(config, name) not in self.values[name].values())
        ]
        return problems
