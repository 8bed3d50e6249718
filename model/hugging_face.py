"""Configurations and weights from and to Hugging Face's names, through transformers, for the families that we know.

`from_hf` and `to_hf` are a pair of pure maps between names and tensors (families/). What one side cannot represent
exactly is refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrate.model.config import ModelConfig
from orchestrate.model.families import FAMILIES, Family
from orchestrate.model.gpt import GPT, from_weights

# n_layer, n_head, n_embd of OpenAI's releases; all have 50257 tokens, 1024 positions and biases.
GPT2_MODELS = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


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
            f"init_from {folder}: a PEFT adapter, and a base model is a whole one: merge the two with peft's "
            "merge_and_unload, save the result, and give that folder"
        )
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"init_from {folder}: a Hugging Face folder has a config.json, and there is none")
    try:
        return _convert(AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(f"init_from {folder}: config.json cannot be read ({error})") from None


def _convert(hf: Any, place: str) -> ModelConfig:
    """A transformers configuration as ours. Raises ValueError with everything that has no counterpart."""
    if hf.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"init_from {place}: model type {hf.model_type!r}; understood are {known}")
    try:
        return FAMILIES[hf.model_type].config(hf)
    except ValueError as error:
        raise ValueError(f"init_from {place}: {error}") from None


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


def family_of(config: ModelConfig) -> Family:
    """The first family that can hold a model of this shape. Raises ValueError with what each of them lacks."""
    reasons = []
    for family in FAMILIES.values():
        if not (lacking := family.lacks(config)):
            return family
        reasons.append(f"{family.title} cannot hold {', '.join(lacking)}")
    raise ValueError(f"this model has no Hugging Face form: {'; '.join(reasons)}")


def from_hf(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names and tensors as ours. Raises ValueError for a shape that no family has."""
    return family_of(config).from_hf(config, weights)


def to_hf(model: GPT) -> dict[str, Tensor]:
    """The inverse of from_hf. Raises ValueError for a model that none of Hugging Face's families can hold exactly."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return family_of(model.config).to_hf(model.config, weights)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of the config.json that goes with `to_hf`. Raises ValueError as it does."""
    return family_of(config).config_to_hf(config)
