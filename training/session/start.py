"""From a configuration to settings, data, weights and a Session: everything that happens before the first step.

What is wrong with the input is found here, as `Refused` or ValueError, before anything is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrate.data.stream import DataSet, find_folder, read_meta
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.config import OPTIONS, LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, crop_block_size, init_weights
from orchestrate.model.lora import reshape_lora
from orchestrate.training.schedule.file import Schedule, read_schedule
from orchestrate.training.schedule.stages import Stage
from orchestrate.training.settings.config import MODEL_KEYS, TrainConfig, model_values
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import shown

DEFAULT_VOCAB = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as nanoGPT has it

# Configuration keys that are fields of Settings: a resume may override them.
IN_SETTINGS = {
    **{
        key: key
        for key in (
            "batch_size learning_rate min_lr warmup_iters lr_decay_iters decay_lr lr_schedule wsd_decay_fraction "
            "optimizer weight_decay beta1 beta2 momentum grad_clip dropout eval_interval eval_iters log_interval"
        ).split()
    },
    "gradient_accumulation_steps": "grad_accum",
}


def model_config_from(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model that a configuration describes from scratch. Raises Refused."""
    try:
        return ModelConfig(vocab_size=vocab_size, **model_values(config), lora=adapters_from(config, config.n_layer))
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def adapters_from(config: TrainConfig, n_layer: int) -> dict[str, LoraSpec]:
    """The adapters that a configuration asks for on a model of so many layers."""
    ranks = {"attn": config.attn_lora_rank, "mlp": config.mlp_lora_rank}
    adapters = {
        f"{kind}.{n}": LoraSpec(rank, config.lora_alpha)
        for n in range(min(n_layer, OPTIONS["n_layer"].limit))
        for kind, rank in ranks.items()
        if rank
    }
    if config.embedding_rank:
        adapters["wte"] = LoraSpec(config.embedding_rank, config.lora_alpha)
    return adapters


def settings_from(config: TrainConfig, model: ModelConfig) -> Settings:
    """The settings that a run of this configuration starts with."""
    values = {name: getattr(config, key) for key, name in IN_SETTINGS.items()}
    return Settings(model=model, lora_alpha=config.lora_alpha, **values)


def planned_model_config(config: TrainConfig) -> tuple[ModelConfig, list[str]]:
    """The model's configuration without loading weights or data, and notes on what was assumed. Raises Refused."""
    notes: list[str] = []
    if config.init_from == "scratch":
        vocab = config.shrunken_vocab_size
        if not vocab:
            vocab = read_meta(find_folder(config.dataset)).vocab_size
        if not vocab:
            vocab = DEFAULT_VOCAB
            notes.append(f"no vocabulary size with data set {config.dataset}: {DEFAULT_VOCAB} (GPT-2) is assumed")
        return model_config_from(config, vocab), notes
    if config.init_from in hugging_face.GPT2_MODELS:
        model = hugging_face.gpt2_config(config.init_from)
    elif Path(config.init_from).is_dir():
        model = hugging_face.config_from_folder(config.init_from)
    else:
        model = nanogpt.config_from_checkpoint(config.init_from)
    return _adjusted(config, model), notes


def _adjusted(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """A foreign model's configuration with this run's adapters and (shorter) block_size. Raises Refused."""

    def has(name: str, value: Any) -> bool:
        try:
            return replace(model, **{name: value}) == model
        except ValueError:
            return False

    wanted, problems = model_values(config), []
    if config.block_size > model.block_size:
        problems.append(
            f"block_size {config.block_size} is longer than the {model.block_size} that {config.init_from} was made for"
        )
    for key, name in MODEL_KEYS.items():
        if key in config.model_fields_set and key != "block_size" and not has(name, wanted[name]):
            given, present = shown(getattr(config, key)), shown(getattr(model, name))
            problems.append(f"{key}: got {given}, but the weights of {config.init_from} have {name} {present}")
    if problems:
        raise Refused(problems)
    try:
        return replace(model, block_size=config.block_size, lora=adapters_from(config, model.n_layer))
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def initial_model(config: TrainConfig, model_config: ModelConfig) -> GPT:
    """Fresh or foreign weights in the planned shape. Raises ValueError."""
    if config.init_from == "scratch":
        model = GPT(model_config)
        init_weights(model, config.seed)
        return model
    load = nanogpt.load_checkpoint if Path(config.init_from).is_file() else hugging_face.load
    model = crop_block_size(load(config.init_from), config.block_size)
    if model_config.lora:
        model, _ = reshape_lora(model, model_config, torch.Generator().manual_seed(config.seed))
    return model


def the_schedule(config: TrainConfig) -> Schedule:
    return read_schedule(config.schedule) if config.schedule else Schedule()


def check_lengths(stages: list[Stage], data: DataSet) -> None:
    """Raises Refused where a stage's block_size is longer than a data file."""
    for stage in stages:
        for file in (data.train, data.val):
            try:
                file.require(stage.settings.model.block_size)
            except ValueError as error:
                place = f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else ""
                raise Refused(f"{place}{error}") from None
