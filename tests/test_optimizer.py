"""AdamW by name: the formula, the groups, and moments that wait while a parameter is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrate.training.run.optimizers import NamedAdamW


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


def step(model: nn.Module, optimizer: NamedAdamW, gradient: float) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.inner.step()
    optimizer.zero_grad()


def test_only_matrices_are_decayed():
    """With gradients of zero the whole update is the decay: p - lr * weight_decay * p."""
    model = Small()
    optimizer, before = NamedAdamW(model, NAMES, {}), values(model)
    optimizer.set(0.5, 0.9, 0.99, 0.25)
    step(model, optimizer, 0.0)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.25) if name in ("matrix", "cube") else before[name]
        torch.testing.assert_close(parameter.detach(), expected, atol=0, rtol=1e-6, msg=name)


@pytest.mark.parametrize("names", [["bias", "norm"], ["matrix", "cube"]])
def test_one_kind_alone_has_one_group(names):
    model = Small()
    optimizer, before = NamedAdamW(model, names, {}), values(model)
    optimizer.set(0.5, 0.9, 0.99, 0.25)
    step(model, optimizer, 0.0)
    assert optimizer.names == names and len(optimizer.inner.param_groups) == 1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"matrix", "cube"} & set(names))


def test_two_steps_by_hand():
    """Gradients 2 and -1, beta1 0.5, beta2 0.75: m is 1, then 0, and v is 1, then 1. The first step is the rate's size
    (2 / sqrt(4)), the second moves nothing at any rate."""
    model = Small()
    optimizer, before = NamedAdamW(model, NAMES, {}), values(model)
    optimizer.set(0.1, 0.5, 0.75, 0.0)
    step(model, optimizer, 2.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1, atol=1e-6, rtol=0, msg=name)
    optimizer.set(1e9, 0.5, 0.75, 0.0)
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
    optimizer = NamedAdamW(model, NAMES, {})
    optimizer.set(0.1, 0.5, 0.75, 0.0)
    step(model, optimizer, 2.0)
    assert all(p.grad is None for p in model.parameters())


def test_names_are_in_model_order_and_must_be_the_models():
    model = Small()
    optimizer = NamedAdamW(model, ["cube", "bias", "matrix"], {})
    assert optimizer.names == ["matrix", "bias", "cube"]
    assert [id(p) for p in optimizer.parameters] == [id(model.matrix), id(model.bias), id(model.cube)]
    with pytest.raises(AssertionError, match="nothere"):
        NamedAdamW(model, ["bias", "nothere"], {})


def test_moments_wait_while_a_parameter_is_frozen():
    model = Small()
    first = NamedAdamW(model, NAMES, {})
    first.set(0.1, 0.5, 0.75, 0.0)
    step(model, first, 2.0)
    second = NamedAdamW(model, ["matrix"], first.state_by_name())
    second.set(0.1, 0.5, 0.75, 0.0)
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
    third = NamedAdamW(model, NAMES, state).state_by_name()
    assert set(third) == set(NAMES) and third["cube"]["exp_avg"].unique().tolist() == [1.0]
    assert NamedAdamW(model, NAMES, {"gone": third["cube"]}).state_by_name() == {}, "of no parameter of this model"


def test_a_parameter_that_never_stepped_has_no_state():
    model = Small()
    optimizer = NamedAdamW(model, ["matrix", "bias"], {})
    optimizer.set(0.1, 0.5, 0.75, 0.0)
    model.matrix.grad = torch.ones(2, 2)
    optimizer.inner.step()
    assert list(optimizer.state_by_name()) == ["matrix"]


def test_the_flag_of_a_step_that_is_not_taken_is_looked_at_by_the_kernel():
    """The fused kernel leaves weights and moments alone where found_inf is 1, and the loop knows nothing of it."""
    model = Small()
    optimizer, before = NamedAdamW(model, NAMES, {}), values(model)
    optimizer.set(0.1, 0.5, 0.75, 0.1)
    optimizer.inner.found_inf = torch.tensor(1.0)
    step(model, optimizer, float("nan"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.inner.found_inf = torch.tensor(0.0)
    step(model, optimizer, 1.0)
    assert not torch.equal(model.bias, before["bias"])
