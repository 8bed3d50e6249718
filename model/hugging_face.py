"""GPT-2 and Llama weights from and to Hugging Face's names, through transformers.

`from_hf` and `to_hf` are a pair of pure maps between names and tensors. What this model cannot represent exactly is
refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, from_weights

# n_layer, n_head, n_embd of OpenAI's releases; all have 50257 tokens, 1024 positions and biases.
GPT2_MODELS = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def gpt2_config(name: str) -> ModelConfig:
    """The configuration of a released GPT-2, known without a download."""
    n_layer, n_head, n_embd = GPT2_MODELS[name]
    return ModelConfig(
        block_size=1024,
        vocab_size=50257,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        bias=True,
        activation="gelu_tanh",
    )


def config_from_folder(folder: str | Path) -> ModelConfig:
    """The configuration of a local Hugging Face folder, from its config.json alone. Raises ValueError."""
    from transformers import AutoConfig

    if not Path(folder).is_dir():
        hint = ""
        if str(folder).count("/") == 1 and not str(folder).startswith((".", "/")):
            hint = "; of the hub's models only those of GPT-2 are fetched: download others and give the folder"
        raise ValueError(
            f"init_from {folder}: there is no such file or folder; allowed: scratch, resume, {', '.join(GPT2_MODELS)}, "
            f"a Hugging Face folder, a nanoGPT ckpt.pt{hint}"
        )
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"init_from {folder}: a PEFT adapter without its base model; merge the two with peft's merge_and_unload, "
            "save the result, and give that folder"
        )
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"init_from {folder}: a Hugging Face folder has a config.json, and there is none")
    try:
        return _convert(AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(f"init_from {folder}: config.json cannot be read ({error})") from None


def _convert(hf: Any, place: str) -> ModelConfig:
    """A transformers configuration as ours. Raises ValueError with everything that has no counterpart."""
    problems: list[str] = []

    def need(holds: bool, what: str) -> None:
        if not holds:
            problems.append(what)

    if hf.model_type == "gpt2":
        need(hf.activation_function in _GELUS, f"activation_function {hf.activation_function!r}")
        need(not hf.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx")
        need(hf.scale_attn_weights, "scale_attn_weights off")
        need(not getattr(hf, "add_cross_attention", False), "cross attention")
        values = {
            "block_size": hf.n_positions,
            "vocab_size": hf.vocab_size,
            "n_layer": hf.n_layer,
            "n_head": hf.n_head,
            "n_embd": hf.n_embd,
            "n_hidden": hf.n_inner or 4 * hf.n_embd,
            "bias": True,
            "norm_eps": hf.layer_norm_epsilon,
            "activation": _GELUS.get(hf.activation_function, "gelu"),
            "tie_weights": hf.tie_word_embeddings,
        }
    elif hf.model_type == "llama":
        rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        need(kind == "default", f"rope scaling of type {kind!r}")
        need(hf.hidden_act in ("silu", "swish"), f"hidden_act {hf.hidden_act!r}")
        need(not hf.attention_bias, "attention_bias")
        need(not getattr(hf, "mlp_bias", False), "mlp_bias")
        values = {
            "block_size": hf.max_position_embeddings,
            "vocab_size": hf.vocab_size,
            "n_layer": hf.num_hidden_layers,
            "n_head": hf.num_attention_heads,
            "n_kv_head": hf.num_key_value_heads,
            "n_embd": hf.hidden_size,
            "head_size": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            "n_hidden": hf.intermediate_size,
            "bias": False,
            "norm": "rmsnorm",
            "norm_eps": hf.rms_norm_eps,
            "activation": "swiglu",
            "position": "rotary",
            "rotary_base": float(rope.get("rope_theta") or getattr(hf, "rope_theta", 10000.0)),
            "tie_weights": hf.tie_word_embeddings,
        }
    else:
        raise ValueError(f"init_from {place}: model type {hf.model_type!r}; gpt2 and llama are understood")
    if problems:
        raise ValueError(f"init_from {place}: cannot be represented: {', '.join(problems)}")
    return ModelConfig(**values)


def load(name_or_folder: str) -> GPT:
    """A released GPT-2 by name, or a local folder, with its weights in float32. Raises ValueError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    is_name = name_or_folder in GPT2_MODELS
    config = gpt2_config(name_or_folder) if is_name else config_from_folder(name_or_folder)
    source = f"openai-community/{name_or_folder}" if is_name else name_or_folder
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # for shards read from a disk; a download has its own
    try:
        hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=not is_name)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"init_from {name_or_folder}: the weights cannot be had ({first}); "
            "without network, download the model elsewhere and give its folder as init_from"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    return from_weights(config, from_hf(config, hf.state_dict()))


# Our name within a block -> Hugging Face's, for what maps one to one.
_LLAMA_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def _is_llama(config: ModelConfig) -> bool:
    return config.position == "rotary"


def from_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names and tensors as ours. GPT-2 stores its matrices transposed; Llama has q, k and v apart."""
    ours: dict[str, Tensor] = {}
    if not _is_llama(config):
        for name, value in weights.items():
            if name.endswith((".attn.bias", ".attn.masked_bias")) or (name == "lm_head.weight" and config.tie_weights):
                continue
            matrix = ".c_" in name and name.endswith("weight")
            ours[name] = value.t().contiguous() if matrix else value
        return ours
    ours["transformer.wte.weight"] = weights["model.embed_tokens.weight"]
    ours["transformer.ln_f.weight"] = weights["model.norm.weight"]
    if not config.tie_weights:
        ours["lm_head.weight"] = weights["lm_head.weight"]
    for n in range(config.n_layer):
        here, there = f"transformer.h.{n}.", f"model.layers.{n}."
        qkv = [weights[f"{there}self_attn.{part}_proj.weight"] for part in "qkv"]
        ours[f"{here}attn.c_attn.weight"] = torch.cat(qkv)
        for name, theirs in _LLAMA_BLOCK.items():
            ours[f"{here}{name}.weight"] = weights[f"{there}{theirs}.weight"]
    return ours


def to_hf(model: GPT) -> dict[str, Tensor]:
    """The inverse of from_hf. Raises ValueError for a model that Hugging Face's GPT-2 or Llama cannot hold."""
    config = model.config
    gpt2 = config.position == "learned" and config.norm == "layernorm" and config.bias
    llama = config.position == "rotary" and config.norm == "rmsnorm" and config.activation == "swiglu"
    if config.lora or len(set(config.n_hidden)) > 1 or not (gpt2 or llama):
        raise ValueError("only merged models in plain GPT-2 (with biases) or Llama style have a Hugging Face form")
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs: dict[str, Tensor] = {}
    if gpt2:
        for name, value in ours.items():
            matrix = ".c_" in name and name.endswith("weight")
            theirs[name] = value.t().contiguous() if matrix else value
        if config.tie_weights:
            theirs["lm_head.weight"] = ours["transformer.wte.weight"]
        return theirs
    theirs["model.embed_tokens.weight"] = ours["transformer.wte.weight"]
    theirs["model.norm.weight"] = ours["transformer.ln_f.weight"]
    theirs["lm_head.weight"] = ours["transformer.wte.weight" if config.tie_weights else "lm_head.weight"]
    widths = [config.n_head * config.head_size, *[config.n_kv_head * config.head_size] * 2]
    for n in range(config.n_layer):
        here, there = f"transformer.h.{n}.", f"model.layers.{n}."
        for part, value in zip("qkv", ours[f"{here}attn.c_attn.weight"].split(widths), strict=True):
            theirs[f"{there}self_attn.{part}_proj.weight"] = value
        for name, other in _LLAMA_BLOCK.items():
            theirs[f"{there}{other}.weight"] = ours[f"{here}{name}.weight"]
    return theirs
