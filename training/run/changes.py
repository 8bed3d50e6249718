"""How a run changes: `adopt` follows new settings, `restore` becomes an earlier state; all or nothing, on all ranks.

Everything new is built beside the present run; all ranks are asked whether they managed; only then is it installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, compile_blocks, set_dropout
from orchestrate.model.lineage import Lineage, carry
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.run.optimizers import NamedAdamW, State
from orchestrate.training.run.sharding import is_sharded
from orchestrate.training.settings.errors import OperationFailed
from orchestrate.training.settings.records import Progress, Settings

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run

Reshape = Callable[[GPT, ModelConfig, torch.Generator], tuple[GPT, Lineage]]


def adopt(run: Run, target: Settings, reshape: Reshape | None = None) -> None:
    """Make the run follow `target`. All or nothing, on all ranks alike.

    Args:
        reshape: makes the new model where the target's shape differs from the present one.

    Raises OperationFailed on every rank, with the run as it was, when any rank could not prepare the change.
    """
    error: Exception | None = None
    prepared = None
    try:
        prepared = prepare(run, target, reshape)
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    if needs_agreement(run.settings, target):
        failures = run.ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
    else:
        failures = [None if error is None else f"{type(error).__name__}: {error}"]
    if any(failures):
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
        raise OperationFailed(told) from error

    before, p = run.settings, run.progress
    if target.lr_restarts != before.lr_restarts:
        p.lr_start_iter = p.iter
    if target.rewarms != before.rewarms:
        p.rewarm_start_iter = p.iter
    lengths = [(s.model.block_size, s.sequence_length) for s in (before, target)]
    if lengths[0] != lengths[1]:
        p.samples = run.batches.stream.moved(p.samples, *lengths)
    if target.vocabulary_map != before.vocabulary_map:
        run.batches.map_vocabulary(target.vocabulary_map)
    if prepared is not None:
        install(run, *prepared)
    if target.model.dropout != run.model.config.dropout:
        set_dropout(run.model, target.model.dropout)
    if target.model.fading != run.model.config.fading:
        run.model.set_fading(target.model.fading)
    run.settings = target


def restore(
    run: Run,
    settings: Settings,
    progress: Progress,
    model: GPT,
    optimizer_state: State,
    scaler_state: dict[str, Any],
) -> None:
    """Become an earlier state of this run, but for its place in the stream of samples and its clock."""
    lengths = [(s.model.block_size, s.sequence_length) for s in (run.settings, settings)]
    samples = run.progress.samples
    if lengths[0] != lengths[1]:
        samples = run.batches.stream.moved(samples, *lengths)
    seconds = run.progress.seconds
    run.progress.__dict__.update(progress.__dict__, samples=samples, seconds=seconds)
    if settings.vocabulary_map != run.settings.vocabulary_map:
        run.batches.map_vocabulary(settings.vocabulary_map)
    run.settings = settings
    install(run, *placed(run, model, optimizer_state, settings.frozen))
    if scaler_state:
        run.scaler.load_state_dict(scaler_state)


def prepare(run: Run, target: Settings, reshape: Reshape | None) -> tuple[GPT, NamedAdamW, set[str]] | None:
    """Everything new that the target needs, beside the present run; None where nothing live changes."""
    if not needs_agreement(run.settings, target):
        return None
    model, state = run.model, run.optimizer.state_by_name()
    if reshapes(run.settings, target):
        if reshape is None:
            raise ValueError("the target has another shape and nothing says how to get there")
        seed = np.random.SeedSequence([run.config.seed, run.progress.iter, 1]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]) >> 1)
        whole, state = run.ranks.whole(model, state)
        model, lineage = reshape(whole, target.model, generator)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert list(lineage) == list(shapes), "a lineage must cover every parameter, in model order"
        assert shape_of(model.config) == shape_of(target.model), "the reshaped model is not the target's"
        state = carry(state, lineage, shapes)
        return placed(run, model, state, target.frozen)
    trainable = trainable_parameters(model, target.frozen)
    return model, NamedAdamW(model, trainable, state), trainable


def placed(run: Run, model: GPT, state: State, frozen: Iterable[str]) -> tuple[GPT, NamedAdamW, set[str]]:
    """A model and its optimizer on this rank's device."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        model = run.ranks.place(model, run.device)
    trainable = trainable_parameters(model, frozen)
    state = run.ranks.place_state(state, model, run.device)
    return model, NamedAdamW(model, trainable, state), trainable


def install(run: Run, model: GPT, optimizer: NamedAdamW, trainable: set[str]) -> None:
    """Commit: from here on the run is this model and this optimizer."""
    run.wrapped = None  # the old DDP goes first: its hooks sit on shared parameters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
        # A stale gradient would still be applied by AdamW after a freeze.
        parameter.grad = None
    model.train()
    if run.config.compile:
        compile_blocks(model)
    run.model, run.optimizer = model, optimizer
    run.wrapped = run.ranks.wrap(model, run.device)


def shape_of(config: ModelConfig) -> ModelConfig:
    """A model's configuration less what can change without another model."""
    return replace(config, dropout=0.0, fading={})


def reshapes(before: Settings, after: Settings) -> bool:
    """Whether parameters or their moments differ between the two."""
    return shape_of(before.model) != shape_of(after.model) or before.reshapes_asked != after.reshapes_asked


def needs_agreement(before: Settings, after: Settings) -> bool:
    """Whether parameters, their moments, or which of them train, differ between the two."""
    return reshapes(before, after) or before.frozen != after.frozen
