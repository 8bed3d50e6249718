"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases. Its weights have our names, transposed."""

from __future__ import annotations

from orchestrate.model.families.family import Family

_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_OUTSIDE = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
# transformers' names for activations of MLPs without a gate.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}

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
    modules={name: name for name in (*_OUTSIDE, "ln_1", "ln_2", *_MATRICES)},
    base="transformer.",
    blocks="transformer.h.{}.",
    turned=_MATRICES,
    ignored=r".*\.attn\.(masked_)?bias",  # the causal mask
    values={"activation": ACTIVATIONS},
    allowed={
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "add_cross_attention": (False,),
    },
    by_weights=("bias", "attn_bias", "mlp_bias"),
    # transformers' own default drops a tenth of everything while a model trains.
    write_more=lambda config: {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
)
