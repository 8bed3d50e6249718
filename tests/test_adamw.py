"""AdamW by name: the formula, the groups, and moments that wait while a parameter is frozen."""

from __future__ import annotations

import pytest
import torch
from test_optimizers import numbers
from torch import nn

from orchestrate.training.run.optimizers import AdamW


class Small(nn.Module):
    """A matrix, a bias, a norm, and a matrix with a third dimension, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        self.bias = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.norm = nn.Parameter(torch.tensor([1.5, 1.0, 0.25]))
        self.cube = nn.Parameter(torch.full((2, 1, 2), 4.0))


NAMES = ["matrix", "bias", "norm", "cube"]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model: nn.Module, optimizer: AdamW, gradient: float, veto: float | None = None) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step(None if veto is None else torch.tensor(veto))
    optimizer.zero_grad()


def test_only_matrices_are_decayed():
    """With gradients of zero the whole update is the decay: p - lr * weight_decay * p."""
    model = Small()
    optimizer, before = AdamW(model, NAMES, {}), values(model)
    optimizer.set(0.5, numbers(beta1=0.9, beta2=0.99, weight_decay=0.25))
    step(model, optimizer, 0.0)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.25) if name in ("matrix", "cube") else before[name]
        torch.testing.assert_close(parameter.detach(), expected, atol=0, rtol=1e-6, msg=name)


@pytest.mark.parametrize("names", [["bias", "norm"], ["matrix", "cube"]])
def test_one_kind_alone_has_one_group(names):
    model = Small()
    optimizer, before = AdamW(model, names, {}), values(model)
    optimizer.set(0.5, numbers(beta1=0.9, beta2=0.99, weight_decay=0.25))
    step(model, optimizer, 0.0)
    assert optimizer.names == names and len(optimizer.inner.param_groups) == 1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"matrix", "cube"} & set(names))


def test_two_steps_by_hand():
    """Gradients 2 and -1, beta1 0.5, beta2 0.75: m is 1, then 0, and v is 1, then 1. The first step is the rate's size
    (2 / sqrt(4)), the second moves nothing at any rate."""
    model = Small()
    optimizer, before = AdamW(model, NAMES, {}), values(model)
    optimizer.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    step(model, optimizer, 2.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1, atol=1e-6, rtol=0, msg=name)
    optimizer.set(1e9, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    step(model, optimizer, -1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1, atol=1e-6, rtol=0, msg=name)
    moments = optimizer.state_by_name()
    assert list(moments) == NAMES
    for name, parts in moments.items():
        assert parts["step"].item() == 2 and set(parts) == {"exp_avg", "exp_avg_sq", "step"}, name
        torch.testing.assert_close(parts["exp_avg"], torch.zeros_like(before[name]), atol=1e-7, rtol=0)
        torch.testing.assert_close(parts["exp_avg_sq"], torch.ones_like(before[name]), atol=1e-6, rtol=0)


def test_gradients_are_let_go_of():
    """A gradient that stays, even of zeros, would go on moving its parameter by its moments."""
    model = Small()
    optimizer = AdamW(model, NAMES, {})
    optimizer.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    step(model, optimizer, 2.0)
    assert all(p.grad is None for p in model.parameters())


def test_names_are_in_model_order_and_must_be_the_models():
    model = Small()
    optimizer = AdamW(model, ["cube", "bias", "matrix"], {})
    assert optimizer.names == ["matrix", "bias", "cube"]
    assert [id(p) for p in optimizer.parameters] == [id(model.matrix), id(model.bias), id(model.cube)]
    with pytest.raises(AssertionError, match="nothere"):
        AdamW(model, ["bias", "nothere"], {})


def test_moments_wait_while_a_parameter_is_frozen():
    model = Small()
    first = AdamW(model, NAMES, {})
    first.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    step(model, first, 2.0)
    second = AdamW(model, ["matrix"], first.state_by_name())
    second.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    step(model, second, 4.0)
    state = second.state_by_name()
    assert {name: parts["step"].item() for name, parts in state.items()} == {
        "matrix": 2,
        "bias": 1,
        "norm": 1,
        "cube": 1,
    }
    assert state["bias"]["exp_avg"].unique().tolist() == [1.0]
    assert state["matrix"]["exp_avg"].unique().tolist() == [2.5], "0.5 * 1 + 0.5 * 4"
    third = AdamW(model, NAMES, state).state_by_name()
    assert set(third) == set(NAMES) and third["cube"]["exp_avg"].unique().tolist() == [1.0]
    assert AdamW(model, NAMES, {"gone": third["cube"]}).state_by_name() == {}, "of no parameter of this model"


def test_a_parameter_that_never_stepped_has_no_state():
    model = Small()
    optimizer = AdamW(model, ["matrix", "bias"], {})
    optimizer.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.0))
    model.matrix.grad = torch.ones(2, 2)
    optimizer.inner.step()
    assert list(optimizer.state_by_name()) == ["matrix"]


def test_a_veto_leaves_weights_and_moments_alone():
    model = Small()
    optimizer, before = AdamW(model, NAMES, {}), values(model)
    optimizer.set(0.1, numbers(beta1=0.5, beta2=0.75, weight_decay=0.1))
    step(model, optimizer, float("nan"), veto=1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    step(model, optimizer, 1.0, veto=0.0)
    assert not torch.equal(model.bias, before["bias"]) and model.bias.isfinite().all()
