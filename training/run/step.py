"""One optimizer step on the next samples: forward, backward, exchange, update. Sick numbers never reach weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from orchestrate.training.run.analysis import NearStep
from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.sharding import gradient_norm
from orchestrate.training.run.sickness import NOT_FINITE, OUT_OF_MEMORY, OVERFLOW, SPIKE, Sick, is_spike

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors stay on the device: reading them waits for it, so only logging does."""

    loss: Tensor
    """This rank's share of the mean over the iteration's targets, in nats, (): the mean over the ranks is that mean."""
    grad_norm: Tensor
    """Before clipping, ()."""
    lr: float
    sick: Sick | None = None
    """What was wrong with this step, or, on a GPU, with the one before; that step updated nothing."""


def step(run: Run, near: bool = False) -> StepResult:
    """One optimizer step on the next samples of the stream.

    Args:
        near: whether to keep in `run.near` what an analysis at the next boundary says of this step.

    A step whose gradients are not finite, whose loss is a spike, or that ran out of memory on any rank leaves
    weights and moments as they were on every rank, and says so in the result.
    """
    s, p = run.settings, run.progress
    place, lr = p.place, run.current_lr()
    total = torch.zeros((), device=run.device)
    run.noise.begin()
    targets, fits = _backward(run, total)
    if not fits:  # outside the `except`: its traceback would keep the failed forward pass alive
        _poison(run)
    with run.stopwatch.part("optimizer"):
        run.scaler.unscale_(run.optimizer.inner)
        counted = float(s.tokens_per_iter), float(run.noise.targets * run.ranks.world_size)
        if run.stream.masks:
            counted = _weigh(run, total, targets)
        seen = NearStep(run) if near else None
        # The norm of the reduced gradients is the same number on every rank, and not finite if one of them is not.
        grad_norm = gradient_norm(run.optimizer.parameters, s.grad_clip)
        spike = bool(run.config.spike_sigma) and is_spike(_loss_of_all(run, total, fits), run.config.spike_sigma, p)
        healthy = torch.isfinite(grad_norm) & (not spike)
        if run.config.analyze_interval:
            run.noise.add(run, grad_norm, *counted, healthy)
        run.optimizer.set(lr, s)
        run.consistent = False
        run.optimizer.step(veto=(~healthy).to(torch.float32))
        run.scaler.update()
        run.optimizer.zero_grad()
        run.near = seen and seen.finish(run, healthy)
        p.iter += 1
        p.cursor = p.cursor.skip(s.samples_per_iter)
        p.tokens += s.tokens_per_iter
        run.consistent = True
    cause = OUT_OF_MEMORY if not fits else SPIKE if spike else OVERFLOW if run.scaler.is_enabled() else NOT_FINITE
    with run.stopwatch.part("forward_backward"):  # where answers are late, the host waits for the step before here
        sick = run.diagnosis.of(healthy, Sick(cause, place, s.samples_per_iter, s.batch_size))
    return StepResult(total, grad_norm, lr, sick)


def _backward(run: Run, total: Tensor) -> tuple[int, bool]:
    """Gradients of the global batch, and this rank's mean loss added to `total`, as if every target counted.

    Returns how many targets counted on this rank, and whether memory sufficed.
    """
    s, p, ranks = run.settings, run.progress, run.ranks
    micro_steps = range(ranks.rank, s.grad_accum, ranks.world_size)
    exchanging, targets = False, 0
    try:
        for micro in micro_steps:
            last = micro + ranks.world_size >= s.grad_accum
            with run.stopwatch.part("data"):
                batch = run.batches.read(p.cursor.skip(micro * s.batch_size), s.batch_size, s.model.vocab_size)
                targets += batch.targets
                following = p.cursor.skip(
                    (s.grad_accum + ranks.rank if last else micro + ranks.world_size) * s.batch_size
                )
                run.batches.read_ahead(following, s.batch_size, s.model.vocab_size)
            with run.stopwatch.part("forward_backward"):
                if ranks.distributed and not ranks.sharded:
                    # Only the last backward exchanges gradients; the earlier ones add up locally. Sharded ones
                    # are exchanged every time: adding up whole ones would take the memory that sharding saves.
                    run.wrapped.require_backward_grad_sync = last
                _seed_dropout(run, micro)
                with run.autocast():
                    loss = run.wrapped(batch.x, batch.y).sum / batch.y.numel() / len(micro_steps)
                if run.injector.faults and micro == micro_steps[0]:
                    loss = run.injector.strike(p.iter, loss)
                exchanging = ranks.distributed and last
                looks = run.config.analyze_interval and micro == micro_steps[0]
                with run.noise.first(run, batch, len(micro_steps)) if looks else nullcontext():
                    run.scaler.scale(loss).backward()
                exchanging = False
                total += loss.detach()
            if run.device.type == "cuda":
                with run.stopwatch.part("data"):
                    run.batches.prefetch(following, s.batch_size, s.model.vocab_size)
    except Exception as error:
        # Once gradients (or, sharded, weights) are being exchanged the other ranks cannot be joined any more.
        if exchanging or ranks.sharded or not is_out_of_memory(error):
            raise
        return targets, False
    return targets, True


def _weigh(run: Run, total: Tensor, targets: int) -> tuple[float, float]:
    """Make gradients and loss those of the mean over the targets that count, of all micro-steps on all ranks.

    However targets are spread, a split of the global batch over micro-steps and ranks then makes no difference. What
    was divided by the number of all targets is put right here, after the exchange, because the ranks need not wait for
    each other's counts before they compute. A batch without a target that counts has no gradient.

    Returns how many count on all ranks: of the batch, and of the first micro-steps that `run.noise` has looked at.
    """
    counted, first = map(float, run.ranks.sum(np.array([targets, run.noise.targets], dtype=np.float64)))
    weight = run.settings.tokens_per_iter / max(counted, 1.0)
    torch._foreach_mul_([p.grad for p in run.optimizer.parameters if p.grad is not None], weight)
    total *= weight
    return counted, first


def _poison(run: Run) -> None:
    """After running out of memory: join the other ranks' exchange of gradients with ones that are not numbers.

    So no rank updates its weights, and all of them know that something is wrong.
    """
    run.optimizer.zero_grad()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if run.ranks.distributed:
        run.wrapped.require_backward_grad_sync = True
        batch = run.batches.load(run.progress.cursor, 1)
        with run.autocast():
            loss = run.wrapped(batch.x, batch.y).sum
        (loss * float("nan")).backward()
    else:
        for parameter in run.optimizer.parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))


def _loss_of_all(run: Run, total: Tensor, fits: bool) -> float:
    """The loss over all ranks, equal on every rank. It waits for the device."""
    return run.ranks.mean(float(total) if fits else float("nan"))


def _seed_dropout(run: Run, micro: int) -> None:
    """Dropout is a function of (seed, iteration, micro-step): equal after a resume and for any number of ranks."""
    if run.settings.dropout > 0 or run.settings.lora_dropout > 0:
        torch.manual_seed(run.seed(micro))
