"""What a model is, as plain values: ModelConfig, and the names of its layers.

A ModelConfig alone decides every parameter's name and shape. It is frozen, compares by value and goes through JSON
unchanged. This file imports no torch: shapes can be reasoned about without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "relu2", "swiglu"),
    "position": ("learned", "rotary"),
}
# Far above any model there is. More is a slip of the pen, and would take hours or all memory to find out.
LIMITS = {
    "block_size": 2**24,
    "vocab_size": 2**24,
    "n_layer": 2**12,
    "n_head": 2**14,
    "n_kv_head": 2**14,
    "n_embd": 2**20,
    "head_size": 2**20,
}
_LARGEST_HIDDEN = 2**22
# Fields that ModelConfig had in checkpoints of older versions; they are Settings' now.
ONCE_SHAPE = ("dropout", "fading")
# Leaf layers of one block in the order of the model, and the suffix of the module that holds each.
BLOCK_LAYERS = ("ln_1", "attn", "ln_2", "mlp")


@dataclass(frozen=True)
class LoraSpec:
    """One layer's adapter: rank of its factors and alpha; their product is scaled by alpha / rank."""

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Fade:
    """A leaf layer whose newest part is being faded in: masked growth.

    The first `known` units (attn: query heads, mlp: hidden units, lm_head: token ids) count in full, the others by
    `share`, from 0 to 1. With known = 0 it is what the whole layer adds to the residual stream.
    """

    known: int
    share: float


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. GPT-2 (124M, without biases) by default; Llama by norm, activation, position and tying.

    n_kv_head, head_size and n_hidden may be given as None and are filled in: n_head, n_embd / n_head, and 4 * n_embd
    (SwiGLU: 8/3 * n_embd, rounded up to a multiple of 64). Who replaces n_embd gives them anew too. Raises ValueError
    with everything that is impossible about the shape.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = None  # type: ignore[assignment]
    n_embd: int = 768
    head_size: int = None  # type: ignore[assignment]
    n_hidden: tuple[int, ...] = None  # type: ignore[assignment]
    """Hidden width of each block's MLP; one whole number means the same for all."""
    bias: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    position: str = "learned"
    rotary_base: float = 10000.0
    rotary_scale: float = 1.0
    """Rotary positions are divided by it (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""
    tie_weights: bool = True
    lora: dict[str, LoraSpec] = field(default_factory=dict)
    """Leaf layer name -> adapter, for attn.N, mlp.N, wte and (untied) lm_head."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        problems = [
            f"{name} must be a whole number from 1 to {limit}, got {getattr(self, name)!r}"
            for name, limit in LIMITS.items()
            if not (getattr(self, name) is None and name in ("n_kv_head", "head_size"))
            and not (_is_whole(getattr(self, name)) and 1 <= getattr(self, name) <= limit)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        if self.n_kv_head is None:
            put("n_kv_head", self.n_head)
        if self.head_size is None:
            if self.n_embd % self.n_head:
                problems.append(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
            put("head_size", max(1, self.n_embd // self.n_head))
        if self.n_hidden is None:
            width = 4 * self.n_embd
            if self.activation == "swiglu":
                # Three matrices instead of two: 8/3 keeps the parameters of a 4x MLP (Shazeer 2020, arXiv:2002.05202).
                width = -(-8 * self.n_embd // (3 * 64)) * 64
            put("n_hidden", width)
        if isinstance(self.n_hidden, int):
            put("n_hidden", (self.n_hidden,) * self.n_layer)
        put("n_hidden", tuple(self.n_hidden))
        if len(self.n_hidden) != self.n_layer:
            problems.append(f"n_hidden has {len(self.n_hidden)} widths for {self.n_layer} layers")
        problems += [
            f"n_hidden must be a whole number from 1 to {_LARGEST_HIDDEN}, got {width!r}"
            for width in dict.fromkeys(self.n_hidden)
            if not _is_whole(width) or not 1 <= width <= _LARGEST_HIDDEN
        ]
        if self.n_head % self.n_kv_head:
            problems.append(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        problems += [
            f"{name} must be positive and finite, got {getattr(self, name)!r}"
            for name in ("norm_eps", "rotary_base", "rotary_scale")
            if not 0 < getattr(self, name) < math.inf
        ]
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.position == "rotary" and self.head_size % 2:
            problems.append(f"rotary positions need an even head size, got {self.head_size}")
        put("lora", {name: self.lora[name] for name in layer_names(self) if name in self.lora} | self.lora)
        for name, spec in self.lora.items():
            limit = self._largest_rank(name)
            if not limit:
                problems.append(f"{name} cannot carry a LoRA adapter; attn.N, mlp.N, wte and an untied lm_head can")
            elif not 1 <= spec.rank <= limit:
                problems.append(f"LoRA rank of {name} must be from 1 to {limit} (0 removes it), got {spec.rank}")
            elif not 0 < spec.alpha < math.inf:
                problems.append(f"LoRA alpha of {name} must be positive and finite, got {spec.alpha}")
        if problems:
            raise ValueError("; ".join(problems))

    def _largest_rank(self, name: str) -> int:
        """The full rank of the layer's smallest matrix; 0 for a layer that takes no adapter or does not exist."""
        if name not in layer_names(self):
            return 0
        kind, _, index = name.partition(".")
        match kind:
            case "attn":
                return min(self.n_embd, self.n_head * self.head_size)
            case "mlp":
                return min(self.n_embd, self.n_hidden[int(index)])
            case "wte" | "lm_head":
                return min(self.n_embd, self.vocab_size)
        return 0

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lora = {name: {"rank": spec.rank, "alpha": spec.alpha} for name, spec in self.lora.items()}
        return {**values, "n_hidden": list(self.n_hidden), "lora": lora}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of to_json, also an older version's. Raises ValueError for unknown fields, impossible shapes."""
        values = {name: value for name, value in values.items() if name not in ONCE_SHAPE}
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"model configuration: unknown fields {', '.join(unknown)}")
        lora = {name: LoraSpec(**spec) for name, spec in values.get("lora", {}).items()}
        return cls(**{**values, "lora": lora})


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_fading(config: ModelConfig, fading: Mapping[str, Fade]) -> None:
    """Raises ValueError for a fade that a model of this shape cannot show."""
    for name, fade in fading.items():
        if name != "lm_head" and (name.split(".")[0] not in ("attn", "mlp") or name not in layer_names(config)):
            raise ValueError(f"{name} cannot fade in; attn.N, mlp.N and lm_head can")
        if fade.known < 0 or not 0 <= fade.share <= 1:
            raise ValueError(f"{name} fades in from {fade.known} by {fade.share}: allowed are 0 and more, and [0, 1]")


def layer_names(config: ModelConfig) -> list[str]:
    """All leaf layers in model order; no wpe with rotary positions, no lm_head when it is tied to wte."""
    names = ["wte"] + (["wpe"] if config.position == "learned" else [])
    names += [f"{kind}.{n}" for n in range(config.n_layer) for kind in BLOCK_LAYERS]
    return names + ["ln_f"] + ([] if config.tie_weights else ["lm_head"])


def expand_layers(config: ModelConfig, names: str | Sequence[str]) -> list[str]:
    """The leaf layers that one name, a glob or a list of them stands for, in model order.

    block.N stands for its four leaves, a negative N counts from the last block, and lm_head stands for wte where they
    are tied. Raises ValueError for a name that matches nothing.
    """
    leaves = layer_names(config)
    blocks = {f"block.{n}": [f"{kind}.{n}" for kind in BLOCK_LAYERS] for n in range(config.n_layer)}
    groups = {**{name: [name] for name in leaves}, **blocks}
    if config.tie_weights:
        groups["lm_head"] = ["wte"]
    found: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        if (match := re.fullmatch(r"(\w+)\.-(\d+)", name)) and 0 < int(match[2]) <= config.n_layer:
            name = f"{match[1]}.{config.n_layer - int(match[2])}"
        matched = [group for group in groups if fnmatch.fnmatchcase(group, name)]
        if not matched:
            close = difflib.get_close_matches(name, groups, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            last = config.n_layer - 1
            raise ValueError(
                f"no layer is called {name!r}: there are {', '.join(n for n in leaves if '.' not in n)} and "
                f"attn, mlp, ln_1, ln_2, block .0 to .{last} (.-1 is the last), or a glob such as 'attn.*'{hint}"
            )
        for group in matched:
            found.update(groups[group])
    return [name for name in leaves if name in found]


_BLOCK_PARAMETER = re.compile(r"transformer\.h\.(\d+)\.(\w+)\.")


def layer_of_parameter(name: str) -> str:
    """The leaf layer that a parameter belongs to: transformer.h.3.attn.c_attn.weight -> attn.3."""
    if match := _BLOCK_PARAMETER.match(name):
        return f"{match[2]}.{match[1]}"
    return name.removeprefix("transformer.").split(".")[0]
