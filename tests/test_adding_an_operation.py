"""The code of docs/adding_an_operation.md works as the page says: one file, one command."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT, arguments, events
from test_operations import apply, live_run, logits

import train_orchestrated
from orchestrate.training.operations import make
from orchestrate.training.schedule.own import registered
from orchestrate.training.settings.errors import ScheduleError

PAGE = (ROOT / "docs" / "adding_an_operation.md").read_text("utf-8")


@pytest.fixture
def my_ops(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    path = tmp_path / "my_ops.py"
    path.write_text("\n\n".join(blocks), "utf-8")
    return str(path)


def test_the_documented_operations_work(my_ops, data):
    run = live_run(data)
    with registered([my_ops]):
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


def test_the_documented_command_trains_with_them(my_ops, data, tmp_path, capsys):
    (schedule,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "my_schedule.yaml").write_text(schedule)
    given = [*arguments(data, tmp_path / "run", schedule=tmp_path / "my_schedule.yaml"), "--operations", my_ops]
    assert train_orchestrated.main([*given, "--plan"]) == 0
    assert "every_tokens 256" in capsys.readouterr().out
    assert train_orchestrated.main(given) == 0
    # An iteration has 128 tokens: set_beta2 fires at iteration 2, and the block moves at the same one.
    fired = [(e["name"], e["iter"], e["reason"]) for e in events(tmp_path / "run", "operation")]
    assert fired == [("set_beta2", 2, "iteration 2 (at_iter 2)"), ("move_to_top", 2, "256 tokens")]
