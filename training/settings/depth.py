"""`depth: 12`: a model from scratch and its training numbers from one number, by rules that are named here.

Each rule gives one configuration key, from the keys before it in their final values; a key that is given is taken as
it is and the rules after it follow from it. The reference is GPT-2 (124M) as nanoGPT trains it: 12 blocks, width 768,
2^19 tokens an iteration, 6e-4, weight decay 0.1. This file only computes: it reads no data and knows no run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, TypeAlias

from orchestrate.model.config import ModelConfig

REFERENCE_BATCH = 2**19
"""Tokens in one iteration."""
REFERENCE_WEIGHTS = 12 * 12 * 768**2
"""Numbers in the matrices of the reference's blocks."""
TOKENS_PER_WEIGHT = 10
"""Of the matrices of the blocks: the length of training that is told to a person."""
_REFERENCE_RATE, _REFERENCE_DECAY, _REFERENCE_WIDTH, _HEAD_SIZE = 6e-4, 0.1, 768, 64
_MICRO_BATCH_TOKENS = 2**14
_WIDEST = 2**20
"""No model is wider; its refusal is ModelConfig's."""

Values: TypeAlias = Mapping[str, Any]
"""Keys of the configuration and their values; and `weights`, the numbers in the matrices of the blocks."""
ModelOf: TypeAlias = Callable[[Values], ModelConfig]


def block_weights(c: ModelConfig) -> int:
    """Numbers in the matrices of all blocks; no embedding, head, norm or bias."""
    attention = c.n_embd * c.head_size * 2 * (c.n_head + c.n_kv_head)
    return sum(attention + (3 if c.activation == "swiglu" else 2) * c.n_embd * hidden for hidden in c.n_hidden)


def _width(v: Values, given: Container[str]) -> int:
    heads = v["n_head"] if "n_head" in given else 1
    return math.ceil(_HEAD_SIZE * v["n_layer"] / heads) * heads


def _heads(v: Values, given: Container[str]) -> int:
    """The most heads that divide the width and have 64 features or more."""
    width = v["n_embd"] if v["n_embd"] <= _WIDEST else 1
    return next(n for n in range(max(1, width // _HEAD_SIZE), 0, -1) if width % n == 0)


def _batch(v: Values) -> int:
    """Tokens in one iteration."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (v["weights"] / REFERENCE_WEIGHTS) ** 0.383))


def _micro_batch(v: Values, given: Container[str]) -> int:
    sequences = _batch(v) / v["block_size"]
    if "gradient_accumulation_steps" in given:
        return max(1, round(sequences / v["gradient_accumulation_steps"]))
    return 2 ** max(0, math.floor(math.log2(min(sequences, _MICRO_BATCH_TOKENS / v["block_size"]))))


def _accumulation(v: Values, given: Container[str]) -> int:
    return max(1, round(_batch(v) / (v["batch_size"] * v["block_size"])))


def _tokens(v: Values) -> int:
    return v["batch_size"] * v["gradient_accumulation_steps"] * v["block_size"]


def _rate(v: Values, given: Container[str]) -> float:
    return _short(_REFERENCE_RATE * _REFERENCE_WIDTH / v["n_embd"] * math.sqrt(_tokens(v) / REFERENCE_BATCH))


def _decay(v: Values, given: Container[str]) -> float:
    """Tokens / (rate * decay * length of training) is the reference's; the length goes with the weights."""
    rate = v["learning_rate"] or _REFERENCE_RATE
    batches, weights = _tokens(v) / REFERENCE_BATCH, v["weights"] / REFERENCE_WEIGHTS
    return _short(_REFERENCE_DECAY * batches * _REFERENCE_RATE / (rate * weights))


def _short(number: float) -> float:
    """To three digits: a person reads it."""
    return float(f"{number:.3g}")


RULES: dict[str, tuple[Callable[[Values, Container[str]], Any], str]] = {
    "n_layer": (lambda v, given: v["depth"], "depth"),
    "n_embd": (_width, "64 for each block, up to a multiple of n_head: GPT-2 (124M), and nanochat's depth"),
    "n_head": (_heads, "64 features each, as in GPT-2 (Radford et al. 2019)"),
    "batch_size": (_micro_batch, "a micro-step of 2^14 tokens at most: a matter of memory alone"),
    "gradient_accumulation_steps": (
        _accumulation,
        "2^19 tokens * (weights / GPT-2's)^0.383, to a power of 2: Bergsma et al. 2025, arXiv:2505.13738",
    ),
    "learning_rate": (
        _rate,
        "6e-4 (GPT-3: arXiv:2005.14165) * 768 / n_embd (arXiv:2203.03466) * sqrt(tokens / 2^19) (arXiv:2205.10287)",
    ),
    "min_lr": (lambda v, given: _short(v["learning_rate"] / 10), "learning_rate / 10: arXiv:2203.15556"),
    "weight_decay": (
        _decay,
        "0.1 * (tokens / 2^19) * (6e-4 / learning_rate) * (GPT-2's weights / weights): arXiv:2505.13738",
    ),
}
"""Key -> how it follows from the values of the keys before it and which keys are given; and the rule in words."""
_SHAPE = ("n_layer", "n_embd", "n_head")


def derived(values: Values, given: Container[str], model_of: ModelOf) -> dict[str, Any]:
    """The keys that follow from `depth`, where they are not given.

    Args:
        model_of: the model that values describe.

    Raises ValueError where the shape is impossible, ArithmeticError where a number is out of all bounds.
    """
    v = dict(values)
    for key, (rule, _) in RULES.items():
        if key not in _SHAPE and "weights" not in v:
            v["weights"] = block_weights(model_of(v))
        if key not in given:
            v[key] = rule(v, given)
    return {key: v[key] for key in RULES if key not in given}


def told(values: Values, given: Mapping[str, str], model_of: ModelOf) -> list[str]:
    """Every key of the rules with its value, and the rule or where it was given; a line each, for a person."""
    weights, tokens = block_weights(model_of(values)), _tokens(values)
    lines = [f"{key} = {values[key]:<8} {given.get(key, rule)}" for key, (_, rule) in RULES.items()]
    iterations = math.ceil(TOKENS_PER_WEIGHT * weights / tokens)
    lines.append(
        f"{tokens:,} tokens an iteration; {TOKENS_PER_WEIGHT} tokens for each of the {weights:,} weights of the blocks "
        f"are {iterations:,} iterations (max_iters {values['max_iters']:,})"
    )
    return [f"depth {values['depth']}: {line}" for line in lines]
