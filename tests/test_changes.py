"""A change is all or nothing: a fault at any step of it leaves the run as it was, and the next step is the same."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import on_ranks
from test_operations import apply, live_run, logits

from orchestrate.model.gpt import GPT
from orchestrate.training.operations import make
from orchestrate.training.run import changes
from orchestrate.training.run.batches import Batches
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.settings.errors import OperationFailed

# Every call that a change makes and that can raise: (object, name).
STEPS = [
    (changes, "carry"),
    (changes, "make_optimizer"),
    (changes, "trainable_parameters"),
    (changes, "set_dropout"),
    (changes, "compile_blocks"),
    (Batches, "following"),
    (Ranks, "whole"),
    (Ranks, "place"),
    (Ranks, "place_state"),
    (Ranks, "wrap"),
    (GPT, "set_fading"),
]
VALUES = {
    "set_dropout": 0.3,
    "freeze_layer": ["attn.0", "ln_f"],
    "set_attn_lora_rank": 2,
    "stack_layers": {"n_layer": 3},
    "resize_vocabulary": {"size": 28, "map": [i % 28 for i in range(30)]},
    "reset_moments": "mlp.0",
}


def broken(real, at: int, after: bool):
    """`real`, which raises at its `at`-th call, before or after its work."""
    calls = iter(range(10**6))

    def call(*args, **keys):
        if next(calls) != at:
            return real(*args, **keys)
        if after:
            real(*args, **keys)
        raise MemoryError("injected")

    return call


def snapshot(run) -> tuple:
    flags = {name: p.requires_grad for name, p in run.model.named_parameters()}
    objects = [id(x) for x in (run.model, run.optimizer, run.batches)]
    dropout = (run.model.transformer["drop"].active, float(run.model.transformer["drop"].keep))
    return run.fingerprint(), flags, objects, dropout, dataclasses.astuple(run.progress), run.model.config


@pytest.mark.parametrize("name", VALUES)
def test_a_fault_at_each_step_of_a_change(data, name, monkeypatch):
    run, twin = live_run(data), live_run(data)
    before, struck = snapshot(run), 0
    for owner, attribute in STEPS:
        real = getattr(owner, attribute)
        for after in (False, True):
            for at in (0, 1):
                monkeypatch.setattr(owner, attribute, broken(real, at, after))
                target = make(name, {"value": VALUES[name]})
                try:
                    run.adopt(target.plan(run.settings), target.reshape)
                except OperationFailed as error:
                    assert "MemoryError: injected" in str(error)
                    struck += 1
                    assert snapshot(run) == before, (attribute, at, after)
                    monkeypatch.setattr(owner, attribute, real)
                else:  # this change does not call it so often
                    monkeypatch.setattr(owner, attribute, real)
                    run = live_run(data)
                    before = snapshot(run)
    assert struck, "at least one fault must have struck"
    for each in (run, twin):
        each.step()
        apply(each, name, VALUES[name])
        each.step()
    assert run.fingerprint() == twin.fingerprint()


def test_a_fault_while_going_back_leaves_the_run(data, monkeypatch):
    run, earlier = live_run(data, steps=4), live_run(data, steps=2)
    before = snapshot(run)
    monkeypatch.setattr(Ranks, "wrap", broken(Ranks.wrap, 0, after=True))
    state = (earlier.settings, earlier.progress, earlier.model, earlier.optimizer.state_by_name(), {})
    with pytest.raises(OperationFailed, match="injected"):
        run.restore(*state)
    assert snapshot(run) == before
    run.restore(*state)
    assert run.progress.iter == 2 and run.progress.cursor.sample == 4 * 8
    assert torch.equal(run.model.get_parameter("transformer.wte.weight"), earlier.model.transformer["wte"].weight)


def test_what_a_change_fades_in_is_faded_in(data):
    """The model that takes over shows what its settings say: at a share of 0 the function of the model before."""
    run = live_run(data)
    before = logits(run)
    stack = make("stack_layers", {"value": {"times": 2, "how": "copy"}})
    target = stack.fade(run.settings, stack.plan(run.settings))
    run.adopt(target, partial(stack.reshape, masked=True))
    assert run.settings.fading and run.model.fading == run.settings.fading and run.model.training
    torch.testing.assert_close(logits(run), before, atol=1e-6, rtol=1e-5)
    run.adopt(replace(run.settings, fading={}))
    assert run.model.fading == {} and (logits(run) - before).abs().max() > 1e-4


def _fault_on_one_rank(rank: int, data: str, attribute: str, name: str):
    from test_distributed import make_run

    run = make_run(data)
    run.step()
    print_before, real = run.fingerprint(), getattr(Ranks, attribute)
    if rank == 1:
        setattr(Ranks, attribute, broken(real, 0, after=True))
    operation = make(name, {"value": VALUES[name]})
    failed = ""
    try:
        run.adopt(operation.plan(run.settings), operation.reshape)
    except OperationFailed as error:
        failed = str(error)
    setattr(Ranks, attribute, real)
    same = run.fingerprint() == print_before
    run.step()
    run.check_ranks_agree("a step after the fault")
    final = run.fingerprint()
    run.ranks.close()
    return failed, same, final


@pytest.mark.parametrize("attribute, name", [("wrap", "freeze_layer"), ("place", "set_attn_lora_rank")])
def test_a_fault_on_one_rank_is_taken_back_on_both(data, attribute, name):
    one, other = on_ranks(_fault_on_one_rank, str(data), attribute, name)
    assert one[0] == other[0] == "rank 1: MemoryError: injected"
    assert one[1] and other[1] and one[2] == other[2]
