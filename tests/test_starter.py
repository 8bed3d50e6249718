"""--init: what it writes plans without a warning and trains, and nothing that is there is overwritten."""

from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT, TINY, events, write_data

import train_orchestrated
from orchestrate.tools import main as tools
from orchestrate.training.schedule.file import parse_schedule
from orchestrate.training.settings.config import TrainConfig, read_config_file
from orchestrate.training.settings.errors import Refused

SMALL = [f"--{key}={TINY[key]}" for key in ("n_layer", "n_head", "n_embd", "block_size", "device")]


def planned(capsys, *given) -> dict:
    capsys.readouterr()
    assert train_orchestrated.main([*map(str, given), "--plan=json"]) == 0
    return json.loads(capsys.readouterr().out)


def written(folder) -> dict:
    return {key: value for key, (value, _) in read_config_file(folder / "config.py")[0].items()}


def test_what_is_written_plans_and_trains(data, tmp_path, capsys):
    folder = tmp_path / "a first run"
    given = ["--init", str(folder), f"--dataset={data}", "--max_iters=40", "--seed=3", *SMALL]
    assert train_orchestrated.main(given) == 0
    said = capsys.readouterr().out.splitlines()
    assert {path.name for path in folder.iterdir()} == {"config.py", "schedule.yaml", "schema.json"}
    assert said[1:] == [
        f"to check it: orchestrate train '{folder}/config.py' --plan",
        f"to train it: orchestrate train '{folder}/config.py'",
    ]
    plan = planned(capsys, folder / "config.py")
    assert [stage["operation"] for stage in plan["stages"]] == ["start", "change_grad_accum 2", "change_lr 0.5"]
    assert plan["warnings"] == [] and not any("warm-up" in note for note in plan["notes"])
    assert plan["stages"][0]["settings"]["warmup_iters"] == 2
    assert train_orchestrated.main([str(folder / "config.py")]) == 0
    assert [event["name"] for event in events(folder / "run", "operation")] == ["change_grad_accum", "change_lr"]
    assert events(folder / "run", "end")[-1] | {"iter": 40, "not_fired": []} == events(folder / "run", "end")[-1]


def test_without_keys_it_is_a_small_run_of_shakespeare(tmp_path):
    assert tools.run("plan", ["--init", str(tmp_path)]) == 0
    values = written(tmp_path)
    assert (values["dataset"], values["max_iters"], values["warmup_iters"]) == ("shakespeare_char", 2000, 100)
    assert (values["eval_interval"], values["log_interval"], values["lr_decay_iters"]) == (100, 20, 2000)
    assert (values["out_dir"], values["schedule"]) == (f"{tmp_path}/run", f"{tmp_path}/schedule.yaml")
    text = (tmp_path / "config.py").read_text()
    for key, value in values.items():
        assert f"\n{key} = {value!r}  # {TrainConfig.model_fields[key].description}\n" in text


def test_every_key_that_is_given_is_written(tmp_path):
    given = ["--dataset={'a': 0.75, 'b': 0.25}", "--n_layer=2", "--sample_prompts=['It\\'s']", "--learning_rate=3e-4"]
    assert train_orchestrated.main(["--init", str(tmp_path), str(ROOT / "config/shakespeare_char.py"), *given]) == 0
    values = written(tmp_path)
    assert values["dataset"] == {"a": 0.75, "b": 0.25} and list(values["sample_prompts"]) == ["It's"]
    assert (values["n_layer"], values["n_embd"], values["learning_rate"]) == (2, 384, 3e-4), "the file's, then ours"


@pytest.mark.parametrize("key", ["--depth=6", "--init_from=gpt2"])
def test_what_others_decide_is_left_to_them(tmp_path, key):
    assert train_orchestrated.main(["--init", str(tmp_path), key]) == 0
    values = written(tmp_path)
    assert not {"n_layer", "n_embd", "learning_rate", "batch_size"} & set(values) and "max_iters" in values


def test_the_entries_to_try_are_right(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    folder = tmp_path / "new"
    assert train_orchestrated.main(["--init", str(folder), f"--dataset={data}", *SMALL]) == 0
    text = (folder / "schedule.yaml").read_text()
    more = re.sub(r"^# (?=- |  )", "", text, flags=re.M)
    assert len(parse_schedule(text, "s.yaml").entries) == 2 and len(parse_schedule(more, "s.yaml").entries) == 5
    (folder / "schedule.yaml").write_text(more)
    stages = planned(capsys, folder / "config.py")["stages"]
    assert stages[3]["n_layer"] == 4 and stages[3]["keeps_function"] and stages[4]["changes"]["frozen"][1]
    schema = json.loads((folder / "schema.json").read_text())
    assert schema == json.loads((ROOT / "schedules/schema.json").read_text())


@pytest.mark.parametrize("name", ["config.py", "schedule.yaml", "schema.json"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(Refused, match=f"{name} would be overwritten; give another folder"):
        train_orchestrated.main(["--init", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert tools.run("train", ["--init", str(tmp_path / "file" / "new")]) == 2
    assert f"--init {tmp_path}/file/new: cannot be written to (Not a directory)" in capsys.readouterr().err
