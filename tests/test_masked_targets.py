"""Targets that do not count, spread unevenly: every split of a global batch has the gradients of one big batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import on_ranks
from test_distributed import make_run

from orchestrate.data.stream import Stream, TokenFile
from orchestrate.training.run import evaluation
from orchestrate.training.run.evaluation import validation_loss
from orchestrate.training.run.sharding import whole

SAMPLES = 24


@dataclass(frozen=True)
class Masked(Stream):
    """About 90 % of the targets masked: some samples lose all of them, some none. A function of the sample alone."""

    masks: ClassVar[bool] = True

    def batch(self, cursor, count, vocab_size=None):
        x, y = super().batch(cursor, count, vocab_size)
        y = y.copy()  # it may share memory with x
        for row, sample in enumerate(range(cursor.sample, cursor.sample + count)):
            y[row] = np.where(kept(sample, y.shape[1]), y[row], -1)
        return x, y


def kept(sample: int, length: int) -> np.ndarray:
    share = (0.0, 0.02, 0.1, 0.0, 1.0, 0.0, 0.05, 0.0)[sample * 7 % 11 % 8]
    return np.random.default_rng(sample).random(length) < share


def one_step(data: str, batch_size: int, masks: bool = True, **keys) -> tuple[dict[str, np.ndarray], float]:
    """Gradients as the optimizer sees them, and the loss that is told, of one step on the same global batch."""
    run = make_run(
        data, batch_size=batch_size, gradient_accumulation_steps=SAMPLES // batch_size, grad_clip=0.0, **keys
    )
    if masks:
        run.batches.stream = Masked(run.stream.tokens, run.stream.seed)
    seen: dict[str, np.ndarray] = {}
    run.optimizer.inner.register_step_pre_hook(
        lambda *_: seen.update({n: whole(p.grad).numpy().copy() for n, p in run.model.named_parameters()})
    )
    add_up = run.ranks.sum
    if not masks:
        run.ranks.sum = None  # nothing may be exchanged where targets are never masked
    loss = run.step().loss.item()
    return seen, float(add_up(np.array([loss]))[0]) / run.ranks.world_size


def on_rank(rank: int, data: str, sizes: list[int], keys: dict) -> list:
    """One step for each micro-batch size."""
    import os

    port, found = int(os.environ["MASTER_PORT"]), []
    for number, size in enumerate(sizes):
        os.environ["MASTER_PORT"] = str(port + number)
        found.append(one_step(data, size, **keys))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def one_big_batch(data) -> tuple[dict[str, np.ndarray], float, int]:
    """The mean over all targets that count, in float64, without anything of a step."""
    run = make_run(str(data), batch_size=SAMPLES, gradient_accumulation_steps=1)
    x, y = (torch.from_numpy(a) for a in Stream(run.stream.tokens, run.stream.seed).batch(run.progress.cursor, SAMPLES))
    counts = torch.from_numpy(np.stack([kept(sample, 16) for sample in range(SAMPLES)]))
    model = run.model.double()
    chances = model.logits(x).log_softmax(-1).gather(2, y[..., None])[..., 0]
    loss = -(chances * counts).sum() / counts.sum()
    loss.backward()
    assert 0.02 < counts.double().mean() < 0.2 and (counts.sum(1) == 0).sum() >= 8 and (counts.sum(1) == 16).any()
    return {n: p.grad.numpy() for n, p in model.named_parameters()}, loss.item(), int(counts.sum())


def assert_same(found, wanted) -> None:
    for name, gradient in wanted[0].items():
        np.testing.assert_allclose(found[0][name], gradient, atol=2e-6, rtol=2e-4, err_msg=name)
    assert found[1] == pytest.approx(wanted[1], abs=1e-5)


@pytest.mark.parametrize("batch_size", [24, 8, 3, 1])
def test_every_split_on_one_process(data, one_big_batch, batch_size):
    assert_same(one_step(str(data), batch_size), one_big_batch)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [2, 3])
def test_every_split_on_several_processes(data, one_big_batch, processes, parallel):
    sizes = [8, 2] if processes == 3 else [12, 4, 1]
    for found in on_ranks(on_rank, str(data), sizes, {"parallel": parallel}, world_size=processes):
        for one in found:
            assert_same(one, one_big_batch)


def test_targets_that_all_count_cost_nothing(data):
    """Nobody looks for masks or exchanges a count, and the gradients are those of the mean."""
    alone = one_step(str(data), 4, masks=False)
    for found in on_ranks(on_rank, str(data), [4], {"masks": False}):
        assert_same(found[0], alone)


def test_a_batch_without_a_target_that_counts(data, monkeypatch):
    monkeypatch.setitem(globals(), "kept", lambda sample, length: np.zeros(length, dtype=bool))
    gradients, loss = one_step(str(data), 8)
    assert loss == 0.0 and not any(g.any() for g in gradients.values())


def test_an_evaluation_is_a_mean_over_the_targets_that_count(data, monkeypatch):
    """Sums over sums, whatever the batches are: not a mean of means."""
    run = make_run(str(data))
    tokens = TokenFile(data / "val.bin")
    gather = evaluation.gather

    def masked(file, starts, length, vocab_size=None):
        x, y = gather(file, starts, length, vocab_size)
        y = y.copy()
        y[np.random.default_rng(starts).random(y.shape) < 0.9 * (starts > starts.mean())[:, None]] = -1
        return x, y

    monkeypatch.setattr(evaluation, "gather", masked)
    told = validation_loss(
        run.model, tokens, batches=3, batch_size=5, block_size=16, ranks=run.ranks, device=run.device,
        autocast=run.autocast, poll=lambda: 0,
    )  # fmt: skip
    total = count = 0.0
    starts = evaluation.eval_windows(tokens, 15, 16)
    for first in range(0, 15, 5):
        x, y = (torch.from_numpy(a) for a in masked(tokens, starts[first : first + 5], 16))
        chances = run.model.logits(x).double().log_softmax(-1)
        for row, column in zip(*torch.where(y >= 0), strict=True):
            total, count = total - chances[row, column, y[row, column]].item(), count + 1
    assert count < 15 * 16 and told == pytest.approx(total / count, abs=1e-6)
