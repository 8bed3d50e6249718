"""What saves memory: it does, and changes nothing else. Activation checkpointing; frozen weights in bfloat16."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, events, lines, on_ranks
from test_distributed import change, gradients, make_run
from test_model import GPT2, QK_NORM, tokens, trained
from test_operations import apply, live_run
from torch._dynamo.testing import CompileCounterWithBackend

from orchestrate.model.config import LoraSpec
from orchestrate.model.gpt import GPT, compile_blocks, set_dropout
from orchestrate.training.plan import activation_bytes

ADAPTED = replace(GPT2, lora={"attn.0": LoraSpec(2, 4.0), "mlp.1": LoraSpec(3, 4.0)})
STYLES = {"gpt2": GPT2, "qk_norm": QK_NORM, "adapters": ADAPTED}

sys.path.append(str(ROOT / "bench"))
from memory import Live  # noqa: E402


def backward(model: GPT, batch: int = 3) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, with the same dropout at every call."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(tokens(batch), tokens(batch).flip(1)).sum
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict], other: tuple[float, dict]) -> None:
    assert one[0] == other[0] and list(one[1]) == list(other[1]) != []
    assert not [name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("style", STYLES)
def test_checkpointing_changes_no_bit(style, dropout):
    model = trained(STYLES[style]).train()
    set_dropout(model, dropout)
    kept = backward(model)
    if dropout:
        set_dropout(model, 0.0)
        assert backward(model)[0] != kept[0]
        set_dropout(model, dropout)
    model.checkpointing = True
    assert_same(backward(model), kept)


def test_checkpointing_keeps_only_the_inputs_of_blocks():
    """Bytes in use when the forward pass ends, by hand: with it one (batch, time, n_embd) a block, and no inside."""
    kept = {}
    for n_layer in (2, 6):
        for again in (False, True):
            model = trained(replace(GPT2, n_layer=n_layer, n_hidden=128)).train()
            model.checkpointing = again
            with Live() as live:
                loss = model(tokens(), tokens()).sum
            assert loss.grad_fn is not None
            kept[n_layer, again] = live.now
            del loss
    stream = 3 * 16 * 32 * 4
    assert kept[6, True] - kept[2, True] == 4 * stream
    inside = (kept[6, False] - kept[2, False]) / 4
    assert inside > 10 * stream
    with torch.no_grad(), Live() as live:
        model(tokens(), tokens())
    assert live.now == 0, "an evaluation keeps nothing"


def test_the_plan_follows_what_is_kept(data):
    settings = live_run(data, steps=0).settings
    again = replace(settings, activation_checkpointing=True)
    deeper = replace(settings.model, n_layer=5, n_hidden=(64, 64, 64, 64, 96))
    block = 4 * (4 * 16 + 3 * 16 + 2 * 16 + 2 * 64)
    ends = 4 * 2 * 16 + 12 * 30
    assert activation_bytes(settings, 4) == 64 * (2 * block + ends)
    assert activation_bytes(again, 4) == 64 * (2 * 4 * 16 + block + ends)
    inside = 4 * (4 * 16 + 3 * 16 + 2 * 16 + 2 * 96)
    assert activation_bytes(replace(again, model=deeper), 4) == 64 * (5 * 4 * 16 + inside + ends)


def test_adapters_of_the_first_block_get_gradients(data):
    """Nothing before the first block trains there: reentrant checkpointing would give it no gradient at all."""
    run = live_run(data, steps=0, dropout=0.1)
    apply(run, "set_attn_lora_rank", 2)
    apply(run, "freeze_layer", ["wte", "wpe", "ln_*", "mlp.*"])
    plain = gradients(run)
    apply(run, "set_activation_checkpointing", True)
    assert run.model.checkpointing
    torch.manual_seed(0)
    found = gradients(run)
    factors = [f"transformer.h.{n}.attn.{m}.lora_B.default.weight" for n in (0, 1) for m in ("c_attn", "c_proj")]
    assert set(factors) <= set(found) == set(plain)
    assert all(abs(found[name]).max() > 0 for name in factors)


def test_compiled_blocks_stay_compiled():
    """Switching recompiles nothing and breaks no graph; losses and gradients are those without it, with dropout too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("eager")
    model = trained(ADAPTED).train()
    compile_blocks(model, backend=counter)
    kept, wide = backward(model), backward(model, 5)
    graphs = counter.frame_count
    model.checkpointing = True
    assert_same(backward(model), kept)
    assert_same(backward(model, 5), wide)
    assert counter.frame_count == graphs and not torch._dynamo.utils.counters["graph_break"]
    set_dropout(model, 0.2)
    dropped, graphs = backward(model), counter.frame_count
    model.checkpointing = False
    assert_same(backward(model), dropped)
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_checkpointing_under_the_real_compiler():
    torch._dynamo.reset()
    model = trained(QK_NORM).train()
    set_dropout(model, 0.2)
    compile_blocks(model)
    kept = backward(model)
    model.checkpointing = True
    assert_same(backward(model), kept)
    torch._dynamo.reset()


def test_a_schedule_switches_it_and_a_resume_may(tiny, resume):
    """With dropout, adapters and memory that runs out on the way: the curve of a run that never switches."""
    keys = dict(dropout=0.1, attn_lora_rank=2, inject="oom@3")
    other, plain = tiny(out="plain", **keys)
    switch = [{"name": "set_activation_checkpointing", "value": on, "max_wait_iters": 2} for on in (False, True)]
    code, out = tiny(switch, max_iters=8, activation_checkpointing=True, **keys)
    assert (code, other) == (0, 0)
    found = [event for event in events(out, "operation") if event["entry"]]
    assert [event["settings_after"] for event in found] == [{"activation_checkpointing": on} for on in (False, True)]
    assert events(out, "operation")[1]["reason"].startswith("out of memory")
    assert resume(out, max_iters=12, activation_checkpointing=False) == 0
    (override,) = [event for event in events(out, "override") if event["key"] == "activation_checkpointing"]
    assert (override["before"], override["after"], override["applied"]) == (True, False, True)
    curves = [
        [(m["iter"], m["loss"]) for m in lines(o / "metrics.jsonl") if m["kind"] == "train"] for o in (out, plain)
    ]
    assert curves[0] == curves[1] and len(curves[0]) >= 11


def _fingerprints(rank: int, data: str, parallel: str) -> list[str]:
    """Of weights and moments after some steps with dropout and adapters: without checkpointing, and with it."""
    found = []
    for again in (False, True):
        if found:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        run = make_run(data, parallel=parallel, dropout=0.1, gradient_accumulation_steps=4)
        change(run, "set_activation_checkpointing", again)
        run.step()
        change(run, "set_attn_lora_rank", 2)
        change(run, "freeze_layer", ["wte", "wpe", "ln_1.0"])
        run.step()
        run.step()
        run.check_ranks_agree("the steps")
        assert run.model.checkpointing == again
        run.settings = replace(run.settings, activation_checkpointing=False)
        found.append(run.fingerprint())
        run.ranks.close()
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_checkpointing_on_several_ranks_changes_no_bit(data, parallel):
    for plain, again in on_ranks(_fingerprints, str(data), parallel):
        assert plain == again
