"""One optimizer step against a loop written by hand, and what a change of the run leaves in place for the next one."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import events, on_ranks
from test_distributed import make_run
from test_operations import apply, live_run
from torch.nn.functional import cross_entropy

from orchestrate.data.stream import Cursor, Stream
from orchestrate.model.gpt import from_weights
from orchestrate.training.operations import make
from orchestrate.training.settings.errors import OperationFailed
from orchestrate.training.settings.records import Place, Progress

RATES = [1e-2 * 1 / 3, 1e-2 * 2 / 3, 1e-2]
"""Of the first steps of test_operations.CONFIG: two iterations of warm-up, then the peak."""


def plain_loop(model, data, batch_size: int, grad_accum: int, decay: float, clip: float) -> list[float]:
    """nanoGPT's step by its description: matrices are decayed, biases and norms are not. Norms before clipping."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    stream, sample, norms = Stream(data.train, 1337), 0, []
    for lr in RATES:
        for _ in range(grad_accum):
            x, y = (torch.from_numpy(a) for a in stream.batch(Cursor(16, 16, sample), batch_size))
            sample += batch_size
            loss = cross_entropy(model.logits(x).flatten(0, 1), y.flatten())
            (loss / grad_accum).backward()
        norms.append(float(torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))))
        for p in model.parameters():
            if clip and norms[-1] > clip:
                p.grad *= clip / norms[-1]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_steps_are_those_of_a_plain_loop(data, clip):
    """Weights after three steps: the groups that are decayed, accumulation, clipping, the rates and the samples."""
    keys = dict(weight_decay=3.0, grad_clip=clip, batch_size=3, gradient_accumulation_steps=2, beta1=0.9, beta2=0.95)
    run = live_run(data, steps=0, **keys)
    model = copy.deepcopy(run.model)
    results = [run.step() for _ in RATES]
    norms = plain_loop(model, run.data, 3, 2, decay=3.0, clip=clip)
    assert [float(r.grad_norm) for r in results] == pytest.approx(norms, rel=1e-4)
    assert [r.lr for r in results] == pytest.approx(RATES, rel=1e-12) and min(norms) > 0.7
    for name, expected in model.named_parameters():
        found = run.model.get_parameter(name).detach()
        if name.endswith("c_attn.bias"):  # a key's bias has no gradient but rounding, which Adam blows up
            found, expected = (torch.cat((bias[:16], bias[32:])) for bias in (found, expected.detach()))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------- changes


def test_a_change_that_fails_moves_no_counter(data):
    """Warm-up, rewarming, samples and the vocabulary stay those of the run that goes on."""
    run = live_run(data)
    before, tokens = dataclasses.replace(run.progress), run.stream.batch(Cursor(16, 16, 40), 2)[0]
    target = dataclasses.replace(
        run.settings, lr_restarts=1, rewarms=1, rewarm_iters=5, sequence_length=8, reshapes_asked=1,
        vocabulary_map=tuple([0] * 30),
    )  # fmt: skip

    def broken(model, config, generator):
        raise RuntimeError("no")

    with pytest.raises(OperationFailed):
        run.adopt(target, broken)
    assert run.progress == before and before.cursor.sample == 24
    assert np.array_equal(run.stream.batch(Cursor(16, 16, 40), 2)[0], tokens)


def test_restarts_and_rewarmings_count_from_the_iteration_of_the_change(data):
    run = live_run(data, learning_rate=1.0, min_lr=0.0, lr_schedule="constant", warmup_iters=3)
    run.adopt(dataclasses.replace(run.settings, lr_restarts=1))
    assert (run.progress.lr_start_iter, run.progress.rewarm_start_iter) == (3, 0)
    assert [run.step().lr for _ in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    run.adopt(dataclasses.replace(run.settings, rewarms=1, rewarm_iters=2))
    assert (run.progress.lr_start_iter, run.progress.rewarm_start_iter) == (3, 7)
    assert [run.step().lr for _ in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_going_back_converts_the_place_in_the_stream_and_keeps_the_clock(data):
    """37 half windows are 18.5 windows: 19 are passed over. The clock and the samples are of now, the rest of then."""
    run = live_run(data)
    then, progress = run.settings, dataclasses.replace(run.progress)
    weights, moments = {n: p.detach().clone() for n, p in run.model.named_parameters()}, {}
    apply(run, "set_sequence_length", 8)
    assert run.progress.cursor == Cursor(16, 8, 2 * 24)
    run.step()
    run.progress.cursor, run.progress.seconds = Cursor(16, 8, 37), 12.5
    run.restore(then, progress, from_weights(then.model, weights), moments, {})
    assert run.progress == dataclasses.replace(progress, cursor=Cursor(16, 16, 19), seconds=12.5)
    assert run.settings is then and progress.iter == 3


def test_a_revert_across_lengths_converts_the_samples(tiny):
    """Three sequences an iteration: 15 at iteration 5, 30 halves of them, 39 at iteration 8, where the run goes back:
    20 windows are begun. Seven more iterations end at 41."""
    shorter = {"name": "set_sequence_length", "value": 8, "at_iter": 5}
    shorter["guard"] = {"max_increase": 0.0, "within_iters": 3, "then": "revert"}
    hurts = {"name": "set_lr", "value": 30.0, "at_iter": 6}
    _, out = tiny([shorter, hurts], batch_size=3, gradient_accumulation_steps=1, keep_last=1)
    (back,) = events(out, "rollback")
    assert (back["iter"], back["from_iter"]) == (5, 8)
    state = json.loads((out / "checkpoints" / "latest" / "state.json").read_text())
    assert state["settings"]["sequence_length"] == 16
    assert state["progress"]["cursor"] == {"block_size": 16, "length": 16, "sample": 41}


def test_the_vocabulary_map_is_read_through_from_every_door(data):
    """By an operation, by a resume, and no more after going back; training and evaluation alike."""
    run = live_run(data)
    progress, settings = dataclasses.replace(run.progress), run.settings
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}

    def tokens(run) -> tuple[list, list]:
        x, y = run.stream.batch(Cursor(16, 16, 31), 3)
        val = run.data.val
        ids = np.array(val.tokens[:20], dtype=np.int64)
        return [x.tolist(), y.tolist()], (ids if val.remap is None else val.remap[ids]).tolist()

    plain = tokens(run)
    new = [i // 2 for i in range(30)]
    apply(run, "resize_vocabulary", {"size": 15, "map": new})
    mapped = tuple((np.array(new)[np.array(part)]).tolist() for part in plain)
    assert tokens(run) == mapped != plain
    loss = run.evaluate(lambda: 0)
    model = from_weights(run.settings.model, {n: p.detach().clone() for n, p in run.model.named_parameters()})
    again = type(run)(
        run.config,
        run.settings,
        Progress.start(run.settings),
        model,
        run.batches.opened,
        run.ranks,
        run.device,
        run.optimizer.state_by_name(),
    )
    assert tokens(again) == mapped
    assert again.evaluate(lambda: 0) == loss
    again.restore(settings, progress, from_weights(settings.model, weights), {}, {})
    assert tokens(again) == plain and again.batches.opened.first.train.remap is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("set_batch_size", 3),
        ("set_sequence_length", 4),
        ("extend_context", 32),
        ("resize_vocabulary", {"size": 15, "map": [i // 2 for i in range(30)]}),
    ],
)
def test_what_was_fetched_ahead_is_used_only_where_it_is_what_the_step_asks_for(data, name, value):
    """As on CUDA, where a step fetches the next one's first batch: whatever differs from then makes it unused."""
    run = live_run(data, steps=0)
    apply(run, "set_sequence_length", 8)

    def asked_for(cursor: Cursor, count: int) -> None:
        wanted = run.stream.batch(cursor, count)
        assert all(np.array_equal(a, b) for a, b in zip(run.batches.read(cursor, count)[:2], wanted, strict=True))

    run.batches.prefetch(Cursor(16, 8, 8), 4)
    asked_for(Cursor(16, 8, 9), 4)
    asked_for(Cursor(16, 8, 8), 4)
    run.batches.prefetch(run.progress.cursor, 4)
    apply(run, name, value)
    assert run.progress.cursor.sample == 0
    asked_for(run.progress.cursor, run.settings.batch_size)


# ---------------------------------------------------------------------------------------------- two processes


def _spike(rank: int, data: str, out: str):
    """A healthy step, then one in which rank 1's loss alone is a thousand times too high."""
    run = make_run(data, inject="spike@1:rank1", spike_sigma=6.0, out_dir=out)
    p = run.progress
    p.losses_seen, p.loss_mean, p.loss_variance = 50, 3.0, 0.04
    loss = float(run.step().loss)
    mean, variance = p.loss_mean, p.loss_variance
    told = run.ranks.gather((loss, mean, variance))
    if told[0][1:] != told[1][1:]:  # what follows would wait for a rank that sees no spike
        return told, None, None
    weights = {n: w.detach().clone() for n, w in run.model.named_parameters()}
    result = run.step()
    same = all(torch.equal(w, weights[n]) for n, w in run.model.named_parameters())
    after = (p.loss_mean, p.losses_seen)
    run.ranks.close()
    return told, (result.sick.cause, result.sick.at), (same, after == (mean, 51))


def test_a_spike_on_one_rank_is_a_spike_of_the_mean(data, tmp_path):
    one, other = on_ranks(_spike, str(data), str(tmp_path), seconds=60)
    assert one == other
    told, result, untouched = one
    (first, mean, variance), (second, _, _) = told
    distance = (first + second) / 2 - 3.0  # the 51st loss weighs 1/51
    assert first != second and mean == pytest.approx(3.0 + distance / 51, abs=1e-9)
    assert variance == pytest.approx(50 / 51 * (0.04 + distance**2 / 51), abs=1e-9)
    assert result == ("spike", Place(1, Cursor(16, 16, 8), 128)) and untouched == (True, True)


def _exchanges(rank: int, data: str):
    """How often DDP exchanges gradients in two steps of three micro-steps on each rank, and in how many buckets."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    run = make_run(data, gradient_accumulation_steps=6)
    buckets = []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

    run.wrapped.register_comm_hook(None, hook)
    for _ in range(2):
        run.step()
    run.check_ranks_agree("two steps")
    run.ranks.close()
    return buckets


def test_gradients_are_exchanged_once_a_step(data):
    one, other = on_ranks(_exchanges, str(data))
    assert one == other and len(one) == 2 * len(set(one))


def _flags(rank: int, data: str):
    run = make_run(data)
    agreed = [run.ranks.exchange_later(flag) for flag in ([0, 15, 0], [0, 2, 10])[rank]]
    agreed.append(run.ranks.exchange_later(0))
    run.ranks.close()
    return agreed


def test_ranks_agree_on_the_largest_flag_one_call_later(data):
    """Signals 15 and 2 at once are 15, not 17."""
    assert on_ranks(_flags, str(data)) == [[0, 0, 15, 10]] * 2


def test_seeds_are_made_of_the_run_the_iteration_and_a_number(data, monkeypatch):
    """Of each micro-step's dropout and of fresh values: by hand, so that a checkpoint goes on as it would have."""

    def by_hand(n: int) -> int:
        return int(np.random.SeedSequence([1337, 3, n]).generate_state(1, np.uint64)[0]) >> 1

    run, seeds, generators = live_run(data, dropout=0.1), [], []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    run.step()
    assert seeds == [by_hand(0), by_hand(1)]
    run.progress.iter = 3
    operation = make("set_attn_lora_rank", {"value": 2})

    def reshape(model, target, generator):
        generators.append(generator.initial_seed())
        return operation.reshape(model, target, generator)

    run.adopt(operation.plan(run.settings), reshape)
    assert generators == [by_hand(1)]


def test_one_process_compares_itself_with_nobody(data, monkeypatch):
    """Reading every weight for it would make a change of the learning rate cost as much as a step."""

    def read():
        raise AssertionError("the weights were read")

    run = make_run(str(data))
    monkeypatch.setattr(run, "fingerprint", read)
    run.check_ranks_agree("an entry")
