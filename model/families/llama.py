"""Llama (Touvron et al. 2023, arXiv:2302.13971), and families that differ from it in an option or two.

Rotary positions, RMSNorm, SwiGLU, grouped-query attention. Hugging Face has queries, keys and values apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrate.model.config import LLAMA3_OPTIONS, ModelConfig
from orchestrate.model.families.family import Family
from orchestrate.model.families.gpt2 import ACTIVATIONS, GPT2

_MODULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
# transformers' names for LLAMA3_OPTIONS, in the same order.
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_OPTIONS = ("rotary_scale", *LLAMA3_OPTIONS, "rotary_dynamic_factor")
# Kinds of rope scaling that are refused, and why.
_OTHER_SCALING = {
    "yarn": "it also scales the attention's logits, and its ramp is another one than Llama 3's",
    "longrope": "it has a factor for each frequency, and other ones for short sequences",
}


def _read_rope(theirs: Any, ours: dict[str, Any]) -> list[str]:
    """The base and the scaling of the rotary frequencies, where the versions of transformers keep them."""
    rope = getattr(theirs, "rope_parameters", None) or getattr(theirs, "rope_scaling", None) or {}
    ours["rotary_base"] = rope.get("rope_theta") or getattr(theirs, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (part := rope.get("partial_rotary_factor", 1)) not in (None, 1):
        return [f"partial_rotary_factor {part}: rotary positions turn whole heads here"]
    if kind == "linear":
        ours["rotary_scale"] = rope.get("factor")
    elif kind == "llama3" and rope.get("factor") != 1:
        ours.update({name: rope.get(key) for name, key in zip(LLAMA3_OPTIONS, _LLAMA3_KEYS, strict=True)})
    elif kind == "dynamic":
        return _read_dynamic(rope, theirs.max_position_embeddings, ours)
    elif kind not in ("default", "llama3"):
        why = _OTHER_SCALING.get(kind, "allowed are default, linear, dynamic (NTK) and llama3")
        return [f"rope scaling of type {kind!r} ({why})"]
    return []


def _read_dynamic(rope: dict[str, Any], original: int, ours: dict[str, Any]) -> list[str]:
    """Dynamic NTK: max_position_embeddings is the length that it begins at, and `factor` times that is meant to work.

    transformers go by that length alone, and others by original_max_position_embeddings where it is given.
    """
    factor, other = rope.get("factor"), rope.get("original_max_position_embeddings")
    if other not in (None, original):
        return [f"rope scaling of type 'dynamic' with original_max_position_embeddings {other} beside "
                f"max_position_embeddings {original} (transformers go by the latter)"]  # fmt: skip
    if "alpha" in rope:
        return ["rope scaling of type 'dynamic' with alpha (allowed is factor)"]
    ours.update(rotary_dynamic_factor=factor, rotary_original_length=original)
    if isinstance(factor, int | float) and factor >= 1:  # ModelConfig refuses others, and sizes beyond its limit
        ours["block_size"] = int(min(factor, 2.0**25) * original)
    return []


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """The inverse. Raises ValueError for interpolation beside another kind of scaling."""
    c = config
    if c.rotary_llama3_factor == 1 and not c.rotary_dynamic_factor:
        return {"rope_scaling": {"rope_type": "linear", "factor": c.rotary_scale}} if c.rotary_scale != 1 else {}
    if c.rotary_scale != 1:
        other = "rotary_dynamic_factor" if c.rotary_dynamic_factor else "rotary_llama3_factor"
        raise ValueError(f"rotary_scale {c.rotary_scale} beside {other} {getattr(c, other)}")
    if c.rotary_dynamic_factor:
        scaling = {"rope_type": "dynamic", "factor": c.rotary_dynamic_factor}
        return {"max_position_embeddings": c.rotary_original_length, "rope_scaling": scaling}
    numbers = {key: getattr(c, name) for name, key in zip(LLAMA3_OPTIONS, _LLAMA3_KEYS, strict=True)}
    return {"rope_scaling": {"rope_type": "llama3", **numbers}}


def _window(theirs: Any, ours: dict[str, Any]) -> list[str]:
    """A sliding window is refused, unless no sequence is longer than it."""
    window, longest = getattr(theirs, "sliding_window", None), ours["block_size"]
    slides = "sliding_attention" in (getattr(theirs, "layer_types", None) or ["sliding_attention"])
    if window is None or not slides or window >= longest:
        return []
    scaled = "" if longest == theirs.max_position_embeddings else " times the factor of rope scaling,"
    return [f"sliding_window {window} (shorter than max_position_embeddings{scaled} {longest})"]


def _read_llama(theirs: Any, ours: dict[str, Any]) -> list[str]:
    """What `_read_rope` reads, and the biases: of all of attention, and of the MLPs."""
    ours["attn_bias"] = "all" if theirs.attention_bias else "none"
    ours["mlp_bias"] = bool(getattr(theirs, "mlp_bias", False))
    return _read_rope(theirs, ours)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    """The inverse. Raises ValueError for biases of queries, keys and values alone, too."""
    if config.attn_bias == "qkv":
        raise ValueError("attn_bias 'qkv'")
    return {
        "attention_bias": config.attention_biases == "all",
        "mlp_bias": config.mlp_biases,
        **_write_rope(config),
    }


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
    modules=_MODULES,
    base="model.",
    blocks="model.layers.{}.",
    ignored=r".*\.rotary_emb\.inv_freq",  # follows from the configuration
    allowed={"hidden_act": ("silu", "swish")},
    more=("bias", "attn_bias", "mlp_bias", *_ROPE_OPTIONS),
    read_more=_read_llama,
    write_more=_write_llama,
)

# Of those whose biases are no matter of configuration, and whose window slides in some releases.
_FIXED_BIASES = replace(
    LLAMA,
    more=_ROPE_OPTIONS,
    read_more=lambda theirs, ours: [*_read_rope(theirs, ours), *_window(theirs, ours)],
    write_more=_write_rope,
)
# Mistral (Jiang et al. 2023, arXiv:2310.06825).
MISTRAL = replace(
    _FIXED_BIASES,
    name="mistral",
    title="Mistral",
    # transformers' own default is a window of 4096.
    write_more=lambda config: {"sliding_window": None, **_write_rope(config)},
)
# Qwen2 (Yang et al. 2024, arXiv:2407.10671) has biases of queries, keys and values.
QWEN2 = replace(_FIXED_BIASES, name="qwen2", title="Qwen2", preset={**LLAMA.preset, "attn_bias": "qkv"})
# Qwen3 (Yang et al. 2025, arXiv:2505.09388) norms queries and keys.
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="Qwen3",
    preset={**LLAMA.preset, "qk_norm": True},
    more=("attn_bias", *_ROPE_OPTIONS),
    modules={**_MODULES, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
    read_more=lambda theirs, ours: [*_read_llama(theirs, ours), *_window(theirs, ours)],
)

_NO_GATE = {ours: theirs for ours, theirs in _MODULES.items() if ours != "mlp.c_gate"}
_ITS_KEYS = {key: name for key, name in LLAMA.keys.items() if key != "rms_norm_eps"}
# StarCoder2 (Lozhkov et al. 2024, arXiv:2402.19173) has GPT-2's norms and MLPs with rotary positions.
STARCODER2 = replace(
    _FIXED_BIASES,
    name="starcoder2",
    title="StarCoder2",
    preset={"position": "rotary", "bias": True},
    keys={**_ITS_KEYS, "norm_epsilon": "norm_eps", "hidden_act": "activation"},
    modules={**_NO_GATE, "mlp.c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"},
    values={"activation": ACTIVATIONS},
    allowed={"use_bias": (True,)},  # without them its norms have biases all the same
    by_weights=GPT2.by_weights,
)
# Arcee (AFM-4.5B, 2025) is Llama with an MLP without a gate.
ARCEE = replace(
    LLAMA,
    name="arcee",
    title="Arcee",
    preset={"norm": "rmsnorm", "position": "rotary"},
    keys={**LLAMA.keys, "hidden_act": "activation"},
    modules=_NO_GATE,
    values={"activation": ACTIVATIONS},
    allowed={},
)
