"""One optimizer step on the next samples: forward, backward, exchange, update. Sick numbers never reach weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.run.sharding import gradient_norm

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run

# A loss can be called a spike after this many, and the running mean remembers about that many.
SPIKE_WARMUP, SPIKE_MEMORY = 20, 100


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. Tensors stay on the device: reading them waits for it, so only logging does."""

    loss: torch.Tensor
    """This rank's mean over its micro-steps, ()."""
    grad_norm: torch.Tensor
    """Before clipping, ()."""
    lr: float
    samples: int
    sick: str = ""
    """Why the weights were not updated ("out of memory", "not finite", "spike"); on CUDA of the step before."""
    at: tuple[int, int, int] = (0, 0, 0)
    """(iter, samples, tokens) before the sick step."""


def step(run: Run) -> StepResult:
    """One optimizer step on the next samples of the stream.

    A step whose gradients are not finite, whose loss is a spike, or that ran out of memory on any rank leaves
    weights and moments as they were on every rank, and says so in the result.
    """
    s, p, ranks = run.settings, run.progress, run.ranks
    windows = s.model.block_size, s.sequence_length
    at, lr = (p.iter, p.samples, p.tokens), run.current_lr()
    micro_steps = range(ranks.rank, s.grad_accum, ranks.world_size)
    total = torch.zeros((), device=run.device)
    out_of_memory = exchanging = False
    try:
        for micro in micro_steps:
            with run.stopwatch.part("data"):
                x, y = run.batches.read(p.samples + micro * s.batch_size, s.batch_size, *windows)
            with run.stopwatch.part("forward_backward"):
                last = micro + ranks.world_size >= s.grad_accum
                if ranks.distributed and not ranks.sharded:
                    # Only the last backward exchanges gradients; the earlier ones add up locally. Sharded ones
                    # are exchanged every time: adding up whole ones would take the memory that sharding saves.
                    run.wrapped.require_backward_grad_sync = last
                _seed_dropout(run, micro)
                with run.autocast():
                    _, loss = run.wrapped(x, y)
                    loss = loss / len(micro_steps)
                if run.injector.faults and micro == micro_steps[0]:
                    loss = run.injector.strike(p.iter, loss)
                exchanging = ranks.distributed and last
                run.scaler.scale(loss).backward()
                exchanging = False
                total += loss.detach()
            if run.device.type == "cuda":
                with run.stopwatch.part("data"):
                    following = p.samples + s.samples_per_iter + ranks.rank * s.batch_size
                    run.batches.prefetch(
                        following if last else p.samples + (micro + ranks.world_size) * s.batch_size,
                        s.batch_size,
                        *windows,
                    )
    except Exception as error:
        # Once gradients (or, sharded, weights) are being exchanged the other ranks cannot be joined any more.
        if exchanging or ranks.sharded or not is_out_of_memory(error):
            raise
        out_of_memory = True
        _poison(run, p.samples)
    with run.stopwatch.part("optimizer"):
        run.scaler.unscale_(run.optimizer.inner)
        # The norm of the reduced gradients is the same number on every rank, and not finite if one of them is not.
        grad_norm = gradient_norm(run.optimizer.parameters, s.grad_clip)
        spike = _is_spike(run, total, out_of_memory)
        run.optimizer.set(lr, s.beta1, s.beta2, s.weight_decay)
        run.consistent = False
        if not run.scaler.is_enabled():
            # The fused kernels look at this on the device: no weight is touched, and no host waits to know.
            bad = ~torch.isfinite(grad_norm) if not spike else torch.ones_like(grad_norm, dtype=torch.bool)
            run.optimizer.inner.found_inf = bad.to(torch.float32)
        run.scaler.step(run.optimizer.inner)
        run.scaler.update()
        run.optimizer.zero_grad()
        p.iter += 1
        p.samples += s.samples_per_iter
        p.tokens += s.tokens_per_iter
        run.consistent = True
    sick, sick_at = _diagnose(run, grad_norm, out_of_memory, spike, at)
    return StepResult(total, grad_norm, lr, s.samples_per_iter, sick, sick_at)


def _poison(run: Run, first: int) -> None:
    """After running out of memory: join the other ranks' exchange of gradients with ones that are not numbers.

    So no rank updates its weights, and all of them know that something is wrong.
    """
    run.optimizer.zero_grad()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if run.ranks.distributed:
        run.wrapped.require_backward_grad_sync = True
        x, y = run.batches.load(first, 1, run.settings.model.block_size, run.settings.sequence_length)
        with run.autocast():
            loss = run.wrapped(x, y)[1]
        (loss * float("nan")).backward()
    else:
        for parameter in run.optimizer.parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))


def _is_spike(run: Run, total: torch.Tensor, out_of_memory: bool) -> bool:
    """Whether the loss, over all ranks, is far above its running mean; equal on every rank."""
    sigma, p = run.config.spike_sigma, run.progress
    if not sigma:
        return False
    local = float("nan") if out_of_memory else float(total)
    loss = float(run.ranks.sum(np.array([local]))[0]) / run.ranks.world_size
    if not np.isfinite(loss):
        return False
    limit = p.loss_mean + sigma * max(p.loss_variance, 1e-12) ** 0.5
    if p.losses_seen >= SPIKE_WARMUP and loss > limit:
        return True
    p.losses_seen += 1
    weight = max(1.0 / p.losses_seen, 1.0 / SPIKE_MEMORY)
    distance = loss - p.loss_mean
    p.loss_mean += weight * distance
    p.loss_variance = (1 - weight) * (p.loss_variance + weight * distance * distance)
    return False


def _diagnose(
    run: Run, grad_norm: torch.Tensor, out_of_memory: bool, spike: bool, at: tuple[int, int, int]
) -> tuple[str, tuple[int, int, int]]:
    """What was wrong and where, on every rank alike. Reading it never waits for the step just enqueued on CUDA."""
    if run.scaler.is_enabled() and not out_of_memory:
        return "", at  # a GradScaler tries scales that overflow; skipping those steps is its business
    finite: torch.Tensor | None = torch.isfinite(grad_norm)
    cause = "out of memory" if out_of_memory else "spike" if spike else "not finite"
    if run.device.type == "cuda":
        copied = torch.empty((), dtype=torch.bool, pin_memory=True)
        copied.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, run.undiagnosed = run.undiagnosed, (copied, event, cause, spike, at)
        if before is None:
            return "", at
        copied, event, cause, spike, at = before
        event.synchronize()
        finite = copied
    if bool(finite) and not spike:
        return "", at
    # Every rank comes here: the norm and the spike are the same numbers everywhere.
    causes = run.ranks.gather(cause)
    return ("out of memory" if "out of memory" in causes else cause), at


def _seed_dropout(run: Run, micro: int) -> None:
    """Dropout is a function of (seed, iteration, micro-step): equal after a resume and for any number of ranks."""
    if run.settings.model.dropout > 0:
        words = np.random.SeedSequence([run.config.seed, run.progress.iter, micro]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]) >> 1)
