"""From a configuration to settings, data, weights and a Session: everything that happens before the first step.

What is wrong with the input is found here, as `Refused` or ValueError, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from orchestrate.data.keeping import at_hand, check_kept, differs, kept_with_data, named
from orchestrate.data.mixture import Sources, extends
from orchestrate.data.stream import DataSet, Meta, find_folder, open_data, read_meta, read_remap, within
from orchestrate.data.tokenizer import has_tokenizer, tells_apart
from orchestrate.model import hugging_face, nanogpt, peft_folder
from orchestrate.model.config import (
    LoraSpec,
    ModelConfig,
    expand_adapters,
    expand_layers,
    layer_names,
    layer_of_adapter,
)
from orchestrate.model.gpt import GPT, crop_block_size, from_weights, init_weights
from orchestrate.model.lora import reshape_lora
from orchestrate.training.schedule.file import Schedule, read_schedule
from orchestrate.training.schedule.stages import Stage
from orchestrate.training.session.scores import check_tasks
from orchestrate.training.session.texts import check_prompts
from orchestrate.training.settings.config import TrainConfig, keys_of, model_values, stands_for_more
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import is_of_bytes, source_of
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import shown
from orchestrate.training.store import checkpoint

DEFAULT_VOCAB = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as nanoGPT has it

# Configuration keys that are fields of Settings: a resume may override them.
IN_SETTINGS = {
    **{
        key: key
        for key in (
            "batch_size learning_rate min_lr warmup_iters lr_decay_iters decay_lr lr_schedule wsd_decay_fraction "
            "optimizer weight_decay beta1 beta2 momentum grad_clip dropout eval_interval eval_interval_tokens "
            "eval_iters log_interval use_rslora init_lora_weights lora_dropout activation_checkpointing weights_dtype "
            "curriculum_alpha document_mask eval_tasks"
        ).split()
    },
    "gradient_accumulation_steps": "grad_accum",
}


def model_config_from(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model that a configuration describes from scratch. Raises Refused."""
    try:
        return _adapted(config, ModelConfig(vocab_size=vocab_size, **model_values(config)))
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def _adapted(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """A model with the adapters that a configuration asks for from the start. Raises ValueError."""
    ranks = {
        f"{kind}.{n}": getattr(config, f"{kind}_lora_rank") for n in range(model.n_layer) for kind in ("attn", "mlp")
    }
    ranks["wte"] = config.embedding_rank
    asked = {name: rank for name, rank in ranks.items() if rank}
    if bool(config.lora_targets) != bool(config.lora_rank):
        raise ValueError(
            f"lora_targets and lora_rank go together, got {shown(config.lora_targets)} and {config.lora_rank}"
        )
    if config.lora_targets:
        try:
            named = expand_adapters(model, [name.strip() for name in config.lora_targets.split(",")])
        except ValueError as error:
            raise ValueError(f"lora_targets: {error}") from None
        if twice := [name for name in named if name in asked]:
            raise ValueError(f"lora_targets: {twice[0]} has a rank from another key already")
        asked.update(dict.fromkeys(named, config.lora_rank))
    how = (config.lora_alpha, config.use_rslora, config.init_lora_weights)
    return replace(model, lora={name: LoraSpec(rank, *how) for name, rank in asked.items()})


def _without_adapters(config: TrainConfig, model: ModelConfig) -> tuple[str, ...]:
    """The layers that do not train from the start: those without an adapter where PEFT's keys or folder say which."""
    if not config.lora_targets and not peft_folder.is_peft(config.init_from):
        return ()
    adapted = {layer_of_adapter(name) for name in model.lora}
    return tuple(name for name in layer_names(model) if name not in adapted)


def settings_from(config: TrainConfig, model: ModelConfig, foreign: Foreign | None = None) -> Settings:
    """The settings that a run of this configuration starts with. Raises Refused and ValueError."""
    values = {name: getattr(config, key) for key, name in IN_SETTINGS.items()}
    try:
        named = [name.strip() for name in config.frozen_layers.split(",")] if config.frozen_layers else []
        frozen = {*expand_layers(model, named), *_without_adapters(config, model)}
    except ValueError as error:
        raise Refused(f"frozen_layers: {error}") from None
    ordered = tuple(name for name in layer_names(model) if name in frozen)
    through = foreign.vocabulary_map if foreign else ()
    if config.shrunken_vocab_size:
        if through:
            raise Refused(f"shrunken_vocab_size: the weights of {config.init_from} have a vocabulary map of their own")
        old = read_meta(find_folder(next(iter(config.datasets)))).vocab_size
        through = tuple(read_remap(config.vocab_remapping_file, old, config.shrunken_vocab_size).tolist())
    more = {"lora_alpha": config.lora_alpha, "mixture": config.datasets, "vocabulary_map": through}
    return Settings(model=model, frozen=ordered, **more, **values)


class Foreign(NamedTuple):
    """Weights from elsewhere, looked at once: what they are, and what loads them (it raises ValueError)."""

    model: ModelConfig
    load: Callable[[hugging_face.Keep], GPT]
    vocabulary_map: tuple[int, ...] = ()
    """That the weights were trained through: `Settings.vocabulary_map`."""
    tokenizer: Meta | None = None
    """What the tokens meant to a run that they come from."""
    parent: dict[str, Any] | None = None
    """That run, for the start event."""


def opened(config: TrainConfig) -> tuple[TrainConfig, Foreign | None]:
    """The weights that a configuration starts from, and its keys of shape as these weights have them.

    None, and the configuration as it is, where it starts from no weights of others. A key that was given and
    contradicts the weights is refused. Raises Refused and ValueError.
    """
    given, peft = config.model_fields_set, peft_folder.is_peft(config.init_from)
    if config.base_model and not peft:
        raise Refused(f"base_model {config.base_model}: init_from {config.init_from} is no PEFT folder and has no base")
    if config.checkpoint != "latest" and config.init_from != "resume" and not is_run_folder(config.init_from):
        raise Refused(f"checkpoint {config.checkpoint}: init_from {config.init_from} is no run folder")
    if config.init_from in ("scratch", "resume"):
        return config, None
    if peft:
        described = peft_folder.describe(config.init_from, config.base_model)
        foreign = Foreign(described.model, partial(peft_folder.load, config.init_from, config.base_model))
        more = _peft_keys(described)
    elif is_run_folder(config.init_from):
        foreign = _of_run_folder(config.init_from, config.checkpoint)
        more = _NO_OTHER_ADAPTERS if foreign.model.lora else {}
    elif Path(config.init_from).is_file():
        shape, load = nanogpt.open_model(config.init_from)
        # A ckpt.pt is mapped into memory: what is rounded of it is when the run is opened.
        foreign, more = Foreign(shape, lambda keep: load()), {}
    else:
        foreign, more = Foreign(*hugging_face.open_model(config.init_from)), {}
    keys = {key: value for key, value in keys_of(foreign.model).items() if key != "block_size"} | more
    problems = [
        f"{key}: got {shown(getattr(config, key))}, but the weights of {config.init_from} have {key} {shown(value)}"
        for key, value in keys.items()
        if key in given and getattr(config, key) != value and (getattr(config, key) or not stands_for_more(key))
    ]
    if problems:
        raise Refused(problems)
    if peft and "lora_dropout" not in given:  # a number of the training, like dropout
        keys["lora_dropout"] = described.dropout
    if "block_size" not in given:
        keys["block_size"] = min(config.block_size, foreign.model.block_size)
    return config.model_copy(update=keys), foreign


def planned_model_config(config: TrainConfig, foreign: Foreign | None = None) -> tuple[ModelConfig, list[str]]:
    """The model's configuration without loading weights or data, and notes on what was assumed. Raises Refused."""
    notes: list[str] = []
    if foreign is not None:
        return _adjusted(config, foreign.model), notes
    vocab = config.shrunken_vocab_size
    if not vocab:  # that of what is read from the start; for other data sets it may grow
        sizes = [read_meta(find_folder(name)).vocab_size for name, share in config.datasets.items() if share]
        vocab = max(filter(None, sizes), default=None)
    if not vocab:
        vocab = DEFAULT_VOCAB
        notes.append(f"no vocabulary size with data set {config.dataset}: {DEFAULT_VOCAB} (GPT-2) is assumed")
    return model_config_from(config, vocab), notes


def _peft_keys(described: peft_folder.Described) -> dict[str, Any]:
    """What a PEFT folder says of keys on adapters: those that are added start as its own; which there are, it says."""
    how = {name: getattr(described, name) for name in ("lora_alpha", "use_rslora", "init_lora_weights")}
    return {**how, **_NO_OTHER_ADAPTERS}


_NO_OTHER_ADAPTERS = dict.fromkeys("attn_lora_rank mlp_lora_rank embedding_rank lora_rank".split(), 0) | {
    "lora_targets": ""
}


def named_checkpoint(out_dir: str, name: str) -> checkpoint.Checkpoint:
    """The checkpoint of a run folder by its name, `latest` or `best`. Raises Refused."""
    path = checkpoint.folder(out_dir) / name
    if not name or not path.exists():
        there = [found.name for found in checkpoint.find(out_dir)]
        raise Refused(f"out_dir {out_dir}: there is no checkpoint {name!r}; there are {', '.join(there) or 'none'}")
    return checkpoint.load(path)


def is_run_folder(source: str) -> bool:
    """Whether weights may be read from the checkpoints there."""
    return source not in ("scratch", "resume") and checkpoint.folder(source).is_dir()


def _of_run_folder(out_dir: str, name: str) -> Foreign:
    """A run's weights, and what its tokens mean; nothing of its optimizer or its schedule. Raises Refused."""
    loaded = named_checkpoint(out_dir, name)
    state, settings = loaded.state, loaded.state.present
    if settings.fading:
        raise Refused(
            f"init_from {out_dir}: in checkpoint {loaded.path.name} {', '.join(settings.fading)} is fading in"
        )
    path = loaded.path.resolve()  # what `latest` is now
    parent = {"run": out_dir, "checkpoint": path.name, "iter": state.progress.iter, "tokens": state.progress.tokens}
    parent["val_loss"] = state.val_loss
    model = settings.model
    return Foreign(
        model, lambda keep: from_weights(model, loaded.model), settings.vocabulary_map, state.tokenizer, parent
    )


def _adjusted(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """A foreign model's configuration with this run's adapters and (shorter) block_size. Raises Refused."""
    if config.block_size > model.block_size:
        raise Refused(
            f"block_size {config.block_size} is longer than the {model.block_size} that {config.init_from} was made for"
        )
    try:
        shorter = replace(model, block_size=config.block_size)
        return shorter if model.lora else _adapted(config, shorter)
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def initial_model(
    config: TrainConfig,
    model_config: ModelConfig,
    foreign: Foreign | None = None,
    keep: hugging_face.Keep = hugging_face.as_is,
) -> GPT:
    """Fresh or foreign weights in the planned shape. Raises ValueError.

    Args:
        keep: what becomes of each foreign weight once it is read, before there are adapters.
    """
    if foreign is None:
        model = GPT(model_config)
        init_weights(model, config.seed)
        return model
    model = crop_block_size(foreign.load(keep), config.block_size)
    if model_config.lora:
        model, _ = reshape_lora(model, model_config, torch.Generator().manual_seed(config.seed))
    return model


def the_schedule(config: TrainConfig) -> Schedule:
    return read_schedule(config.schedule) if config.schedule else Schedule()


def data_of(config: TrainConfig, stages: list[Stage]) -> Sources:
    """The data sets that are read in any stage, or evaluated, and in any case the first. Raises Refused, ValueError."""
    place = {name: "" for name, share in {**config.datasets, **config.evaluated}.items() if share}
    for stage in stages:
        for name, share in stage.settings.mixture.items():
            if share:
                place.setdefault(name, f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else "")
    found: dict[str, DataSet] = {}
    for name in dict.fromkeys([next(iter(config.datasets)), *place]):
        try:
            found[name] = open_data(name, config.block_size)
        except ValueError as error:
            raise Refused(f"{place.get(name, '')}{error}") from None
    return Sources(found).agreed()


def check_target(stages: list[Stage], config: TrainConfig) -> None:
    """Raises Refused where the last stage's model is not the `target_architecture`."""
    model = stages[-1].settings.model
    last = keys_of(model) | {"vocab_size": model.vocab_size}
    if len(set(model.n_hidden)) > 1:
        last["n_hidden"] = list(model.n_hidden)
    if missed := [key for key, value in config.target_architecture.items() if last[key] != value]:
        raise Refused(
            [
                f"target_architecture: {key} {shown(config.target_architecture[key])} is not reached: "
                f"{'the schedule ends' if len(stages) > 1 else 'the model stays'} at {shown(last[key])}"
                for key in missed
            ]
        )


def check_data(data: Sources, config: TrainConfig, stages: list[Stage], foreign: Foreign | None = None) -> None:
    """Raises Refused where the data does not fit the models of a run, or where sample_prompts cannot be read.

    There may be too few tokens, or ids that a model lacks, or ids that mean something else to it. A task of eval_tasks
    may not fit, or one is missing that a metric asks for, and so may a data set. Documents may have no end that
    document_mask could see.

    Of the files only samples are looked at; a batch is looked at whole before it is used.
    """
    trained = foreign.tokenizer if foreign else None
    if not config.allow_other_tokenizer and (problem := other_tokenizer(data.speaks, config, trained)):
        raise Refused(f"{problem}; --allow_other_tokenizer=True goes on all the same")
    settings = stages[0].settings
    for name, one in data.items():
        check_lengths(stages, one)
        try:
            check_kept(one.meta, kept_with_data(one.folder))
            _check_vocabulary(name, one, config, stages, several=len(data) > 1)
            mapped = one.remapped(np.array(settings.vocabulary_map) if settings.vocabulary_map else None)
            size = settings.model.vocab_size
            for file in (mapped.train, mapped.val):
                # One that is read later only may have tokens that the model will have by then.
                within(
                    file.sampled(), size if settings.vocabulary_map else max(size, one.meta.vocab_size or 0), file.path
                )
        except ValueError as error:
            raise error if isinstance(error, Refused) else Refused(f"dataset {name}: {error}") from None
    for stage in stages:
        if stage.settings.document_mask:
            try:
                data.document_end(stage.settings.vocabulary_map)
            except ValueError as error:
                place = f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else ""
                raise Refused(f"{place}document_mask: {error}") from None
    check_prompts(config, data.speaks, settings)
    check_tasks(config, data.meta, stages)
    asked = [("early_stopping_metric", config.early_stopping_metric)] if config.early_stopping_patience else []
    entries = [stage.entry for stage in stages if stage.entry]
    asked += [(f"entry {entry.number}: {entry}", name) for entry in entries for name in sorted(entry.metrics)]
    there = ", ".join(data) if len(data) > 1 else f"{next(iter(data))} alone, and its metrics have no name behind them"
    for place, name in asked:
        if is_of_bytes(name):
            for one in data.values():
                try:
                    at_hand(one)
                except ValueError as error:
                    raise Refused(f"{place}: {name} cannot be measured: {error}") from None
        if source_of(name) and (len(data) == 1 or source_of(name) not in data):
            raise Refused(f"{place}: {name} is of no data set that the run reads: there is {there}")


def _check_vocabulary(name: str, one: DataSet, config: TrainConfig, stages: list[Stage], several: bool) -> None:
    """Raises Refused where a data set is read, or counts in val_loss, while the model lacks tokens of it."""
    known = one.meta.vocab_size
    for stage in stages:
        settings = stage.settings
        evaluated = stage.entry is None and config.evaluated.get(name)
        read = not several or settings.mixture.get(name) or evaluated
        if known and read and known > settings.model.vocab_size and not settings.vocabulary_map:
            place = f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else ""
            whose = "" if config.init_from in ("scratch", "resume") else f" of {config.init_from}"
            more = f"more than the {settings.model.vocab_size} of the model{whose}"
            raise Refused(f"{place}dataset {name} has a vocabulary of {known}, {more}")


def other_tokenizer(data: DataSet, config: TrainConfig, trained: Meta | None = None) -> str:
    """That tokens of the data mean something else to the model, in one sentence; nothing where they do not.

    Args:
        trained: what the tokens were that a checkpoint was trained on.
    """
    if trained is not None:
        other = named(trained) if tells_apart(data.meta, trained) and not extends(data, trained) else ""
        whose = "the checkpoint was trained on those of"
    elif config.init_from in ("scratch", "resume") or config.shrunken_vocab_size or Path(config.init_from).is_file():
        return ""
    else:
        source = speaker(config.init_from, config.base_model)
        other = differs(data.meta, data.folder, source, source in hugging_face.GPT2_MODELS)
        whose = f"{config.init_from} speaks"
    said = f"dataset {config.dataset} is written in tokens of {named(data.meta)}, and {whose} {other}"
    return f"{said}: a token means something else to it" if other else ""


def speaker(source: str, base_model: str = "") -> str:
    """The folder or release that has a model's tokenizer: of a PEFT folder without one, its base. Raises ValueError."""
    if peft_folder.is_peft(source) and not has_tokenizer(source):
        return peft_folder.describe(source, base_model).base
    return source


def doubts(data: Sources, config: TrainConfig, settings: Settings, trained: Meta | None = None) -> list[str]:
    """What is allowed and likely not meant, one sentence each; `trained` as in `other_tokenizer`."""
    told = []
    if config.allow_other_tokenizer and (other := other_tokenizer(data.speaks, config, trained)):
        told.append(f"{other}; going on all the same (allow_other_tokenizer)")
    if data.meta.tokenizer == "huggingface" and not has_tokenizer(kept_with_data(data.speaks.folder)):
        told.append(f"dataset {config.dataset} has not the files of its tokenizer, so the run cannot keep them")
    known, size = data.meta.vocab_size, settings.model.vocab_size
    if known and not settings.vocabulary_map and size > -(-known // 128) * 128:  # more than padding
        told.append(f"dataset {config.dataset} has {known} tokens, and the model's vocabulary is {size}")
    if settings.model.block_size % data.meta.row:
        lines = f"lines of {data.meta.row} tokens, and block_size {settings.model.block_size} is no multiple of that"
        told.append(f"dataset {config.dataset} has {lines}: windows begin anywhere in a line")
    if settings.document_mask and 1 < data.meta.row < settings.model.block_size:
        rows = f"rows of {data.meta.row} tokens, and block_size {settings.model.block_size} holds several"
        told.append(f"dataset {config.dataset} has {rows}: what is behind a piece of a cut document sees it")
    if settings.decay_lr and config.max_iters <= settings.warmup_iters and config.max_iters:
        told.append(
            f"the run ends within its warm-up (max_iters {config.max_iters}, warmup_iters {settings.warmup_iters}): "
            "the learning rate never gets to its peak"
        )
    return told


def check_lengths(stages: list[Stage], data: DataSet) -> None:
    """Raises Refused where a stage's block_size is longer than a data file."""
    for stage in stages:
        for file in (data.train, data.val):
            try:
                file.require(stage.settings.model.block_size)
            except ValueError as error:
                place = f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else ""
                raise Refused(f"{place}{error}") from None
