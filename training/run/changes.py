"""How a run changes: `adopt` follows new settings, `restore` becomes an earlier state; all or nothing, on all ranks.

Everything new is built beside the present run; all ranks are asked whether they managed; only then is it installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, compile_blocks, set_dropout, set_lora_dropout
from orchestrate.model.lineage import Lineage, State, carry
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.run.analysis import NoiseScale
from orchestrate.training.run.batches import Batches
from orchestrate.training.run.casting import Cast, is_kept, kept, types_of
from orchestrate.training.run.optimizers import OPTIMIZERS, Optimizer, make_optimizer
from orchestrate.training.run.sharding import is_sharded
from orchestrate.training.settings.errors import OperationFailed
from orchestrate.training.settings.records import Progress, Settings

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run

T = TypeVar("T")
Reshape = Callable[[GPT, ModelConfig, torch.Generator], tuple[GPT, Lineage]]


@dataclass
class Change:
    """What a run is to become, built beside it. Nothing in it is live yet."""

    settings: Settings
    batches: Batches
    model: GPT
    optimizer: Optimizer
    rewraps: bool
    """Whether parameters, or which of them train, differ: then all ranks must agree, and DDP is wrapped anew."""
    cast: Cast = Cast()


def adopt(run: Run, target: Settings, reshape: Reshape | None = None) -> Cast:
    """Make the run follow `target`. All or nothing, on all ranks alike. Returns which weights changed their type.

    Args:
        reshape: makes the new model where the target's shape differs from the present one.

    Raises OperationFailed on every rank, with the run as it was, when any rank could not make the change.
    """
    together = needs_agreement(run.settings, target)
    change = _agreed(run, together, lambda: _prepare(run, target, reshape))
    p, before = run.progress, run.settings
    _carry_out(run, change)
    # From here on nothing can fail.
    if change.rewraps:
        run.noise.forget()
    if target.lr_restarts != before.lr_restarts:
        p.lr_start_iter = p.iter
    if target.rewarms != before.rewarms:
        p.rewarm_start_iter = p.iter
    p.changed_since_eval = p.changed_since_eval or not before.evaluates_as(target)
    p.cursor = target.followed(p.cursor, before)
    return change.cast


def restore(
    run: Run,
    settings: Settings,
    progress: Progress,
    model: GPT,
    optimizer_state: State,
    scaler_state: dict[str, Any],
) -> None:
    """Become an earlier state of this run, but for its place in the stream of samples and its clock.

    What became of the last step does not matter any more. Raises OperationFailed as `adopt` does.
    """

    def prepared() -> Change:
        return _placed(run, settings, _batches(run, settings), model, optimizer_state)

    before, change = run.settings, _agreed(run, True, prepared)
    _carry_out(run, change)
    cursor = settings.followed(run.progress.cursor, before)
    run.progress.__dict__.update(progress.__dict__, cursor=cursor, seconds=run.progress.seconds)
    run.diagnosis.drop()
    run.noise, run.near = NoiseScale(run.device, progress.noise), None
    if scaler_state:
        run.scaler.load_state_dict(scaler_state)


def install(run: Run, model: GPT, optimizer_state: State) -> Cast:
    """The first model of a run that has none yet. Returns which weights changed their type."""
    change = _placed(run, run.settings, run.batches, model, optimizer_state)
    run.model, run.optimizer, run.wrapped = change.model, change.optimizer, _wrap(run, change)
    return change.cast


def _agreed(run: Run, together: bool, work: Callable[[], T]) -> T:
    """The result of some work; OperationFailed on every rank where it raised on any.

    Without `together` the work cannot fail on one rank alone, and nothing is exchanged.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the other ranks must hear of it
        error = caught
    told = None if error is None else f"{type(error).__name__}: {error}"
    failures = run.ranks.gather(told) if together else [told]
    if any(failures):
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
        raise OperationFailed(listed) from error
    return result  # type: ignore[return-value]


def _prepare(run: Run, target: Settings, reshape: Reshape | None) -> Change:
    """Everything that the target needs, beside the present run."""
    batches, together = _batches(run, target), needs_agreement(run.settings, target)
    if not together:
        return Change(target, batches, run.model, run.optimizer, rewraps=False)
    model, state = run.model, run.optimizer.state_by_name()
    if not reshapes(run.settings, target):
        trains = trainable_parameters(model, target.frozen)
        if is_kept(model, types_of(model, trains, target.weights_dtype)):
            return Change(target, batches, model, make_optimizer(target, model, trains, state), rewraps=True)
        return _placed(run, target, batches, *run.ranks.whole(model, state))
    if reshape is None:
        raise ValueError("the target has another shape and nothing says how to get there")
    generator = torch.Generator().manual_seed(run.seed(1))
    whole, state = run.ranks.whole(model, state)
    model, lineage = reshape(whole, target.model, generator)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert list(lineage) == list(shapes), "a lineage must cover every parameter, in model order"
    assert model.config == target.model, "the reshaped model is not the target's"
    state = carry(state, lineage, shapes, OPTIMIZERS[target.optimizer].slots)
    return _placed(run, target, batches, model, state)


def _batches(run: Run, target: Settings) -> Batches:
    same = all(getattr(target, name) == getattr(run.settings, name) for name in ("vocabulary_map", "curriculum_alpha"))
    return run.batches if same else run.batches.following(target)


def _placed(run: Run, settings: Settings, batches: Batches, model: GPT, state: State) -> Change:
    """With a model and its optimizer on this rank's device, in the number types that the settings ask for."""
    trains, cast = trainable_parameters(model, settings.frozen), Cast()
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        model, cast = kept(model, trains, settings.weights_dtype)
        model = run.ranks.place(model, run.device)
    state = run.ranks.place_state(state, model, run.device)
    return Change(settings, batches, model, make_optimizer(settings, model, trains, state), rewraps=True, cast=cast)


def _carry_out(run: Run, change: Change) -> None:
    """Make a change live. Where that fails on any rank, it is taken back on all of them."""
    before = Change(run.settings, run.batches, run.model, run.optimizer, change.rewraps)
    if change.rewraps:
        run.wrapped = None  # the old DDP goes first: its hooks sit on shared parameters
    try:
        wrapped = _agreed(run, change.rewraps, lambda: _wrap(run, change))
    except OperationFailed:
        run.wrapped = _wrap(run, before)
        raise
    run.settings, run.batches = change.settings, change.batches
    run.model, run.optimizer, run.wrapped = change.model, change.optimizer, wrapped


def _wrap(run: Run, change: Change) -> nn.Module:
    """The change's model in the state that its settings want: flags, dropout, masks; as a step calls it, in DDP."""
    model, settings = change.model, change.settings
    if change.rewraps:
        trainable = set(change.optimizer.names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
            # A stale gradient would still be applied by the optimizer after a freeze.
            parameter.grad = None
        if run.config.compile:
            compile_blocks(model)
    if settings.dropout != model.dropout:
        set_dropout(model, settings.dropout)
    if settings.lora_dropout != model.lora_dropout:
        set_lora_dropout(model, settings.lora_dropout)
    if settings.fading != model.fading:
        model.set_fading(settings.fading)
    model.checkpointing = settings.activation_checkpointing
    opened = change.batches.opened
    model.document_end = opened.document_end(settings.vocabulary_map) if settings.document_mask else None
    return run.ranks.wrap(model, run.device) if change.rewraps else run.wrapped


def reshapes(before: Settings, after: Settings) -> bool:
    """Whether parameters or their moments differ between the two."""
    return before.model != after.model or before.reshapes_asked != after.reshapes_asked


def needs_agreement(before: Settings, after: Settings) -> bool:
    """Whether parameters, their moments, their types, or which of them train, differ between the two."""
    same = before.frozen == after.frozen and before.weights_dtype == after.weights_dtype
    return reshapes(before, after) or not same
