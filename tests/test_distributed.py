"""Two gloo processes: equal decisions from unequal losses, no parameter that DDP misses, the same global batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, arguments, assert_same_tensors, events, lines, on_ranks, sources, tensors
from operation_examples import BEFORE, EXAMPLES, ONLY_WITH

import train_orchestrated

SCHEDULE = [
    {"name": "set_lr", "value": 5e-3, "at_iter": 1, "over": 3},
    {"name": "set_attn_lora_rank", "value": 2, "trigger_loss": 99.0, "reevaluate": True},
    {"name": "freeze_layer", "value": "mlp.0", "max_wait_iters": 1},
    {"name": "set_layer_lora_rank", "value": ["attn.*", 3], "max_wait_iters": 2},
    {"name": "set_batch_size", "value": 6, "max_wait_seconds": 0.0},
    {"name": "merge_lora_weights", "max_wait_iters": 2},
    {"name": "unfreeze_layer", "value": "mlp.0", "max_wait_iters": 1},
    {"name": "stack_layers", "value": {"n_layer": 3}, "reevaluate": True},
    {"name": "widen_embd", "value": 32, "reevaluate": True},
    {"name": "add_heads", "value": {"times": 2}, "reevaluate": True},
    {"name": "widen_mlp", "value": {"times": 2}, "reevaluate": True},
    {"name": "widen_mlp", "value": {"times": 2, "how": "random"}, "over": 2, "reevaluate": True},
]


def make_run(data: str, **keys):
    from orchestrate.training.run.distributed import Ranks
    from orchestrate.training.schedule.file import Schedule
    from orchestrate.training.session.opening import open_run
    from orchestrate.training.settings.config import TrainConfig

    config = TrainConfig(**{**TINY, "dataset": data, **keys})
    return open_run(config, None, Schedule(), Ranks("cpu", parallel=config.parallel))


def change(run, name: str, value=None) -> None:
    from orchestrate.training.operations import make

    operation = make(name, {} if value is None else {"value": value})
    if not operation.decided_on_machine:
        operation = operation.resolve(run)
    run.adopt(operation.plan(run.settings), operation.reshape)


def gradients(run) -> dict[str, np.ndarray]:
    """Gradients of one backward pass through the wrapped module; each rank has its own batch."""
    batch = run.batches.read(run.progress.cursor.skip(run.ranks.rank * 4), 4)
    (run.wrapped(batch.x, batch.y).sum / batch.targets).backward()
    found = {n: p.grad.clone().numpy() for n, p in run.model.named_parameters() if p.grad is not None}
    run.optimizer.zero_grad()
    return found


# Every change after which a module that stays wrapped would let the ranks drift apart, or fail.
CHANGES = [
    [("freeze_layer", "attn.0")],
    [("freeze_layer", ["block.0", "wte"]), ("unfreeze_layer", "block.0")],
    [("set_attn_lora_rank", 2)],
    [("set_attn_lora_rank", 2), ("set_layer_lora_rank", ["attn.1", 4])],
    [("set_attn_lora_rank", 4), ("set_layer_lora_rank", ["attn.*", 2])],
    [("set_attn_lora_rank", 2), ("merge_lora_weights", None)],
    [("set_embedding_lora_rank", 4), ("set_lora_alpha", 2.0)],
    [("stack_layers", {"n_layer": 4, "where": "interleave"})],
    [("widen_mlp", {"width": 80, "layers": ["mlp.1"]}), ("add_heads", 4)],
    [("set_attn_lora_rank", 2), ("widen_embd", 32)],
    [
        ("set_layer_lora_rank", [["attn.0.q", "attn.*.v", "mlp.0.up"], 2]),
        ("set_lora_dropout", 0.3),
        ("widen_mlp", {"times": 2}),
    ],
    [("resize_vocabulary", 40), ("untie_head", None), ("drop_layers", [0, 2])],
]


def _equal_gradients_after_changes(rank: int, data: str):
    run = make_run(data)
    found = []
    for changes in CHANGES:
        for name, value in changes:
            run.step()
            change(run, name, value)
            run.check_ranks_agree(name)
        grads = gradients(run)
        found.append(
            ({n: g for n, g in grads.items()}, [n for n, p in run.model.named_parameters() if p.requires_grad])
        )
        for name in ("merge_lora_weights", "unfreeze_layer"):  # back to the start for the next change
            if name == "unfreeze_layer" or run.settings.model.lora:
                change(run, name, "*" if name == "unfreeze_layer" else None)
    run.ranks.close()
    return found


def test_gradients_are_equal_after_every_change(data):
    one, other = on_ranks(_equal_gradients_after_changes, str(data))
    for changes, (first, trains), (second, _) in zip(CHANGES, one, other, strict=True):
        assert list(first) == list(second) == trains, changes
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{changes} {name}")
        assert any(np.abs(g).max() > 0 for g in first.values())


def _every_operation(rank: int, data: str, parallel: str):
    """Each operation of the registry on its own run; the ranks compare all bits after it and after a step."""
    from orchestrate.training.run.run import Run
    from orchestrate.training.session.start import initial_model
    from orchestrate.training.settings.records import Progress

    first = make_run(data, parallel=parallel)
    losses, prints = {}, []
    for name, value in EXAMPLES.items():
        shape = replace(first.settings.model, vocab_size=30)  # as the examples have it
        model = initial_model(first.config, shape)
        settings = replace(
            first.settings, model=shape, optimizer=ONLY_WITH.get(name, ["adamw"])[0], mixture={"first": 1.0}
        )
        run = Run(
            first.config,
            settings,
            Progress.start(settings),
            model,
            sources(Path(data)),
            first.ranks,
            first.device,
        )
        for before in BEFORE.get(name, []):
            change(run, *before)
        prints.append(run.fingerprint())
        run.step()
        change(run, name, value)
        for _ in range(2):  # the second one sees what the first did to the weights
            result = run.step()
        run.check_ranks_agree(name)
        losses[name] = float(run.ranks.sum(np.array([result.loss.item()]))[0]) / 2
    first.ranks.close()
    return losses, prints


def test_every_operation_leaves_the_ranks_equal(data):
    """And sharded over the ranks it does the same as on copies."""
    (one, other), (sharded, _) = (on_ranks(_every_operation, str(data), parallel) for parallel in ("ddp", "fsdp"))
    assert one == other and list(one[0]) == list(EXAMPLES)
    assert sharded[0] == pytest.approx(one[0], abs=1e-5)
    assert sharded[1] == one[1], "before a step the bits are the same"


def _unequal_clocks(rank: int, data: str, out: str, schedule: str):
    """Rank 1's clock runs backwards: waits in seconds must be rank 0's."""
    from orchestrate.training.session.session import Session

    tick = Session.tick

    def skewed(session):
        tick(session)
        session.run.progress.seconds -= 5.0 * rank

    Session.tick = skewed
    return train_orchestrated.main(arguments(data, out, schedule=schedule, max_iters=16))


def test_a_whole_run_with_every_kind_of_change(data, tmp_path):
    """After each operation both ranks compare the bits of all weights and moments, so an end is an agreement."""
    schedule = tmp_path / "s.json"
    schedule.write_text(json.dumps(SCHEDULE))
    assert on_ranks(_unequal_clocks, str(data), str(tmp_path / "run"), str(schedule)) == [0, 0]
    fired = events(tmp_path / "run", "operation")
    assert [e["entry"] for e in fired] == list(range(1, 13))
    for event in fired:  # the function stays under DDP as it does alone
        if event["val_loss_after"] is not None:
            assert abs(event["val_loss_after"] - event["val_loss_before"]) <= 1e-5, event["name"]


def _losses_and_decisions(rank: int, data: str):
    """Losses that differ by rank reach the orchestrator as rank 0's decision alone."""
    from orchestrate.training.schedule.file import parse_schedule
    from orchestrate.training.schedule.orchestrator import Orchestrator

    run = make_run(data)
    text = json.dumps(
        [{"name": "set_lr", "value": 1e-4, "trigger_loss": 3.0}, {"name": "set_attn_lora_rank", "value": 2}]
    )

    class Journal:
        events = []

        def event(self, kind, **fields):
            self.events.append((kind, fields.get("reason")))

    orchestrator = Orchestrator(parse_schedule(text, "s.json"), run, Journal())
    run.step()
    orchestrator.consult(2.5 + 0.1 * rank, look_at_clock=False)
    run.step()
    run.check_ranks_agree("steps")
    print_ = run.fingerprint()
    run.ranks.close()
    return print_, Journal.events, run.settings.learning_rate


def test_a_decision_is_rank_0s(data):
    one, other = on_ranks(_losses_and_decisions, str(data))
    assert one == other and ("decision", "val loss 2.5000 <= 3") in one[1]


def _drifted(rank: int, data: str):
    from orchestrate.training.settings.errors import OperationFailed, RanksDisagree

    run = make_run(data)
    run.step()
    settings = run.settings
    if rank == 1:
        with torch.no_grad():
            run.model.transformer["wte"].weight[0, 0] += 1e-6
    try:
        run.check_ranks_agree("a step")
        said = ""
    except RanksDisagree as error:
        said = str(error)
    from orchestrate.training.operations import make

    operation = make("set_attn_lora_rank", {"value": 2})

    def fails_on_rank_1(model, target, generator):
        if rank == 1:
            raise MemoryError("only here")
        return operation.reshape(model, target, generator)

    try:
        run.adopt(operation.plan(settings), fails_on_rank_1)
        failed = ""
    except OperationFailed as error:
        failed = str(error)
    assert run.settings is settings and not run.model.config.lora
    run.step()  # both ranks can go on
    run.ranks.close()
    return said, failed


def test_a_difference_is_seen_and_a_failure_on_one_rank_is_everybodys(data):
    one, other = on_ranks(_drifted, str(data))
    assert "the ranks differ after a step at iteration 1" in one[0] and one[0] == other[0]
    assert one[1] == other[1] == "rank 1: MemoryError: only here"


def _batches(rank: int, data: str):
    """(global sample index of every micro-step) -> tokens, over changes of the batch."""
    run = make_run(data, gradient_accumulation_steps=4)
    seen = []
    load = run.batches.load

    def record(cursor, count, vocab_size):
        batch = load(cursor, count, vocab_size)
        seen.append((cursor.sample, batch.x.tolist(), batch.y.tolist()))
        return batch

    run.batches.load = record
    losses = []
    for name, value in [(None, None), ("set_batch_size", 6), ("set_grad_accum", 2), ("set_dropout", 0.3)]:
        if name:
            change(run, name, value)
        for _ in range(2):
            result = run.step()
            losses.append(float(run.ranks.sum(np.array([result.loss.item()]))[0]) / run.ranks.world_size)
    weights = {n: p.detach().numpy() for n, p in run.model.named_parameters()}
    run.ranks.close()
    return seen, losses, weights


def test_one_process_and_two_see_the_same_global_batches(data):
    ((alone, losses, weights),) = on_ranks(_batches, str(data), world_size=1)
    (one, two_losses, two_weights), (other, _, _) = on_ranks(_batches, str(data))
    together = sorted(one + other)
    assert together == sorted(alone)
    firsts = [(first, len(x)) for first, x, _ in together]
    assert all(a + n == b for (a, n), (b, _) in zip(firsts, firsts[1:], strict=False)), "no gap, no repeat"
    np.testing.assert_allclose(losses, two_losses, rtol=2e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(value, two_weights[name], atol=2e-4, err_msg=name)


# ---------------------------------------------------------------------------------------------- through torchrun

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(*args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args]


@pytest.mark.timeout(600)
def test_torchrun_stopped_by_sigterm_and_resumed_is_the_run_that_never_stopped(data, tmp_path):
    schedule = tmp_path / "s.json"
    # no seconds in it: a wait by the clock is the one thing that no two runs share
    schedule.write_text(json.dumps([{k: v for k, v in e.items() if k != "max_wait_seconds"} for e in SCHEDULE]))
    script = str(ROOT / "train_orchestrated.py")
    keys = dict(schedule=schedule, max_iters=40, eval_interval=5)
    whole = torchrun(script, *arguments(data, tmp_path / "whole", **keys))
    subprocess.run(whole, env=ENVIRONMENT, cwd=ROOT, check=True, timeout=300, capture_output=True)

    job = subprocess.Popen(
        torchrun(script, *arguments(data, tmp_path / "part", **keys)), env=ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "part" / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=120)
    finally:
        job.kill()
    (signalled,) = events(tmp_path / "part", "signal")
    assert signalled["signal"] == signal.SIGTERM and 0 < signalled["iter"] < 40
    again = torchrun(script, "--init_from=resume", f"--out_dir={tmp_path / 'part'}")
    subprocess.run(again, env=ENVIRONMENT, cwd=ROOT, check=True, timeout=300, capture_output=True)
    assert_same_tensors(tensors(tmp_path / "part"), tensors(tmp_path / "whole"))
    losses = [
        [(r["kind"], r["iter"], r.get("loss"), r.get("val_loss")) for r in lines(tmp_path / name / "metrics.jsonl")]
        for name in ("part", "whole")
    ]
    assert losses[0] == losses[1]
