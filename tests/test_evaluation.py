"""The validation loss by hand, and what follows from a row of losses: the best one and early stopping."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import events, lines, on_ranks
from test_distributed import make_run
from torch import nn

from orchestrate.data.stream import TokenFile
from orchestrate.model.config import ModelConfig
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.evaluation import validation_loss
from orchestrate.training.run.run import Run


class MeanOfTokens(nn.Module):
    """A "model" whose loss is the mean of its inputs, halved where it trains; remembers what it was given.

    As a model does, it gives a sum over targets and how many count.
    """

    config = ModelConfig(vocab_size=176, n_layer=1, n_head=1, n_embd=8)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.gradients: list[bool] = []

    def forward(self, x, y):
        assert torch.equal(y, x + 1) and x.dtype == torch.int64
        self.seen.append(x)
        self.gradients.append(torch.is_grad_enabled())
        return x.double().sum() * (0.5 if self.training else 1.0), torch.tensor(x.numel())


def measured(folder, model, poll=lambda: 0, **keys) -> float | None:
    (np.arange(75) + 100).astype(np.uint16).tofile(folder / "t.bin")
    tokens = TokenFile(folder / "t.bin")  # 74 // 10 = 7 windows of 10, and the token after each
    keys = {"batches": 9, "batch_size": 3, "block_size": 10, **keys}
    return validation_loss(
        model, tokens, **keys, ranks=Ranks("cpu"), device=torch.device("cpu"), autocast=nullcontext, poll=poll
    )


@pytest.mark.parametrize("batch_size, sizes", [(3, [3, 3, 1]), (4, [4, 3]), (7, [7]), (2, [2, 2, 2, 1])])
def test_a_partial_last_batch_weighs_by_its_windows(tmp_path, batch_size, sizes):
    """Whatever the batches, it is the mean over 70 tokens, 100 to 169."""
    model = MeanOfTokens()
    assert measured(tmp_path, model, batch_size=batch_size) == pytest.approx(134.5, rel=1e-12)
    assert [len(x) for x in model.seen] == sizes and not any(model.gradients)
    assert sorted(torch.cat(model.seen)[:, 0].tolist()) == list(range(100, 170, 10))
    assert model.training, "as it was"


def test_at_most_so_many_batches(tmp_path):
    model = MeanOfTokens().eval()
    loss = measured(tmp_path, model, batches=2)
    assert [len(x) for x in model.seen] == [3, 3] and not model.training
    assert loss == pytest.approx(torch.cat(model.seen).double().mean().item(), rel=1e-12)
    assert len(torch.cat(model.seen).unique()) == 60, "six windows, none twice"


def test_it_stops_between_two_batches_when_it_is_asked_to(tmp_path):
    model, polls = MeanOfTokens(), iter([0, 0, 15])
    assert measured(tmp_path, model, poll=lambda: next(polls)) is None
    assert len(model.seen) == 2 and model.training


def _on_two(rank: int, data: str, parallel: str):
    run = make_run(data, parallel=parallel, eval_batch_size=3, eval_iters=2)
    before = run.fingerprint()
    losses = [run.evaluate(lambda: 0), run.evaluate(lambda: 0)]
    same = run.fingerprint() == before
    run.settings = dataclasses.replace(run.settings, eval_iters=100)
    losses.append(run.evaluate(lambda: 0))
    polls = iter([0, 2])
    stopped = run.evaluate(lambda: next(polls))
    run.step()
    run.check_ranks_agree("a step")
    run.ranks.close()
    return losses, stopped, same


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_share_the_batches_of_one(data, parallel):
    """An odd number of batches, too: one process has none in the last turn. Sharded, it computes along."""
    one, other = on_ranks(_on_two, str(data), parallel)
    ((alone, _, _),) = on_ranks(_on_two, str(data), "ddp", world_size=1)
    assert one == other and one[1:] == (None, True) and one[0][0] == one[0][1]
    assert one[0] == (pytest.approx(alone, rel=1e-6) if parallel == "fsdp" else alone)
    assert len(TokenFile(data / "val.bin")) == 522 and 521 // 16 == 32, "32 windows are eleven batches"


# ---------------------------------------------------------------------------------------------- a row of losses


def scripted(monkeypatch, losses) -> None:
    """Evaluations of a run give these losses."""
    left = iter(losses)
    monkeypatch.setattr(Run, "evaluate_each", lambda self, poll: {"tiny": next(left)})


@pytest.mark.parametrize(
    "losses, ends_at",
    [
        ((3.0, 2.96, 2.92, 2.90, 2.88), 4),  # 2.92 is a gain of 0.08 on 3.0; 2.88 is none of 0.05 on 2.92
        ((3.0, 2.94, 2.90, 2.91), 3),
        ((3.0, 3.5, 2.9, 3.5, 2.8, 3.5, 2.7, 3.5, 3.5), 8),  # one without a gain between two with one
        ((3.0, 2.95, 2.95), 2),  # a gain of exactly min_delta is none
    ],
)
def test_early_stopping_counts_slow_gains_that_add_up(tiny, monkeypatch, losses, ends_at):
    scripted(monkeypatch, losses)
    code, out = tiny(early_stopping_patience=2, early_stopping_min_delta=0.05, eval_interval=1)
    assert code == 0
    (end,) = events(out, "end")
    assert (end["iter"], end["reason"]) == (ends_at, "early stop: no gain in 2 evaluations")
    assert end["best_val_loss"] == min(losses[: ends_at + 1]), "which is the best, however small the gain"
    best = [m["best_val_loss"] for m in lines(out / "metrics.jsonl") if m["kind"] == "eval"]
    assert best == [min(losses[: n + 1]) for n in range(ends_at + 1)]


def test_without_patience_there_is_no_early_stop(tiny, monkeypatch):
    scripted(monkeypatch, [3.0] * 13)
    _, out = tiny(eval_interval=1)
    assert events(out, "end")[0]["reason"] == "max_iters"


def test_a_measurement_for_the_schedule_is_no_evaluation(tiny, monkeypatch):
    """Those around an operation (2.0 and 1.9 at iteration 1) are neither the best nor a gain."""
    scripted(monkeypatch, [3.0, 2.0, 1.9, 3.1, 3.2])
    schedule = [{"name": "set_lr", "value": 1e-3, "at_iter": 1, "reevaluate": True}]
    _, out = tiny(schedule, early_stopping_patience=2, eval_interval=2)
    (end,) = events(out, "end")
    assert (end["iter"], end["best_val_loss"]) == (4, 3.0)
