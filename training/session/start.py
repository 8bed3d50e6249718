"""From a configuration to settings, data, weights and a Session: everything that happens before the first step.

What is wrong with the input is found here, as `Refused` or ValueError, before anything is written.
"""

from __future__ import annotations

from pathlib import Path

import torch

from orchestrate.data.stream import DataSet, find_folder, read_meta
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.config import LIMITS, LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, from_weights, init_weights
from orchestrate.training.schedule.file import Schedule, read_schedule
from orchestrate.training.schedule.stages import Stage
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings

DEFAULT_VOCAB = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as nanoGPT has it

# Configuration keys that are fields of Settings: a resume may override them.
IN_SETTINGS = {
    **{
        key: key
        for key in (
            "batch_size learning_rate min_lr warmup_iters lr_decay_iters decay_lr lr_schedule wsd_decay_fraction "
            "optimizer weight_decay beta1 beta2 momentum grad_clip eval_interval eval_iters log_interval"
        ).split()
    },
    "gradient_accumulation_steps": "grad_accum",
    "dropout": "model.dropout",
}


def model_config_from(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model that a configuration describes from scratch. Raises Refused."""
    ranks = {"attn": config.attn_lora_rank, "mlp": config.mlp_lora_rank}
    adapters = {
        f"{kind}.{n}": LoraSpec(rank, config.lora_alpha)
        for n in range(min(config.n_layer, LIMITS["n_layer"]))
        for kind, rank in ranks.items()
        if rank
    }
    if config.embedding_rank:
        adapters["wte"] = LoraSpec(config.embedding_rank, config.lora_alpha)
    try:
        return ModelConfig(
            block_size=config.block_size,
            vocab_size=vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or None,  # type: ignore[arg-type]
            n_embd=config.n_embd,
            n_hidden=config.n_hidden or None,  # type: ignore[arg-type]
            dropout=config.dropout,
            bias=config.bias,
            norm=config.norm,
            norm_eps=config.norm_eps,
            activation=config.activation,
            position="rotary" if config.use_rotary_embeddings else "learned",
            rotary_base=config.rotary_base,
            tie_weights=config.tie_weights,
            lora=adapters,
        )
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def settings_from(config: TrainConfig, model: ModelConfig) -> Settings:
    """The settings that a run of this configuration starts with."""
    values = {name: getattr(config, key) for key, name in IN_SETTINGS.items() if "." not in name}
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
    """A foreign model's configuration with this run's dropout, adapters and (shorter) block_size."""
    from dataclasses import replace

    if config.block_size > model.block_size:
        raise Refused(
            f"block_size {config.block_size} is longer than the {model.block_size} that {config.init_from} was made for"
        )
    wanted = model_config_from(config.model_copy(update={"n_layer": model.n_layer}), model.vocab_size)
    return replace(model, dropout=config.dropout, block_size=config.block_size, lora=wanted.lora)


def initial_model(config: TrainConfig, model_config: ModelConfig) -> GPT:
    """Fresh or foreign weights in the planned shape. Raises ValueError."""
    if config.init_from == "scratch":
        model = GPT(model_config)
        init_weights(model, config.seed)
        return model
    from dataclasses import replace

    from orchestrate.model.gpt import crop_block_size
    from orchestrate.model.lora import reshape_lora

    load = nanogpt.load_checkpoint if Path(config.init_from).is_file() else hugging_face.load
    model = crop_block_size(load(config.init_from), config.block_size)
    model = from_weights(replace(model.config, dropout=config.dropout), dict(model.named_parameters()))
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
