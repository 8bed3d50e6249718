"""The code of docs/adding_an_operation.md works as the page says."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from test_operations import apply, live_run, logits

from orchestrate.training.operations import OPERATIONS, make
from orchestrate.training.settings.errors import ScheduleError


@pytest.fixture
def documented():
    known = dict(OPERATIONS)
    page = (ROOT / "docs" / "adding_an_operation.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    names: dict = {"__name__": "documented"}
    for block in blocks:
        exec(compile(block, "adding_an_operation.md", "exec", dont_inherit=True), names)
    yield
    OPERATIONS.clear()
    OPERATIONS.update(known)


def test_the_documented_operations_work(documented, data):
    run = live_run(data)
    apply(run, "set_beta2", 0.99)
    assert run.settings.beta2 == 0.99
    with pytest.raises(ScheduleError, match="below beta1"):
        make("set_beta2", {"value": 0.5}).plan(run.settings)

    weights = [block.mlp.c_fc.weight.detach().clone() for block in run.model.transformer["h"]]
    was = logits(run)
    apply(run, "move_to_top", 0)
    moved = [block.mlp.c_fc.weight for block in run.model.transformer["h"]]
    assert torch.equal(moved[1], weights[0]) and torch.equal(moved[0], weights[1])
    assert not torch.allclose(logits(run), was)
    run.step()
    with pytest.raises(ScheduleError, match="0 to 1, got 7"):
        make("move_to_top", {"value": 7}).plan(run.settings)
