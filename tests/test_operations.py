"""The contract of every operation in the registry, on a live tiny run that has trained a while."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import sources, state_of
from operation_examples import BEFORE, EXAMPLES, ONLY_WITH

from orchestrate.model.config import OPTIONS, ModelConfig, layer_of_parameter
from orchestrate.model.gpt import GPT, from_weights, init_weights
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.operations import OPERATIONS, make
from orchestrate.training.run.device import pick_device
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.run.run import Run
from orchestrate.training.session.start import settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import OperationFailed, ScheduleError
from orchestrate.training.settings.records import Progress, Settings, differences
from orchestrate.training.store import checkpoint

CONFIG = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, warmup_iters=2,
    learning_rate=1e-2, lr_decay_iters=50, device="cpu", compile=False, bias=True,
)  # fmt: skip

SHAPE = {"block_size": 16, "vocab_size": 30, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True}


def live_run(data, steps: int = 3, model: dict | None = None, **keys) -> Run:
    config = TrainConfig(**{**CONFIG, "dataset": "first", **keys})
    model_config = ModelConfig(**{**SHAPE, **(model or {})})
    model = GPT(model_config)
    init_weights(model, 1)
    settings = settings_from(config, model_config)
    run = Run(
        config,
        settings,
        Progress.start(settings),
        model,
        sources(data),
        Ranks(config.device),
        pick_device(config.device, 0),
    )
    for _ in range(steps):
        run.step()
    return run


def apply(run: Run, name: str, value) -> Settings:
    operation = make(name, {} if value is None else {"value": value}).resolve(run)
    run.adopt(operation.plan(run.settings), operation.reshape)
    return run.settings


def logits(run: Run) -> torch.Tensor:
    run.model.eval()
    with torch.no_grad():
        out = run.model.logits(torch.arange(16)[None] % 30)
    run.model.train()
    return out


@pytest.fixture
def run(data) -> Run:
    return live_run(data)


def test_every_operation_has_an_example_and_a_docstring():
    assert set(EXAMPLES) == set(OPERATIONS)
    assert all(cls.__doc__ and cls.touches for cls in OPERATIONS.values())


def reloaded(run: Run, folder) -> Run:
    """The run as a checkpoint of it brings it back."""
    state = state_of(run)
    weights, moments = dict(run.model.named_parameters()), run.optimizer.state_by_name()
    loaded = checkpoint.load(checkpoint.save(folder, state, weights, moments, keep_last=1, keep_best=0))
    settings, progress = loaded.state.settings, loaded.state.progress
    model = from_weights(settings.model, loaded.model)
    return Run(run.config, settings, progress, model, run.batches.opened, run.ranks, run.device, loaded.optimizer)


_LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rotary", "bias": False, "n_hidden": 24}
# The model that runs have by default, and those of the families with every other option.
MODELS = {
    "gpt2": {},
    "llama3": {
        **_LLAMA, "n_kv_head": 1, "tie_weights": False, "rotary_llama3_factor": 8.0, "rotary_original_length": 8,
    },
    "qwen2": {**_LLAMA, "attn_bias": "qkv", "rotary_scale": 1.5},
    "qwen3": {
        **_LLAMA, "qk_norm": True, "head_size": 6, "n_kv_head": 1, "rotary_dynamic_factor": 3.0,
        "rotary_original_length": 6,
    },
}  # fmt: skip
BY_FAMILY = {"llama3": {"untie_head": "the head is not tied"}}
"""What of the examples a family refuses, and why."""


def test_what_an_operation_can_change_is_declared():
    """What a resume says of a key follows from that."""
    values = [*((name, EXAMPLES[name]) for name in EXAMPLES), ("widen_embd", {"times": 2, "heads": "larger"}),
              ("extend_context", {"block_size": 32, "how": "interpolate", "rotary_base": 5e4})]  # fmt: skip
    settings = settings_from(TrainConfig(**CONFIG), ModelConfig(**{**SHAPE, **MODELS["qwen2"]}))
    changed = set()
    for name, value in values:
        operation = make(name, {} if value is None else {"value": value})
        if not operation.decided_on_machine and name not in BEFORE and not ONLY_WITH.get(name):
            before, after = settings.model, operation.plan(settings).model
            changed |= {option for option in OPTIONS if getattr(before, option) != getattr(after, option)}
    assert changed == {name for name, option in OPTIONS.items() if option.by_operation}


@pytest.mark.parametrize(
    "model, optimizer", [*(("gpt2", name) for name in OPTIMIZERS), *((name, "adamw") for name in list(MODELS)[1:])]
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_contract(data, name, model, optimizer, tmp_path):
    run = live_run(data, model=MODELS[model], optimizer=optimizer)
    if optimizer not in ONLY_WITH.get(name, OPTIMIZERS):
        with pytest.raises(ScheduleError, match=f"^{name}: {optimizer} has no (betas|momentum)"):
            make(name, {"value": EXAMPLES[name]}).plan(run.settings)
        return
    for before, value in BEFORE.get(name, []):
        apply(run, before, value)
        run.step()
    if reason := BY_FAMILY.get(model, {}).get(name):
        with pytest.raises(ScheduleError, match=reason):
            make(name, {}).plan(run.settings)
        return
    start, weights = run.settings, {n: p.detach().clone() for n, p in run.model.named_parameters()}
    moments = {n: {k: v.clone() for k, v in s.items()} for n, s in run.optimizer.state_by_name().items()}
    function = logits(run)
    value = EXAMPLES[name]
    operation = make(name, {} if value is None else {"value": value})

    # plan is pure: the same answer twice, nothing of the run touched
    planned = operation.plan(start)
    assert operation.plan(start) == planned and run.settings is start
    changed = set(differences(start, planned)[0])
    assert all(any(n == t or n.startswith(f"{t}.") for t in operation.touches) for n in changed), changed

    settings = apply(run, name, value)
    if name != "adjust_batch_size":
        assert settings == planned and changed, "an example must change something"
    assert run.model.config == settings.model
    if operation.keeps_function:
        rounded = any(p.dtype == torch.bfloat16 for p in run.model.parameters())
        torch.testing.assert_close(logits(run), function, atol=1e-2 if rounded else 1e-5, rtol=0)

    # the optimizer covers exactly what trains, in model order, and flags agree
    trainable = trainable_parameters(run.model, settings.frozen)
    in_order = [n for n, _ in run.model.named_parameters() if n in trainable]
    assert run.optimizer.names == in_order
    assert [n for n, p in run.model.named_parameters() if p.requires_grad] == in_order
    in_groups = [p for group in run.optimizer.inner.param_groups for p in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in run.optimizer.parameters} and len(in_groups) == len(in_order)

    # untouched parameters keep value and moments to the bit
    after = run.optimizer.state_by_name()
    shapes = {n: p.shape for n, p in run.model.named_parameters()}
    assert {n: {k: v.shape for k, v in s.items()} for n, s in after.items()} == {
        n: OPTIMIZERS[optimizer].state_shapes(n, shapes[n]) for n in after
    }
    for n, p in run.model.named_parameters():
        if name == "reset_moments" and layer_of_parameter(n) in ("mlp.0", "mlp.1", "ln_f"):
            assert n not in after
        elif n in weights and p.shape == weights[n].shape and torch.equal(p, weights[n]) and n in moments:
            for key, old in moments[n].items():
                assert torch.equal(after[n][key], old), (n, key)
    there = {n.replace(".base_layer", "") for n in after}
    kept = [n for n in moments if n.replace(".base_layer", "") in there]
    assert len(kept) >= len(moments) // 2

    # saved and restored, the next step is the same to the bit
    other = reloaded(run, tmp_path)
    run.step()
    other.step()
    assert run.fingerprint() == other.fingerprint()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert all(p.grad is None for p in run.model.parameters())


def test_frozen_parameters_stay_put_and_resume_with_their_moments(run):
    apply(run, "freeze_layer", ["attn.0", "wte"])
    names = ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]
    weights = {n: run.model.get_parameter(n).detach().clone() for n in names}
    moments = {n: run.optimizer.state_by_name()[n]["exp_avg"].clone() for n in names}
    for _ in range(3):
        run.step()
    apply(run, "unfreeze_layer", "*")
    for n in names:
        assert torch.equal(run.model.get_parameter(n), weights[n])
        assert torch.equal(run.optimizer.state_by_name()[n]["exp_avg"], moments[n])
    run.step()
    assert not torch.equal(run.model.get_parameter(names[0]), weights[names[0]])


def test_adapters_freeze_the_base_and_learn(run):
    apply(run, "set_attn_lora_rank", 4)
    base = run.model.get_parameter("transformer.h.0.attn.c_attn.base_layer.weight").detach().clone()
    left = run.model.get_parameter("transformer.h.0.attn.c_attn.lora_B.default.weight").detach().clone()
    run.step()
    assert torch.equal(run.model.get_parameter("transformer.h.0.attn.c_attn.base_layer.weight"), base)
    assert not torch.equal(run.model.get_parameter("transformer.h.0.attn.c_attn.lora_B.default.weight"), left)


def test_an_operation_that_fails_half_way_leaves_the_run_whole(run):
    before, model, optimizer = run.settings, run.model, run.optimizer
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    operation = make("set_attn_lora_rank", {"value": 4})

    def broken(model, target, generator):
        operation.reshape(model, target, generator)
        raise RuntimeError("half way")

    with pytest.raises(OperationFailed, match="rank 0: RuntimeError: half way"):
        run.adopt(operation.plan(run.settings), broken)
    assert run.settings is before and run.model is model and run.optimizer is optimizer
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    run.step()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("set_layer_lora_rank", ["attn.7", 4], "attn.7"),
        ("set_layer_lora_rank", ["ln_f", 4], "cannot carry"),
        ("set_attn_lora_rank", 17, "from 1 to 16"),
        ("change_batch_size", 0.3, "whole number"),
        ("freeze_layer", "*", "nothing to train"),
        ("freeze_layer", "mlp.x", "mlp.x"),
        ("merge_lora_weights", None, "no adapter"),
        ("set_lr", -1.0, "greater than or equal to 0"),
        ("set_lr", "fast", "valid number"),
        ("set_lr", True, "valid number"),
        ("set_betas", [0.9], "value.1 is missing"),
        ("set_dropout", 1.0, "less than 1"),
        ("stop", 3, "takes no value"),
        ("set_lrr", 3, "did you mean set_lr"),
        ("adjust_batch_size", 1.5, "share"),
        ("adjust_batch_size", {"targett": 0.5}, "targett"),
    ],
)
def test_refusals_say_what_is_wrong(run, name, value, message):
    with pytest.raises(ScheduleError, match=message):
        make(name, {} if value is None else {"value": value}).plan(run.settings)


def test_change_lr_scales_the_whole_curve(run):
    before = run.current_lr()
    apply(run, "change_lr", 0.25)
    assert run.current_lr() == pytest.approx(before * 0.25)


def test_reset_lr_schedule_starts_the_warmup_again(run):
    apply(run, "reset_lr_schedule", None)
    assert run.current_lr() == pytest.approx(1e-2 / 3)


def test_adjust_batch_size_finds_the_largest_that_fits(run, monkeypatch):
    from orchestrate.training.run import batch_memory as memory

    monkeypatch.setattr(memory, "total_memory", lambda run: 1000.0)
    tried = []
    monkeypatch.setattr(memory, "peak_memory", lambda run, size: tried.append(size) or 100.0 + 10.0 * size)
    apply(run, "adjust_batch_size", {"target": 0.8, "max_batch_size": 500})
    assert run.settings.batch_size == 70 and run.settings.grad_accum == 2
    assert max(tried) <= 200, "it must not try far beyond what fits"
    run.adopt(dataclasses.replace(run.settings, batch_size=12, grad_accum=12))
    apply(run, "adjust_batch_size", {"target": 0.5, "keep_global_batch": True})
    assert (run.settings.batch_size, run.settings.grad_accum) == (36, 4)


def test_adjust_batch_size_measures_real_memory_and_leaves_the_run(run):
    prints = run.fingerprint()
    apply(run, "adjust_batch_size", {"target": 1.0, "max_batch_size": 8})
    assert run.settings.batch_size == 8
    run.settings = dataclasses.replace(run.settings, batch_size=4)
    assert run.fingerprint() == prints
    with pytest.raises(ValueError, match="already needs more"):
        make("adjust_batch_size", {"value": 1e-6}).resolve(run)
