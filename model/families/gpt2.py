"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases. Its weights have our names, transposed."""

from __future__ import annotations

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.families.family import Family, Weights


def _turned(name: str, value: torch.Tensor) -> torch.Tensor:
    """Hugging Face keeps GPT-2's matrices as (in, out)."""
    return value.t().contiguous() if ".c_" in name and name.endswith("weight") else value


def _from_hf(config: ModelConfig, weights: Weights) -> Weights:
    unused = (".attn.bias", ".attn.masked_bias")  # the causal mask in old files
    return {
        name: _turned(name, value)
        for name, value in weights.items()
        if not name.endswith(unused) and not (name == "lm_head.weight" and config.tie_weights)
    }


def _to_hf(config: ModelConfig, weights: Weights) -> Weights:
    theirs: Weights = {}
    for name, value in weights.items():
        theirs[name] = _turned(name, value)
        if not config.bias and name.startswith(("transformer.h.", "transformer.ln_f")):
            theirs[name.removesuffix("weight") + "bias"] = value.new_zeros(len(value))
    theirs["lm_head.weight"] = weights["transformer.wte.weight" if config.tie_weights else "lm_head.weight"]
    return theirs


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    preset={"bias": True},
    keys={
        "n_positions": "block_size",
        "vocab_size": "vocab_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_hidden",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_weights",
    },
    values={"activation": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}},
    allowed={
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "add_cross_attention": (False,),
    },
    by_weights=("bias",),  # no bias is a bias of zeros
    from_hf=_from_hf,
    to_hf=_to_hf,
)
