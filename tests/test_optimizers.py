"""What a run asks of any optimizer: groups and their rates, slots that follow a lineage, a veto, bytes. And SGD."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import arguments, assert_same_tensors, events, on_ranks, tensors
from fuzzing import seal
from test_operations import apply, live_run
from test_sharded import _runs, assert_same_curve, resumed
from torch import nn

import train_orchestrated
from orchestrate.model.config import ModelConfig
from orchestrate.model.lineage import Origin, Slot, carry
from orchestrate.training.run import batch_memory, optimizers
from orchestrate.training.run.optimizers import OPTIMIZERS, SGD, AdamW, Group
from orchestrate.training.session.start import settings_from
from orchestrate.training.settings.config import TrainConfig, resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import OPTIMIZER_NUMBERS, OptimizerName
from orchestrate.training.store import checkpoint

BOTH = pytest.mark.parametrize("name", OPTIMIZERS)


class Small(nn.Module):
    """An embedding, a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0], [3.0, 2.0]]))
        self.matrix = nn.Parameter(torch.tensor([[2.0, -1.0]]))
        self.bias = nn.Parameter(torch.tensor([2.0, -4.0]))


def numbers(**values) -> Settings:
    """Settings with these numbers of an optimizer."""
    config = TrainConfig(n_layer=1, n_head=1, n_embd=4)
    settings = settings_from(config, ModelConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    return replace(settings, **values)


def gradients(model: nn.Module, **values: float) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, values.get(name, 0.0))


# ---------------------------------------------------------------------------------------------- what each declares


@BOTH
def test_a_declaration_is_whole(name):
    """Its numbers are those that it reads, and after a step it has the slots, shapes and bytes that it says."""
    cls = OPTIMIZERS[name]
    assert set(OPTIMIZERS) == set(get_args(OptimizerName)) == set(OPTIMIZER_NUMBERS)
    cls.options(SimpleNamespace(**{number: 0.5 for number in OPTIMIZER_NUMBERS[name]}))
    with pytest.raises(AttributeError):
        cls.options(SimpleNamespace(**{number: 0.5 for number in OPTIMIZER_NUMBERS[name][1:]}))
    model = Small()
    optimizer = cls(model, ["wte", "bias"], {})
    optimizer.set(0.1, numbers(optimizer=name))
    gradients(model, wte=1.0, bias=1.0)
    optimizer.step()
    state = optimizer.state_by_name()
    assert list(state) == ["wte", "bias"]
    for parameter, parts in state.items():
        shape = model.get_parameter(parameter).shape
        assert {key: value.shape for key, value in parts.items()} == cls.state_shapes(parameter, shape)
        assert cls.state_bytes(parameter, shape) == sum(value.nbytes for value in parts.values())


def test_bytes_by_hand():
    shape = torch.Size([6, 4])
    assert AdamW.state_bytes("any", shape) == 2 * 24 * 4 + 4 and SGD.state_bytes("any", shape) == 24 * 4
    assert AdamW.state_bytes("any", shape, share=2) == 24 * 4 + 4, "a count of steps is on every rank"


@BOTH
def test_memory_of_a_batch_counts_the_state_that_is_to_come(data, name, monkeypatch):
    class Meter:
        peak = 1000.0

        def __enter__(self): ...

        def __exit__(self, *error): ...

    monkeypatch.setattr(batch_memory, "_HostMeter", Meter)
    run = live_run(data, steps=0, optimizer=name)
    sizes = [p.numel() for p in run.model.parameters()]
    bytes_to_come = {"adamw": 8 * sum(sizes) + 4 * len(sizes), "sgd": 4 * sum(sizes)}
    assert batch_memory.peak_memory(run, 2) == 1000 + bytes_to_come[name]
    run.step()
    assert batch_memory.peak_memory(run, 2) == 1000


# ---------------------------------------------------------------------------------------------- groups


@BOTH
def test_only_matrices_decay(name):
    """Gradients of zero: the whole update is p * lr * weight_decay = p / 8, for the bias nothing."""
    model = Small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model, ["wte", "matrix", "bias"], {})
    optimizer.set(0.25, numbers(weight_decay=0.5, momentum=0.0))
    gradients(model)
    optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (1.0 if n == "bias" else 0.875), atol=0, rtol=1e-6, msg=n)


def slow_embedding(cls):
    """A rule of three groups: the embedding at half the rate and without decay."""

    class Slow(cls):
        @classmethod
        def groups(cls, model):
            return [Group(["wte"], 0.5, False), Group(["matrix"], 1.0, True), Group(["bias"], 2.0, False)]

    return Slow


@BOTH
def test_groups_have_rates_and_decay_of_their_own(name):
    """A first step of Adam is its rate; one of SGD its rate times the gradient. Decay 0.5 takes lr * p / 2 besides."""
    model = Small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = slow_embedding(OPTIMIZERS[name])(model, ["wte", "matrix", "bias"], {})
    for lr in (7.0, 0.25):  # the last one set is the one in force
        optimizer.set(lr, numbers(weight_decay=0.5))
    gradients(model, wte=1.0, matrix=1.0, bias=1.0)
    optimizer.step()
    moved = {"wte": before["wte"] - 0.125, "matrix": before["matrix"] * 0.875 - 0.25, "bias": before["bias"] - 0.5}
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), moved[n], atol=1e-6, rtol=1e-6, msg=n)
    assert optimizer.names == ["wte", "matrix", "bias"], "in model order, whatever the groups"
    only = slow_embedding(OPTIMIZERS[name])(model, ["bias"], {})
    assert [group["factor"] for group in only.inner.param_groups] == [2.0]


def test_a_rule_must_hold_for_every_parameter_once():
    class Leaky(AdamW):
        @classmethod
        def groups(cls, model):
            return [Group(["wte"], 1.0, True), Group(["bias", "bias"], 1.0, False)]

    with pytest.raises(AssertionError, match="each in one group"):
        Leaky(Small(), ["wte"], {})


def test_the_rule_holds_in_a_run_over_growth(data, monkeypatch):
    """A run with half the rate for its embedding moves it half as far: Adam is linear in its rate."""

    class Slow(AdamW):
        @classmethod
        def groups(cls, model):
            names = [name for name, _ in model.named_parameters()]
            embedding = "transformer.wte.weight"
            return [Group([embedding], 0.5, True), Group([n for n in names if n != embedding], 1.0, True)]

    def moved() -> dict[str, torch.Tensor]:
        run = live_run(data, steps=0, weight_decay=0.0)
        apply(run, "widen_embd", 32)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.step()
        return {n: p.detach() - before[n] for n, p in run.model.named_parameters()}

    plain = moved()
    monkeypatch.setitem(OPTIMIZERS, "adamw", Slow)
    for name, far in moved().items():
        factor = 0.5 if name == "transformer.wte.weight" else 1.0
        torch.testing.assert_close(far, plain[name] * factor, atol=1e-7, rtol=1e-3, msg=name)
        assert far.any(), name


# ---------------------------------------------------------------------------------------------- veto


@BOTH
def test_a_veto_leaves_everything(name):
    """At the first step, when there is no state yet, and later: weights and state stay, also beside nan."""
    model, untouched = Small(), Small()
    optimizer, other = OPTIMIZERS[name](model, ["wte", "bias"], {}), OPTIMIZERS[name](untouched, ["wte", "bias"], {})
    assert optimizer.note == "", "torch's fused kernels on the CPU heed a veto"
    yes, no = torch.tensor(1.0), torch.tensor(0.0)
    for veto, gradient in ((yes, float("nan")), (no, 1.0), (yes, 5.0), (no, -3.0), (None, 0.5)):
        optimizer.set(0.1, numbers())
        gradients(model, wte=gradient, bias=gradient)
        optimizer.step(veto)
        if veto is not yes:
            other.set(0.1, numbers())
            gradients(untouched, wte=gradient, bias=gradient)
            other.step()
        for n, p in model.named_parameters():
            assert torch.equal(p, untouched.get_parameter(n)), (n, veto)
    assert list(optimizer.state_by_name()) == ["wte", "bias"]
    for n, parts in optimizer.state_by_name().items():
        for key, value in parts.items():
            assert torch.equal(value, other.state_by_name()[n][key]), (n, key)
    optimizer.zero_grad()
    assert all(p.grad is None for p in (model.wte, model.bias))


def deaf(cls):
    """An optimizer whose fused kernel does not look at found_inf, as MPS's is reported to be."""

    class Implementation(cls.implementation if isinstance(cls.implementation, type) else torch.optim.SGD):
        def step(self):
            self.found_inf = None
            return super().step()

    class Deaf(cls):
        implementation = Implementation

    return Deaf


def unfused(cls):
    """An optimizer for which torch has no fused kernel."""

    class Unfused(cls):
        @staticmethod
        def implementation(parameters, fused, **options):
            if fused:
                raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of ...")
            return cls.implementation(parameters, **options)

    return Unfused


@pytest.mark.parametrize("kind, said", [(deaf, "updates in spite of a veto"), (unfused, "has no fused kernel for")])
@BOTH
def test_a_kernel_that_does_not_heed_is_found_out(name, kind, said):
    cls = kind(OPTIMIZERS[name])
    model = Small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = cls(model, ["wte", "matrix", "bias"], {})
    assert f"{name}: torch" in optimizer.note and said in optimizer.note and "parameters on cpu" in optimizer.note
    optimizer.set(0.1, numbers())
    gradients(model, wte=float("nan"), bias=1.0)
    optimizer.step(torch.tensor(1.0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    gradients(model, wte=1.0, bias=1.0)
    optimizer.step(torch.tensor(0.0))
    assert (model.wte < before["wte"]).all() and (model.bias < before["bias"]).all()


def test_a_kernel_is_tried_once_in_a_process(monkeypatch):
    monkeypatch.setattr(optimizers, "_PROBED", {})
    for _ in range(3):
        AdamW(Small(), ["bias"], {})
    assert len(optimizers._PROBED) == 1


def test_a_person_is_told(tiny, capsys, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adamw", deaf(AdamW))
    assert tiny(max_iters=3, inject="nan@2")[0] == 0
    assert "note: adamw: torch's fused kernel for parameters on cpu updates in spite" in capsys.readouterr().out


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_spike_is_not_applied(data, tmp_path, name, dtype):
    keys = dict(dtype=dtype, spike_sigma=6.0, inject="spike@24", out_dir=str(tmp_path), learning_rate=1e-3)
    run = live_run(data, steps=24, optimizer=name, **keys)
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert run.step().sick.cause == "spike"
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters())
    assert run.step().sick is None and not torch.equal(
        run.model.transformer["wte"].weight, weights["transformer.wte.weight"]
    )


# ---------------------------------------------------------------------------------------------- slots


SLOTS = {
    "rows": Slot(per="row", grad_power=2, new="kin"),
    "average": Slot(weight_power=1),
    "both": Slot(grad_power=1, weight_power=2),
    "count": Slot(per="parameter"),
}


def test_any_kind_of_slot_follows_by_hand():
    """A matrix (2, 2) becomes (3, 2): its second row first, then a new one, then its first row; columns scaled."""
    state = {
        "w": {
            "rows": torch.tensor([[2.0], [6.0]]),
            "average": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "both": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "count": torch.tensor(9.0),
        }
    }
    columns = torch.tensor([[1.0, 3.0]])
    lineage = {
        "w": Origin("w", (torch.tensor([1, -1, 0]), None), weight_scale=0.5, grad_scale=columns),
        "again": Origin("w"),
        "third": Origin("w"),
        "kin": Origin(None, prior="w"),
        "none": Origin(None),
        "bias": Origin("bias"),
    }
    shapes = {"w": (3, 2), "again": (2, 2), "third": (2, 2), "kin": (1, 4), "none": (5,), "bias": (2,)}
    shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
    state["bias"] = {"rows": torch.tensor([1.0, 2.0])}  # it has no other
    carried = carry(state, lineage, shapes, SLOTS)
    assert list(carried) == ["w", "again", "third", "kin", "bias"] and list(carried["bias"]) == ["rows"]
    w, kin = carried["w"], carried["kin"]
    assert w["rows"].tolist() == [[30.0], [4.0], [10.0]], "the mean of the squares of 1 and 3 is 5; kin is 4 as it was"
    assert w["average"].tolist() == [[1.5, 2.0], [0.0, 0.0], [0.5, 1.0]]
    assert w["both"].tolist() == [[0.75, 3.0], [0.0, 0.0], [0.25, 1.5]]
    assert w["count"] == 9.0 and kin["count"] == 9.0
    assert kin["rows"].tolist() == [[4.0]] and kin["average"].tolist() == [[0.0] * 4]
    assert {key: value.shape for key, value in kin.items()} == {k: s.shape(shapes["kin"]) for k, s in SLOTS.items()}
    pointers = [value.data_ptr() for parts in carried.values() for value in parts.values()]
    assert len(set(pointers)) == len(pointers)
    with pytest.raises(AssertionError):
        carry({"w": {"unheard_of": torch.ones(2, 2)}}, {"w": Origin("w")}, {"w": torch.Size([2, 2])}, SLOTS)


# ---------------------------------------------------------------------------------------------- SGD


def test_momentum_by_hand():
    """Momentum 0.5, gradients 1, 2, 4: m is 1, 2.5, 5.25. A parameter that begins later begins at m = g."""
    model = Small()
    first = SGD(model, ["bias"], {})
    for gradient, expected in ((1.0, 1.9), (2.0, 1.65)):
        first.set(0.1, numbers(momentum=0.5))
        gradients(model, bias=gradient)
        first.step()
        assert model.bias[0].item() == pytest.approx(expected)
    second = SGD(model, ["bias", "matrix"], first.state_by_name())
    second.set(0.1, numbers(momentum=0.5, weight_decay=0.25))
    gradients(model, bias=4.0, matrix=4.0)
    second.step(torch.tensor(0.0))
    assert model.bias[0].item() == pytest.approx(1.65 - 0.525)
    assert model.matrix[0].tolist() == pytest.approx([2.0 - 0.45, -1.0 - 0.375])  # g = 4 + 0.25 p
    assert second.state_by_name()["matrix"]["momentum_buffer"][0].tolist() == pytest.approx([4.5, 3.75])


def test_sgd_goes_on_to_the_bit_and_keeps_its_optimizer(tiny, resume):
    schedule = [
        {"name": "set_momentum", "value": 0.5, "at_iter": 1, "over": 4},
        {"name": "stack_layers", "value": {"n_layer": 3}, "max_wait_iters": 2},
        {"name": "widen_mlp", "value": {"times": 2}, "max_wait_iters": 1},
        {"name": "reset_moments", "value": "attn.*", "max_wait_iters": 1},
    ]
    keys = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.8}
    _, whole = tiny(schedule, **keys)
    _, part = tiny(schedule, out="part", **{**keys, "max_iters": 4})
    with pytest.raises(
        Refused, match="optimizer cannot change on resume from 'sgd' to 'adamw': what one optimizer has"
    ):
        resume(part, max_iters=12, optimizer="adamw")
    with pytest.raises(Refused, match="--beta1: sgd has no beta1; it has momentum"):
        resume(part, max_iters=12, beta1=0.5)
    assert resume(part, max_iters=12, optimizer="sgd") == 0
    assert_same_tensors(tensors(part), tensors(whole))
    names = {name.partition("|")[2] for name in tensors(part)}
    assert names == {"", "momentum_buffer"}
    settings = checkpoint.load(part / "checkpoints/latest").state.settings.to_json()
    assert settings["optimizer"] == "sgd" and settings["momentum"] == 0.5
    assert resume(part, max_iters=13, momentum=0.25) == 0
    (override,) = [event for event in events(part, "override") if event["key"] == "momentum"]
    assert (override["before"], override["after"], override["applied"]) == (0.5, 0.25, True)


def test_state_of_another_optimizer_is_refused(tiny, resume):
    """A state.json that names another optimizer than the tensors are of."""
    _, out = tiny(max_iters=4)
    folder = (out / "checkpoints" / "latest").resolve()
    state = json.loads((folder / "state.json").read_text())
    for part in ("settings", "config"):
        state[part]["optimizer"] = "sgd"
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    with pytest.raises(Refused, match="momentum_buffer"):
        resume(out, max_iters=6)


def test_a_checkpoint_from_before_there_was_a_choice_is_adamw():
    values = numbers().to_json()
    for name in ("optimizer", "momentum"):
        del values[name]
    assert Settings.from_json(values).optimizer == "adamw"


def test_what_an_optimizer_has_not_is_refused(tmp_path, data):
    with pytest.raises(Refused, match="--momentum: adamw has no momentum; it has beta1 and beta2"):
        resolve([], [("momentum", "0.5")])
    with pytest.raises(Refused, match="optimizer must be 'adamw' or 'sgd', got 'adam'"):
        resolve([], [("optimizer", "adam")])
    file = tmp_path / "c.py"
    file.write_text("beta2 = 0.99\nmomentum = 0.8\n")
    for name in OPTIMIZERS:  # a file may hold the numbers of several
        assert resolve([file], [("optimizer", name)])[0].optimizer == name
    schedule = tmp_path / "s.yaml"
    schedule.write_text("- {name: set_lr, value: 0.1}\n- {name: set_betas, value: [0.8, 0.9]}\n")
    with pytest.raises(Refused, match="s.yaml:2: entry 2: set_betas: sgd has no betas"):
        train_orchestrated.main([*arguments(data, tmp_path / "run", schedule=schedule, optimizer="sgd"), "--plan"])


@pytest.mark.timeout(600)
def test_sharded_sgd_is_the_same_run(data, tmp_path):
    """Growth, adapters and a resume: torch has no fused kernel for sharded SGD, so the loop and the host."""
    schedule = tmp_path / "s.json"
    entries = [
        {"name": "freeze_layer", "value": ["mlp.0", "wte"], "at_iter": 1},
        {"name": "unfreeze_layer", "value": "*", "max_wait_iters": 1},
        {"name": "stack_layers", "value": {"times": 2}, "max_wait_iters": 1, "reevaluate": True},
        {"name": "set_attn_lora_rank", "value": 2, "max_wait_iters": 1},
        {"name": "merge_lora_weights", "max_wait_iters": 1, "reevaluate": True},
        {"name": "widen_embd", "value": {"times": 2}, "max_wait_iters": 1, "reevaluate": True},
    ]
    schedule.write_text(json.dumps(entries))
    given = dict(optimizer="sgd", learning_rate=0.05, schedule=schedule, inject="nan@3")
    commands = [
        arguments(data, tmp_path / "ddp", **given),
        arguments(data, tmp_path / "fsdp", parallel="fsdp", **given),
        arguments(data, tmp_path / "part", parallel="fsdp", **{**given, "max_iters": 6}),
        resumed(tmp_path / "part", max_iters=12),
    ]
    assert on_ranks(_runs, commands) == [[0] * 4] * 2
    assert_same_curve(tmp_path / "fsdp", tmp_path / "ddp")
    loaded = {n: checkpoint.load(tmp_path / n / "checkpoints/latest") for n in ("ddp", "fsdp", "part")}
    for name, parts in loaded["ddp"].optimizer.items():
        for n in ("fsdp", "part"):
            assert list(loaded[n].optimizer[name]) == list(parts) == ["momentum_buffer"]
        theirs, mine = (loaded[n].optimizer[name]["momentum_buffer"] for n in ("part", "fsdp"))
        assert torch.equal(theirs, mine), f"{name}: the resume is to the bit"
        torch.testing.assert_close(mine, parts["momentum_buffer"], atol=1e-4, rtol=0)
