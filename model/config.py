"""What a model is, as plain values: ModelConfig, its options, and the names of its layers.

A ModelConfig alone decides every parameter's name and shape. It is frozen, compares by value and goes through JSON
unchanged. Each of its fields is an option that is declared here and nowhere else: the configuration's key with its line
of help, the refusal to change it on resume, the checks of its values, and what a foreign format can hold follow from
the declaration. This file imports no torch: shapes can be reasoned about without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Fields that ModelConfig had in checkpoints of older versions; they are Settings' now.
ONCE_SHAPE = ("dropout", "fading")
# The options of Llama 3.1's rotary scaling; without the first the others mean nothing.
LLAMA3_OPTIONS = (
    "rotary_llama3_factor", "rotary_low_freq_factor", "rotary_high_freq_factor", "rotary_original_length",
)  # fmt: skip
# Leaf layers of one block in the order of the model, and the suffix of the module that holds each.
BLOCK_LAYERS = ("ln_1", "attn", "ln_2", "mlp")
PROJECTIONS = {
    "attn": {"q": "c_attn", "k": "c_attn", "v": "c_attn", "qkv": "c_attn", "o": "c_proj"},
    "mlp": {"up": "c_fc", "gate": "c_gate", "down": "c_proj"},
}
"""What an adapter can be on by itself, as attn.3.q: leaf layer -> projection -> the matrix that it lies in. q, k and v
are rows of one matrix, and qkv is all of it."""
_ALL_LINEAR = [f"{kind}.*.{name}" for kind, names in PROJECTIONS.items() for name in names if name != "qkv"]
TARGET_MODULES = {
    **{f"{glob.split('.')[2]}_proj": [glob] for glob in _ALL_LINEAR},
    "c_attn": ["attn.*.qkv"],
    "c_fc": ["mlp.*.up"],
    "c_proj": ["attn.*.o", "mlp.*.down"],
    "all-linear": _ALL_LINEAR,
    "embed_tokens": ["wte"],
}
"""Names that peft's target_modules has for projections -> ours."""


@dataclass(frozen=True)
class LoraSpec:
    """One adapter: rank of its factors, alpha, and how its factors start, also when they start anew.

    Attributes:
        use_rslora: the product of the factors is scaled by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
            instead of alpha / rank.
        init_lora_weights: "default", a product of zero | "pissa", the strongest directions of the weight, which keeps
            the rest (Meng et al. 2024, arXiv:2404.02948).
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    init_lora_weights: Literal["default", "pissa"] = "default"

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def to_json(self) -> dict[str, Any]:
        """Without what is as it was before there were options, so that older states read alike."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in (False, "default")}


@dataclass(frozen=True)
class Fade:
    """A leaf layer whose newest part is being faded in: masked growth.

    The first `known` units (attn: query heads, mlp: hidden units, lm_head: token ids) count in full, the others by
    `share`, from 0 to 1. With known = 0 it is what the whole layer adds to the residual stream.
    """

    known: int
    share: float


@dataclass(frozen=True)
class Option:
    """What is to be known of a field of ModelConfig beside its name, its type and its default.

    Attributes:
        meaning: the line of help of its configuration key; "" for a field that no key sets.
        choices: the texts that are allowed; () for any value of its type.
        limit: the largest whole number allowed. Far above any model there is: more is a slip of the pen, and would
            take hours or all memory to find out.
        zero: whether 0 has a meaning of its own, which `meaning` tells. A field whose default is None is filled in
            then; any other number may be 0.
        key, on: where the key is a switch of another name: that name, and the value that the switch stands for.
        shapes_blocks: whether a block looks different under another value (a compiled block is one graph for each).
        by_operation: whether an operation of a schedule can change it.
    """

    meaning: str = ""
    choices: tuple[str, ...] = ()
    limit: int = 0
    zero: bool = False
    key: str = ""
    on: str = ""
    shapes_blocks: bool = True
    by_operation: bool = False


def option(default: Any, meaning: str = "", **more: Any) -> Any:
    """A field of ModelConfig, declared as an Option."""
    return field(default=default, metadata={"option": Option(meaning, **more)})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. GPT-2 (124M, without biases) by default; Llama by norm, activation, position and tying.

    n_kv_head, head_size and n_hidden may be given as None and are filled in: n_head, n_embd / n_head, and 4 * n_embd
    (SwiGLU: 8/3 * n_embd, rounded up to a multiple of 64). Who replaces n_embd gives them anew too. Raises ValueError
    with everything that is impossible about the shape.
    """

    block_size: int = option(1024, "tokens in one sequence", limit=2**24, shapes_blocks=False, by_operation=True)
    vocab_size: int = option(50304, limit=2**24, shapes_blocks=False, by_operation=True)
    n_layer: int = option(12, "transformer blocks", limit=2**12, shapes_blocks=False, by_operation=True)
    n_head: int = option(12, "query heads", limit=2**14, by_operation=True)
    n_kv_head: int = option(
        None, "key and value heads (grouped-query attention); 0: n_head", limit=2**14, zero=True, by_operation=True
    )
    n_embd: int = option(
        768,
        "width of the residual stream; weights start with std 0.02 * sqrt(768 / n_embd), nanoGPT's 0.02 at 768",
        limit=2**20,
        by_operation=True,
    )
    head_size: int = option(None, "features of one head; 0: n_embd / n_head", limit=2**20, zero=True, by_operation=True)
    n_hidden: tuple[int, ...] = option(
        None, "hidden width of the MLPs; 0: 4 * n_embd (SwiGLU: 8/3)", limit=2**22, zero=True, shapes_blocks=False,
        by_operation=True,
    )  # fmt: skip
    """Of each block's MLP; one whole number means the same for all."""
    bias: bool = option(False, "biases in Linear and LayerNorm, in all of them")
    attn_bias: str = option(
        "none", "biases of attention: none | qkv (of queries, keys and values: Qwen2) | all; with bias always all",
        choices=("none", "qkv", "all"),
    )  # fmt: skip
    mlp_bias: bool = option(False, "biases of the MLPs; with bias always")
    norm: str = option("layernorm", "layernorm | rmsnorm", choices=("layernorm", "rmsnorm"))
    norm_eps: float = option(1e-5, "epsilon of the norms")
    qk_norm: bool = option(False, "RMSNorm on the queries and keys of each head, before rotary positions")
    activation: str = option(
        "gelu", "gelu | gelu_tanh | relu2 | swiglu", choices=("gelu", "gelu_tanh", "relu2", "swiglu")
    )
    position: str = option(
        "learned", "rotary positions (RoPE) instead of learned ones", choices=("learned", "rotary"),
        key="use_rotary_embeddings", on="rotary",
    )  # fmt: skip
    rotary_base: float = option(10000.0, "base of the rotary frequencies", shapes_blocks=False, by_operation=True)
    rotary_scale: float = option(
        1.0, "rotary positions are divided by it (position interpolation)", shapes_blocks=False, by_operation=True
    )
    rotary_llama3_factor: float = option(
        1.0, "rotary frequencies that are low are divided by it, as in Llama 3.1; 1: none are", shapes_blocks=False
    )
    rotary_low_freq_factor: float = option(
        1.0, "those are low that turn at most so often in rotary_original_length", shapes_blocks=False
    )
    rotary_high_freq_factor: float = option(
        4.0, "those stay that turn at least so often; in between the divisor is blended", shapes_blocks=False
    )
    rotary_original_length: int = option(
        8192, "tokens in one sequence before the context was extended so", limit=2**24, shapes_blocks=False
    )
    rotary_dynamic_factor: float = option(
        0.0, "1 or more: the longer a sequence is than rotary_original_length, the larger is its base (dynamic NTK); "
        "0: never", zero=True, shapes_blocks=False,
    )  # fmt: skip
    tie_weights: bool = option(
        True, "token embedding and output head are one matrix", shapes_blocks=False, by_operation=True
    )
    lora: dict[str, LoraSpec] = field(default_factory=dict)
    """Name -> adapter, for attn.N and mlp.N (each of their matrices has one), a projection of them (PROJECTIONS:
    attn.N.q, mlp.N.up), wte and (untied) lm_head."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        problems: list[str] = []
        for name in OPTIONS:
            value = getattr(self, name)
            numbers = value if name == "n_hidden" and isinstance(value, list | tuple) else [value]
            problems += dict.fromkeys(found for one in numbers if (found := _problem(name, one)))
        if problems:
            raise ValueError("; ".join(problems))
        for name, default in DEFAULTS.items():
            if isinstance(default, float):
                put(name, float(getattr(self, name)))
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
        if self.n_head % self.n_kv_head:
            problems.append(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.bias or (self.norm == "rmsnorm" and self.attn_bias == "all" and self.mlp_bias):
            # One way to say it: `bias` has the finer ones, and RMSNorm has no bias that they would lack.
            put("bias", True)
            put("attn_bias", "none")
            put("mlp_bias", False)
        problems += self._rotary_problems()
        if self.position == "rotary" and self.head_size % 2:
            problems.append(f"rotary positions need an even head size, got {self.head_size}")
        put("lora", {name: self.lora[name] for name in adapter_names(self) if name in self.lora} | self.lora)
        for name, spec in self.lora.items():
            limit = self._largest_rank(name)
            if not limit:
                problems.append(
                    f"{name} cannot carry a LoRA adapter; attn.N, mlp.N, wte and an untied lm_head can, and so can "
                    + ", ".join(f"{kind}.N.{part}" for kind, parts in PROJECTIONS.items() for part in parts)
                )
            elif not 1 <= spec.rank <= limit:
                problems.append(f"LoRA rank of {name} must be from 1 to {limit} (0 removes it), got {spec.rank}")
            elif not 0 < spec.alpha < math.inf:
                problems.append(f"LoRA alpha of {name} must be positive and finite, got {spec.alpha}")
            layer, _, part = name.rpartition(".")
            whole = f"{layer}.qkv" if part in self.qkv_rows and f"{layer}.qkv" in self.lora else layer
            if whole in self.lora:
                problems.append(
                    f"{whole} and {name} cannot both carry an adapter, because that of {whole} is on {name} too: "
                    "merge one, or give it rank 0, first"
                )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def qkv_rows(self) -> dict[str, slice]:
        """The rows of q, k and v in the one matrix that makes them."""
        q, kv = self.n_head * self.head_size, self.n_kv_head * self.head_size
        return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}

    @property
    def attention_biases(self) -> str:
        """Which biases attention has, those of `bias` among them: none, qkv or all."""
        return "all" if self.bias else self.attn_bias

    @property
    def mlp_biases(self) -> bool:
        """Whether the MLPs have biases, by `bias` or by their own option."""
        return self.bias or self.mlp_bias

    @property
    def cache_length(self) -> int:
        """Tokens of a sequence up to which its keys and values stay what they are whatever comes after them.

        In a longer one under dynamic NTK each token changes the frequencies, and so the hidden states, of all of them.
        """
        return min(self.block_size, self.rotary_original_length) if self.rotary_dynamic_factor else self.block_size

    def _rotary_problems(self) -> list[str]:
        """Values of the rotary options that are impossible, or mean nothing, beside the others."""
        problems = []
        for name in ("rotary_scale", "rotary_llama3_factor", "rotary_dynamic_factor"):
            if self.position != "rotary" and getattr(self, name) != DEFAULTS[name]:
                problems.append(f"{name} {getattr(self, name)} needs rotary positions")
        dynamic = self.rotary_dynamic_factor
        for name in LLAMA3_OPTIONS[1:]:
            used = self.rotary_llama3_factor != 1 or (dynamic and name == "rotary_original_length")
            if not used and getattr(self, name) != DEFAULTS[name]:
                problems.append(f"{name} {getattr(self, name)} means nothing where rotary_llama3_factor is 1")
        if dynamic and self.rotary_llama3_factor != 1:
            problems.append(
                f"rotary_dynamic_factor {dynamic} and rotary_llama3_factor {self.rotary_llama3_factor}: one of them"
            )
        if 0 < dynamic < 1:
            problems.append(f"rotary_dynamic_factor must be 0, or 1 or more, got {dynamic}")
        if dynamic and self.head_size < 4:
            problems.append(f"rotary_dynamic_factor {dynamic} needs a head size of 4 or more, got {self.head_size}")
        low, high = self.rotary_low_freq_factor, self.rotary_high_freq_factor
        if self.rotary_llama3_factor != 1 and low >= high:
            problems.append(f"rotary_low_freq_factor {low} must be below rotary_high_freq_factor {high}")
        return problems

    def _largest_rank(self, name: str) -> int:
        """The full rank of the layer's smallest matrix; 0 for a layer that takes no adapter or does not exist."""
        if name not in adapter_names(self):
            return 0
        match name.split("."):
            case ["attn", _, "q" | "k" | "v" as part]:
                rows = self.qkv_rows[part]
                return min(self.n_embd, rows.stop - rows.start)
            case ["attn", _, "qkv"]:
                return min(self.n_embd, self.qkv_rows["v"].stop)
            case ["attn", *_]:
                return min(self.n_embd, self.n_head * self.head_size)
            case ["mlp", index, *_]:
                return min(self.n_embd, self.n_hidden[int(index)])
            case ["wte" | "lm_head"]:
                return min(self.n_embd, self.vocab_size)
        return 0

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lora = {name: spec.to_json() for name, spec in self.lora.items()}
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


OPTIONS: dict[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(ModelConfig) if "option" in f.metadata
}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in OPTIONS}


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with an option's value by itself."""
    option, default = OPTIONS[name], DEFAULTS[name]
    if option.choices:
        allowed, right = f"one of {', '.join(option.choices)}", value in option.choices
    elif isinstance(default, bool):
        allowed, right = "true or false", isinstance(value, bool)
    elif isinstance(default, float):
        allowed = "0 or more and finite" if option.zero else "positive and finite"
        right = isinstance(value, int | float) and (0 < value < math.inf or (option.zero and value == 0))
    elif value is None and default is None:
        return None  # filled in
    else:
        least = 0 if option.zero and default is not None else 1
        allowed = f"a whole number from {least} to {option.limit}"
        right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= option.limit
    return None if right else f"{name} must be {allowed}, got {value!r}"


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


def adapter_names(config: ModelConfig) -> list[str]:
    """All leaf layers in model order, each followed by those of its projections that there are."""
    names = []
    for layer in layer_names(config):
        parts = PROJECTIONS.get(layer.split(".")[0], {}) if "." in layer else {}
        names += [layer, *(f"{layer}.{part}" for part in parts if part != "gate" or config.activation == "swiglu")]
    return names


def expand_adapters(config: ModelConfig, names: str | Sequence[str]) -> list[str]:
    """What adapters can be asked for on, in model order: leaf layers as expand_layers has them, and projections.

    A projection is named by three parts, any of which may be a glob (attn.*.q, mlp.0.*; a glob never means qkv), or as
    peft's target_modules has it. Raises ValueError for a name that matches nothing.
    """
    every = adapter_names(config)
    found: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        globs = TARGET_MODULES.get(name, [name])
        parts = [glob for glob in globs if glob.count(".") == 2]
        found.update(expand_layers(config, [glob for glob in globs if glob not in parts]))
        matched = {one for glob in parts for one in every if _is_projection(config, one, glob)}
        if parts and not matched:
            there = ", ".join(one for one in every if one.count(".") == 2 and one.split(".")[1] == "0")
            raise ValueError(
                f"no projection is called {name!r}: there are {there}, and likewise of every block to "
                f"{config.n_layer - 1} (-1 is the last), or a glob such as 'attn.*.q'"
            )
        found |= matched
    return [name for name in every if name in found]


def _is_projection(config: ModelConfig, name: str, glob: str) -> bool:
    kind, index, part = glob.split(".")
    if re.fullmatch(r"-\d+", index):
        index = str(config.n_layer + int(index))
    exact = part == "qkv" or not name.endswith(".qkv")
    return exact and name.count(".") == 2 and fnmatch.fnmatchcase(name, f"{kind}.{index}.{part}")


def layer_of_adapter(name: str) -> str:
    """The leaf layer that an adapter belongs to: attn.3.q -> attn.3."""
    return ".".join(name.split(".")[:2])


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
