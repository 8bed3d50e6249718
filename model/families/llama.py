"""Llama (Touvron et al. 2023, arXiv:2302.13971), and families that differ from it in an option or two.

Rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases. Hugging Face has queries, keys and values apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.families.family import Family, Weights

# Our name within a block -> theirs, for what maps one to one.
_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def _from_hf(block: Mapping[str, str], config: ModelConfig, weights: Weights) -> Weights:
    ours = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    if not config.tie_weights:
        ours["lm_head.weight"] = weights["lm_head.weight"]
    for n in range(config.n_layer):
        here, there = f"transformer.h.{n}.", f"model.layers.{n}."
        qkv = [weights[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[f"{here}attn.c_attn.weight"] = torch.cat(qkv)
        for name, theirs in block.items():
            ours[f"{here}{name}.weight"] = weights[f"{there}{theirs}.weight"]
    return ours


def _to_hf(block: Mapping[str, str], config: ModelConfig, weights: Weights) -> Weights:
    theirs = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["transformer.wte.weight" if config.tie_weights else "lm_head.weight"],
    }
    widths = [config.n_head * config.head_size, *[config.n_kv_head * config.head_size] * 2]
    for n in range(config.n_layer):
        here, there = f"transformer.h.{n}.", f"model.layers.{n}."
        for part, value in zip("qkv", weights[f"{here}attn.c_attn.weight"].split(widths), strict=True):
            theirs[f"{there}self_attn.{part}_proj.weight"] = value
        for name, other in block.items():
            theirs[f"{there}{other}.weight"] = weights[f"{here}{name}.weight"]
    return theirs


def _rope(theirs: Any, ours: dict[str, Any]) -> list[str]:
    """The base of the rotary frequencies, where the versions of transformers keep it."""
    rope = getattr(theirs, "rope_parameters", None) or getattr(theirs, "rope_scaling", None) or {}
    ours["rotary_base"] = float(rope.get("rope_theta") or getattr(theirs, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    return [] if kind == "default" else [f"rope scaling of type {kind!r}"]


LLAMA = Family(
    name="llama",
    title="Llama",
    preset={"norm": "rmsnorm", "activation": "swiglu", "position": "rotary"},
    keys={
        "max_position_embeddings": "block_size",
        "vocab_size": "vocab_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
        "head_dim": "head_size",
        "intermediate_size": "n_hidden",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rotary_base",
        "tie_word_embeddings": "tie_weights",
    },
    allowed={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    read_more=_rope,
    from_hf=partial(_from_hf, _BLOCK),
    to_hf=partial(_to_hf, _BLOCK),
)

_QWEN3_BLOCK = {**_BLOCK, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
# Qwen3 (Yang et al. 2025, arXiv:2505.09388) norms queries and keys.
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="Qwen3",
    preset={**LLAMA.preset, "qk_norm": True},
    allowed={**LLAMA.allowed, "use_sliding_window": (False,)},
    from_hf=partial(_from_hf, _QWEN3_BLOCK),
    to_hf=partial(_to_hf, _QWEN3_BLOCK),
)
