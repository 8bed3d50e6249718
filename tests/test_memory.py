"""What saves memory: it does, and changes nothing else. Activation checkpointing; frozen weights in bfloat16."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, arguments, assert_same_tensors, events, lines, on_ranks, tensors
from test_distributed import change, gradients, make_run
from test_model import GPT2, QK_NORM, tokens, trained
from test_operations import apply, live_run, logits
from test_sharded import _runs, losses
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

import train_orchestrated
from orchestrate.model import peft_folder
from orchestrate.model.config import LoraSpec
from orchestrate.model.gpt import GPT, Cache, compile_blocks, set_dropout
from orchestrate.model.lora import trainable_parameters
from orchestrate.model.narrow import linear
from orchestrate.training import plan
from orchestrate.training.operations import make
from orchestrate.training.plan import activation_bytes
from orchestrate.training.run.casting import kept
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.session.opening import open_run
from orchestrate.training.session.start import opened
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint

ADAPTED = replace(GPT2, lora={"attn.0": LoraSpec(2, 4.0), "mlp.1": LoraSpec(3, 4.0)})
STYLES = {"gpt2": GPT2, "qk_norm": QK_NORM, "adapters": ADAPTED}

sys.path.append(str(ROOT / "bench"))
from memory import Live, held  # noqa: E402


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


# ---------------------------------------------------------------------------------------------- weights_dtype


LORA = dict(attn_lora_rank=2, mlp_lora_rank=3, frozen_layers="wte,wpe,ln_*", weights_dtype="bfloat16")
BASE = "transformer.h.0.attn.c_attn"


def lora_run(data, **keys):
    """A run with adapters on every matrix of the blocks, opened as a start opens it; frozen weights in bfloat16."""
    return make_run(str(data), **{**LORA, **keys})


def types(run) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in run.model.named_parameters()}


def test_frozen_matrices_are_bfloat16_and_nothing_frozen_has_slots_or_gradients(data):
    """Bytes by hand: 2 a weight of what is frozen, 4 for vectors and what trains, 8 and a count of steps for slots."""
    run = lora_run(data, bias=True)
    run.step()
    blocks = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    vocabulary = run.settings.model.vocab_size
    vectors = 2 * (48 + 16 + 64 + 16) + 2 * 4 * 16 + 2 * 16
    factors = 2 * (2 * (16 + 48) + 2 * (16 + 16) + 2 * 3 * (16 + 64))
    assert run.parameter_counts() == (blocks + (vocabulary + 16) * 16 + vectors + factors, factors)
    assert held(run) == (2 * (blocks + (vocabulary + 16) * 16) + 4 * (vectors + factors), 8 * factors + 4 * 16)
    assert {name for name in run.optimizer.state_by_name()} == {n for n in types(run) if "lora_" in n}
    batch = run.batches.read(run.progress.cursor, 4)
    run.wrapped(batch.x, batch.y).sum.backward()
    with_gradients = {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert with_gradients == {n for n in types(run) if "lora_" in n}


def test_rounding_is_measured_and_told(data):
    """At a start, when a layer is frozen, and when it trains again, which is exact."""
    plain = make_run(str(data), seed=4)
    weights = {n: p.detach().clone() for n, p in plain.model.named_parameters()}
    rounded = lora_run(data, seed=4, attn_lora_rank=0, mlp_lora_rank=0)
    frozen = ["transformer.wte.weight", "transformer.wpe.weight"]
    count = sum(weights[n].numel() for n in frozen)
    squares = sum((weights[n] - weights[n].bfloat16().float()).square().sum() for n in frozen)
    error = float((squares / sum(weights[n].square().sum() for n in frozen)).sqrt())
    assert rounded.cast.rounded == count and rounded.cast.widened == 0 and 1e-3 < error < 3e-3
    assert rounded.cast.error == pytest.approx(error, rel=1e-4)
    assert not plain.cast and types(plain)["transformer.wte.weight"] == torch.float32
    for name, p in rounded.model.named_parameters():
        expected = weights[name].bfloat16() if name in frozen else weights[name]
        assert p.dtype == expected.dtype and torch.equal(p, expected)
    before = logits(rounded)
    freeze, thaw = (make(n, {"value": "wte"}) for n in ("freeze_layer", "unfreeze_layer"))
    cast = rounded.adopt(thaw.plan(rounded.settings))
    assert (cast.rounded, cast.error, cast.widened) == (0, 0.0, weights[frozen[0]].numel())
    assert torch.equal(logits(rounded), before)
    cast = rounded.adopt(freeze.plan(rounded.settings))
    assert (cast.rounded, cast.error, cast.widened) == (weights[frozen[0]].numel(), 0.0, 0), "they have not trained"
    assert not rounded.adopt(replace(rounded.settings, frozen=("wpe", "wte", "ln_f")[::-1])), "vectors stay float32"


@pytest.mark.parametrize("style", ["gpt2", "qk_norm", "tied_adapter"])
def test_it_computes_what_float32_computes_with_those_numbers(style):
    """Values that bfloat16 has: the same losses and gradients but for the order of sums, and the same generation."""
    config = {"gpt2": GPT2, "qk_norm": QK_NORM, "tied_adapter": replace(GPT2, lora={"wte": LoraSpec(2, 4.0)})}[style]
    config = replace(config, lora=config.lora | {"attn.0": LoraSpec(2, 4.0), "mlp.1": LoraSpec(3, 4.0)})
    model = trained(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    frozen = ["attn.1", "wte", "ln_f"] + ([] if config.tie_weights else ["lm_head"])
    trains = trainable_parameters(model, frozen)
    narrow, cast = kept(model, trains, "bfloat16")
    assert cast.rounded > 2000 and cast.error == 0.0
    assert next(model.parameters()).dtype == torch.float32, "the model that is given stays as it is"
    for name, p in (*model.named_parameters(), *narrow.named_parameters()):
        p.requires_grad = name in trains
    (loss, grads), (other, others) = backward(model), backward(narrow.train())
    assert other == pytest.approx(loss, rel=1e-6) and set(grads) == set(others) == trains
    for name, grad in grads.items():
        assert others[name].dtype == torch.float32
        torch.testing.assert_close(others[name], grad, atol=1e-5, rtol=1e-4)
    prompt = tokens(2, 3)
    cached = narrow.extend(prompt, [3, 3], Cache(config, 2, 3))
    torch.testing.assert_close(cached, narrow.logits(prompt)[:, -1], atol=1e-5, rtol=1e-5)


def test_no_longer_copy_of_a_frozen_weight_waits_for_the_backward_pass():
    model = trained(replace(GPT2, lora={f"{kind}.{n}": LoraSpec(2, 4.0) for kind in ("attn", "mlp") for n in (0, 1)}))
    narrow, _ = kept(model, trainable_parameters(model, ()), "bfloat16")
    kept_bytes = []
    for one in (model, narrow):
        trains = trainable_parameters(one, ("wte", "wpe"))
        for name, p in one.named_parameters():
            p.requires_grad = name in trains
        with Live() as live:
            loss = one(tokens(), tokens()).sum
        assert loss.requires_grad
        kept_bytes.append(live.now)
    assert kept_bytes[1] <= kept_bytes[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_under_autocast_it_learns_as_float32_does(data, dtype):
    runs = [lora_run(data, learning_rate=0.03, dtype=d) for d in ("float32", dtype)]
    losses = [[run.step().loss.item() for _ in range(12)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1][-1] < losses[1][0] - 0.05
    assert types(runs[0]) == types(runs[1])


def test_compiled_blocks_compute_with_them_without_a_break():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("eager")
    model = trained(ADAPTED)
    narrow, _ = kept(model, trainable_parameters(model, ["wte"]), "bfloat16")
    for name, p in narrow.named_parameters():
        p.requires_grad = name in trainable_parameters(model, ["wte"])
    plain = backward(narrow)
    compile_blocks(narrow, backend=counter)
    compiled = backward(narrow)
    assert counter.frame_count == 4 and not torch._dynamo.utils.counters["graph_break"]
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6) and set(compiled[1]) == set(plain[1])
    torch._dynamo.reset()


def test_merging_makes_the_product_part_of_a_float32_weight(data):
    """Nothing of it is rounded where the layer trains then; a rank that shrinks leaves a frozen base, and says so."""
    run = lora_run(data)
    for _ in range(3):
        run.step()
    parameters = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    left, right = (parameters[f"{BASE}.lora_{x}.default.weight"].double() for x in "BA")
    product = 8.0 / 2 * left @ right
    base = parameters[f"{BASE}.base_layer.weight"]
    assert base.dtype == torch.bfloat16 and product.abs().max() > 1e-4
    cast = adopted(run, "merge_lora_weights", "attn.0")
    merged = run.model.get_parameter(f"{BASE}.weight")
    assert merged.dtype == torch.float32 and merged.requires_grad
    torch.testing.assert_close(merged.detach(), (base.double() + product).float(), atol=0, rtol=0)
    assert cast.rounded == cast.widened == 0, "it was made in float32"
    run.step()
    cast = adopted(run, "set_layer_lora_rank", ["mlp.1", 1])
    assert cast.rounded == 2 * 16 * 64 and 0 < cast.error < 3e-3
    assert types(run)["transformer.h.1.mlp.c_fc.base_layer.weight"] == torch.bfloat16
    assert types(run)["transformer.h.1.mlp.c_fc.lora_A.default.weight"] == torch.float32
    before = logits(run)
    adopted(run, "set_layer_lora_rank", ["mlp.1", 4])
    torch.testing.assert_close(logits(run), before, atol=1e-5, rtol=0)
    cast = adopted(run, "set_layer_lora_rank", ["attn.0", 2])
    assert cast.rounded == 16 * 48 + 16 * 16, "a base under a new adapter is rounded"


def adopted(run, name: str, value):
    """What changed its type when an operation was carried out."""
    operation = make(name, {} if value is None else {"value": value})
    return run.adopt(operation.plan(run.settings), operation.reshape)


GROWTHS = [
    ("stack_layers", {"n_layer": 4, "how": "identity", "where": "interleave"}, 1e-6),
    ("stack_layers", {"n_layer": 3, "how": "copy"}, None),
    ("widen_mlp", {"width": 96}, 0.03),
    ("widen_embd", 32, 0.03),
    ("add_heads", 4, 0.03),
    ("resize_vocabulary", {"size": 40, "init": "mean", "noise": 0.1}, None),
    ("untie_head", None, 1e-6),
    ("drop_layers", [0], None),
]


@pytest.mark.parametrize("name, value, tolerance", GROWTHS)
def test_growth_rounds_once_and_keeps_frozen_matrices_short(data, name, value, tolerance):
    run = live_run(data, model={"bias": True}, weights_dtype="bfloat16")
    apply(run, "freeze_layer", ["block.0", "wte"])
    apply(run, "set_layer_lora_rank", [["attn.1"], 2])
    run.step()
    before, function = types(run), logits(run)
    operation = make(name, {} if value is None else {"value": value})
    wide, target = kept(run.model, set(), "float32")[0], operation.plan(run.settings)
    expected, _ = operation.reshape(wide, target.model, torch.Generator().manual_seed(run.seed(1)))
    run.adopt(target, operation.reshape)
    for n, p in run.model.named_parameters():
        assert torch.equal(p, expected.get_parameter(n).to(p.dtype)), n
    trains = trainable_parameters(run.model, run.settings.frozen)
    for n, p in run.model.named_parameters():
        short = n not in trains and p.dim() >= 2
        assert p.dtype == (torch.bfloat16 if short else torch.float32), n
    assert torch.bfloat16 in types(run).values() and torch.bfloat16 in before.values()
    if tolerance:
        torch.testing.assert_close(logits(run)[..., :30], function, atol=tolerance, rtol=0)
    run.step()
    run.check_ranks_agree("a step")


def test_a_resume_goes_on_to_the_bit_and_may_change_the_type(tiny, resume, capsys):
    schedule = [
        {"name": "freeze_layer", "value": "mlp.0", "at_iter": 3},
        {"name": "set_layer_lora_rank", "value": ["attn.*", 1], "at_iter": 6},
        {"name": "unfreeze_layer", "value": "mlp.0", "at_iter": 10},
    ]
    keys = {**LORA, "mlp_lora_rank": 0}
    assert tiny(schedule, out="whole", **keys)[0] == tiny(schedule, max_iters=7, out="parts", **keys)[0] == 0
    whole, parts = (tiny.folder(name) for name in ("whole", "parts"))
    found = tensors(parts)
    assert found["transformer.h.0.mlp.c_fc.weight"].dtype == torch.bfloat16
    assert found["transformer.h.0.mlp.c_fc.weight|exp_avg"].dtype == torch.float32
    assert found[f"{BASE}.lora_A.default.weight"].dtype == torch.float32
    assert resume(parts, max_iters=12) == 0
    assert_same_tensors(tensors(parts), tensors(whole))
    casts = [event.get("cast") for event in events(parts, "operation")]
    matrices = 2 * 16 * 64
    assert casts[0]["rounded"] == matrices and 1e-3 < casts[0]["error"] < 3e-3
    assert casts[1]["rounded"] == 2 * (16 * 48 + 16 * 16), "what is cut off an adapter is folded into its base"
    assert casts[2] == {"rounded": 0, "error": 0.0, "widened": matrices}
    (start,) = events(whole, "start")
    assert start["cast"]["rounded"] > 1000
    told = capsys.readouterr().out
    assert "2,048 frozen weights rounded to bfloat16, by " in told and "2,048 weights float32 again, as they w" in told
    assert resume(parts, max_iters=14, weights_dtype="float32") == 0
    assert {value.dtype for value in tensors(parts).values()} == {torch.float32}
    assert events(parts, "resume")[-1]["cast"]["rounded"] == 0 < events(parts, "resume")[-1]["cast"]["widened"]
    with pytest.raises(Refused, match=r"frozen_layers cannot change on resume .* freeze_layer and unfreeze_layer"):
        resume(parts, frozen_layers="wte")


def test_the_plan_knows_the_bytes(data, tmp_path):
    """Of weights and gradients, exactly those of a run; and that a rounding changes the function."""
    steps = [("freeze_layer", "mlp.0"), ("set_weights_dtype", "float32"), ("set_weights_dtype", "bfloat16"),
             ("merge_lora_weights", None), ("stack_layers", {"n_layer": 3, "how": "copy"}),
             ("unfreeze_layer", "*")]  # fmt: skip
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"name": n, "value": v} if v is not None else {"name": n} for n, v in steps]))
    keys = {**LORA, "mlp_lora_rank": 0}
    config = TrainConfig(**{**TINY, **keys, "dataset": str(data), "schedule": str(path)})
    rows = plan.make(config, {}, 1).rows
    run = make_run(str(data), **keys)
    for row, (name, value) in zip(rows, [(None, None), *steps], strict=True):
        if name:
            apply(run, name, value)
        weights = sum(p.nbytes for p in run.model.parameters())
        assert row.model_bytes == weights + sum(p.nbytes for p in run.optimizer.parameters), name
    assert [row.keeps_function for row in rows] == [None, False, True, False, True, False, True]


def test_the_plan_says_where_a_change_of_shape_rounds(data, tmp_path):
    steps = [("set_attn_lora_rank", 2), ("set_layer_lora_rank", ["attn.0", 1]), ("freeze_layer", "mlp.1"),
             ("widen_mlp", {"times": 2}), ("set_lora_alpha", 3.0), ("stack_layers", {"times": 2}),
             ("untie_head", None)]  # fmt: skip
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"name": n, "value": v} if v is not None else {"name": n} for n, v in steps]))
    config = TrainConfig(**{**TINY, "weights_dtype": "bfloat16", "dataset": str(data), "schedule": str(path)})
    run = make_run(str(data), weights_dtype="bfloat16")
    for row, (name, value) in zip(plan.make(config, {}, 1).rows[1:], steps, strict=True):
        cast = adopted(run, name, value)
        assert row.keeps_function == (not cast.rounded), name
    assert [bool(row.keeps_function) for row in plan.make(config, {}, 1).rows[1:]] == [False] * 4 + [True] * 3
    # Where all trains, the type of what rests changes nothing yet.
    path.write_text(json.dumps([{"name": "set_weights_dtype", "value": "bfloat16"},
                                {"name": "freeze_layer", "value": "mlp.1"}]))  # fmt: skip
    config = TrainConfig(**{**TINY, "dataset": str(data), "schedule": str(path)})
    assert [row.keeps_function for row in plan.make(config, {}, 1).rows] == [None, True, False]


@pytest.mark.parametrize("frozen", ["wte,attn.7", "wte,", "block"])
def test_layers_that_are_not_there_cannot_be_frozen(data, frozen):
    with pytest.raises(Refused, match="frozen_layers: no layer is called"):
        make_run(str(data), frozen_layers=frozen)


def test_something_must_train(data):
    with pytest.raises(Refused, match="nothing would be left to train"):
        make_run(str(data), frozen_layers="*")


RANKS_SCHEDULE = [
    {"name": "freeze_layer", "value": ["block.0", "wte"], "at_iter": 2},
    {"name": "set_attn_lora_rank", "value": 3, "max_wait_iters": 2, "reevaluate": True},
    {"name": "stack_layers", "value": {"times": 2}, "max_wait_iters": 1, "reevaluate": True},
    {"name": "unfreeze_layer", "value": "mlp.0", "max_wait_iters": 2, "reevaluate": True},
    {"name": "merge_lora_weights", "max_wait_iters": 2, "reevaluate": True},
]


def test_on_several_ranks_copies_and_shards_follow_the_same_curve(data, tmp_path):
    """DDP and FSDP2 on two processes, and each resumes the other's checkpoint; the types are those of one process."""
    path = tmp_path / "s.json"
    path.write_text(json.dumps(RANKS_SCHEDULE))
    keys = dict(gradient_accumulation_steps=6, weights_dtype="bfloat16", schedule=path, learning_rate=3e-3)
    outs = {parallel: tmp_path / parallel for parallel in ("ddp", "fsdp")}
    commands = [arguments(data, out, parallel=parallel, **keys) for parallel, out in outs.items()]
    again = {"ddp": "fsdp", "fsdp": "ddp"}
    commands += [
        ["--init_from=resume", f"--out_dir={outs[of]}", f"--parallel={to}", "--max_iters=14"]
        for of, to in again.items()
    ]
    # An override where weights are sharded: back and forth, and it is told.
    commands += [
        ["--init_from=resume", f"--out_dir={outs['ddp']}", f"--weights_dtype={dtype}", f"--max_iters={until}"]
        for dtype, until in (("float32", 15), ("bfloat16", 16))
    ]
    assert on_ranks(_runs, commands) == [[0] * 6] * 2
    assert train_orchestrated.main(arguments(data, tmp_path / "one", **keys)) == 0
    curves = {name: losses(out) for name, out in {**outs, "one": tmp_path / "one"}.items()}
    for name in outs:
        last = [line for line in curves[name] if line[1] <= 12][: len(curves["one"])]
        assert [line[:3] for line in last] == [line[:3] for line in curves["one"]]
        assert [line[3] for line in last] == pytest.approx([line[3] for line in curves["one"]], abs=2e-3)
    final = [checkpoint.load(outs[name] / "checkpoints" / "latest") for name in outs]
    one = checkpoint.load(tmp_path / "one" / "checkpoints" / "latest").model
    for loaded in final:  # of shards, and of whole files
        assert {n: v.dtype for n, v in loaded.model.items()} == {n: v.dtype for n, v in one.items()}
    short = sum(v.numel() for v in one.values() if v.dtype == torch.bfloat16)
    of_shards, (of_whole, back, forth) = events(outs["fsdp"], "resume"), events(outs["ddp"], "resume")
    assert not any("cast" in event for event in (*of_shards, of_whole)), "the values are as they were, and short"
    assert back["cast"] == {"rounded": 0, "error": 0.0, "widened": short}
    assert forth["cast"] == {"rounded": short, "error": 0.0, "widened": 0}
    casts = {name: [e.get("cast") for e in events(out, "operation")] for name, out in outs.items()}
    assert [c and c["rounded"] for c in casts["ddp"]] == [c and c["rounded"] for c in casts["fsdp"]]
    assert casts["fsdp"][0]["rounded"] > 0 < casts["fsdp"][3]["widened"]


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_a_folder_is_read_without_float32_whole(data, tmp_path, stored):
    """Weights, logits and what rounding is said to have done; the peak is that of one tensor beyond what is kept."""
    torch.manual_seed(1)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, vocab_size=60)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=32, num_key_value_heads=2))
    theirs.to(getattr(torch, stored)).save_pretrained(tmp_path / "llama")
    keys = dict(init_from=str(tmp_path / "llama"), frozen_layers="wte,lm_head,ln_*", weights_dtype="bfloat16")
    keys |= dict(attn_lora_rank=2, mlp_lora_rank=2, block_size=16, dataset=str(data), device="cpu", compile=False)
    with Live() as live:
        config, foreign = opened(TrainConfig(**keys, gradient_accumulation_steps=1))
        run = open_run(config, None, Schedule(), Ranks("cpu"), foreign)
    matrices = sum(p.numel() for p in theirs.parameters() if p.dim() == 2)
    assert run.cast.rounded == matrices
    assert (run.cast.error == 0) == (stored == "bfloat16") and run.cast.error < 3e-3
    largest = 3 * 64 * 96 * 4
    assert live.peak < held(run)[0] + 4 * largest < 4 * matrices
    theirs = theirs.bfloat16().float().eval()
    for n in range(6):
        up = run.model.get_parameter(f"transformer.h.{n}.mlp.c_fc.base_layer.weight")
        assert up.dtype == torch.bfloat16 and torch.equal(up.float(), theirs.model.layers[n].mlp.up_proj.weight)
    found = logits(run)
    with torch.no_grad():
        expected = theirs(torch.arange(16)[None] % 30).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pissa_takes_its_part_of_weights_that_were_not_rounded(data, tmp_path):
    """And what is left of them is rounded once. It differs from the base by no low rank any more."""
    torch.manual_seed(1)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=16))
    theirs.save_pretrained(tmp_path / "llama")
    keys = dict(init_from=str(tmp_path / "llama"), lora_targets="all-linear", lora_rank=2, init_lora_weights="pissa")
    keys |= dict(weights_dtype="bfloat16", block_size=16, dataset=str(data), device="cpu", compile=False)
    config, foreign = opened(TrainConfig(**keys, gradient_accumulation_steps=1))
    run = open_run(config, None, Schedule(), Ranks("cpu"), foreign)
    assert run.cast.rounded == sum(p.numel() for p in theirs.parameters() if p.dim() == 2)
    down = theirs.model.layers[1].mlp.down_proj.weight.detach()
    u, s, vh = torch.linalg.svd(down, full_matrices=False)
    rest = down - (u[:, :2] * s[:2]) @ vh[:2]
    found = run.model.get_parameter("transformer.h.1.mlp.c_proj.base_layer.weight").float()
    assert ((found - rest).abs() <= 1.01 * 2**-8 * rest.abs() + 1e-7).all(), "half a step of bfloat16"
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn.weight \(rounded to bfloat16\)"):
        peft_folder.write(run.model, tmp_path / "out", str(tmp_path / "llama"))


def test_a_bias_trains_beside_a_weight_that_is_kept_short():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, generator=generator).to(torch.bfloat16)
    bias = torch.randn(4, generator=generator, requires_grad=True)
    outer = torch.randn(2, 3, 4, generator=generator)
    (linear(x, weight, bias) * outer).sum().backward()
    assert torch.allclose(bias.grad, outer.sum((0, 1))) and torch.allclose(x.grad, outer @ weight.float())
