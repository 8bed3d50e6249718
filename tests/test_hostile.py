"""Files that somebody else may have written: what is wrong on purpose is refused, not obeyed.

tests/fuzzing.py makes up cases; what larger runs of it (bench/fuzz.py) found has a test of its own here.
"""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, events
from fuzzing import TARGETS, Workspace, fuzz, seal, write_manifest
from safetensors.torch import load_file, save_file

import train_orchestrated
from orchestrate.data.stream import read_remap
from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import from_weights
from orchestrate.model.nanogpt import config_from_checkpoint
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint
from orchestrate.training.store.run_folder import read_run

CASES = {"schedule_runs": 30, "forged_state": 60, "forged_tensors": 40, "jsonl": 40}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_made_up_input_is_accepted_or_refused(workspace, target):
    answers = fuzz(target, workspace, CASES.get(target, 80))
    assert answers["refused"] and answers["accepted"], "cases of both kinds were made"


@pytest.fixture
def copy(workspace, tmp_path):
    """(run folder, its only checkpoint), to be changed."""
    shutil.copytree(workspace.run, tmp_path / "run", symlinks=True)
    return tmp_path / "run", tmp_path / "run" / "checkpoints" / "iter_000000004"


def resume(out, *more: str) -> int:
    return train_orchestrated.main(["--init_from=resume", f"--out_dir={out}", "--max_iters=6", *more])


def test_moments_of_another_model_are_refused(copy):
    out, folder = copy
    moments = load_file(folder / "optimizer.safetensors")
    moments["transformer.ln_f.weight|exp_avg"] = torch.zeros(3)
    save_file(moments, folder / "optimizer.safetensors")
    seal(folder)
    with pytest.raises(Refused, match=r"ln_f.weight\|exp_avg has shape \(3,\), expected \(16,\)"):
        resume(out)


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("progress", "surprise"), 1, "surprise"),
        (("settings", "batch_size"), -3, "batch_size"),
        (("settings", "learning_rate"), float("nan"), "learning_rate"),
        (("settings", "model", "n_layer"), 10**9, "n_layer must be a whole number from 1 to"),
        (("settings", "model", "lora"), {"attn.0": {"rank": 2, "alpha": float("inf")}}, "alpha"),
        (("settings", "model", "fading"), {"ln_f": {"known": 1, "share": 0.5}}, "ln_f cannot fade in"),
        (("orchestrator", "position", "watches"), [{"entry": 1, "name": "set_lr", "loss_before": 1.0, "limit": 1.0,
          "until_iter": 5, "then": "revert", "checkpoint": "../../elsewhere"}], "checkpoint"),
        (("orchestrator", "ramps", 0, "fields"), {"secret": [0.0, 1.0]}, "a ramp of set_lr does not fit"),
        (("orchestrator", "ramps", 0, "over"), 0, "over"),
        (("log_sizes", "events.jsonl"), 0.0, "log_sizes"),
    ],
)  # fmt: skip
def test_a_state_that_was_not_saved_is_refused(copy, path, value, said):
    out, folder = copy
    state = json.loads((folder / "state.json").read_text())
    inner = state
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "iter": 5}\n')  # of an iteration that the checkpoint does not know
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(Refused, match=said):
        resume(out)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before, "nothing was written"


def test_a_checkpoint_does_not_choose_where_files_are_written(copy, tmp_path):
    out, folder = copy
    state = json.loads((folder / "state.json").read_text())
    state["config"].update(file_logging=True, log_dir=str(tmp_path / "elsewhere"))
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    assert resume(out) == 0
    assert not (tmp_path / "elsewhere").exists() and (out / "run.log").exists()
    assert "does not choose" in events(out, "override")[-1]["reason"]


def test_lines_of_a_log_that_are_no_records_are_let_be(copy):
    out, _ = copy
    with open(out / "events.jsonl", "a") as file:
        file.write('null\n["x"]\n' + "[" * 5000 + "\n3\n")
    assert resume(out) == 0
    record = read_run(out)
    assert record.events[-1]["kind"] == "end" and record.foreign == {"metrics.jsonl": 0, "events.jsonl": 3}


def test_an_older_format_is_read_and_a_newer_one_refused(copy):
    out, folder = copy
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT == 3
    state = json.loads((folder / "state.json").read_text())
    del state["operations"]  # what came with format 3
    state["progress"]["samples"] = state["progress"].pop("cursor")["sample"]
    (folder / "state.json").write_text(json.dumps(state))
    for older in (1, 2):
        write_manifest(folder, {**manifest, "format": older})
        seal(folder)
        assert "sha256" not in json.loads((folder / "manifest.json").read_text())
        assert resume(out, "--eval_only") == 0
    write_manifest(folder, {**manifest, "format": 4})
    with pytest.raises(Refused, match="format 4, this version reads 1, 2 and 3"):
        resume(out)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x10\x00{'a\x00", b"\x93NUMPY\x01\x00\x04\x00(\n\n("])
def test_a_broken_vocabulary_map_is_refused(tmp_path, content):
    (tmp_path / "map.npy").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable"):
        read_remap(tmp_path / "map.npy", None, 3)


def test_a_vocabulary_map_is_not_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()], dtype=object), allow_pickle=True)
    (tmp_path / "map.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a readable"):
        read_remap(tmp_path / "map.npy", None, 3)


def test_a_broken_ckpt_is_refused(tmp_path):
    torch.save({"model_args": {}, "model": {"w": torch.zeros(3)}}, tmp_path / "ckpt.pt")
    content = (tmp_path / "ckpt.pt").read_bytes()
    for at in range(0, len(content), 37):
        (tmp_path / "ckpt.pt").write_bytes(content[:at] + content[at + 1 :])
        with pytest.raises(ValueError, match="ckpt.pt"):
            config_from_checkpoint(tmp_path / "ckpt.pt")


_FAR = '{"kind": "train", "iter": 99999999999, "tokens": 1, "seconds": 1.0, "loss": 2.0}'


@pytest.mark.parametrize(
    "line, said",
    [
        ("[" * 5000, "not a line of metrics"),
        ('{"kind": "eval", "iter": 1e400}', "not a line of metrics"),
        ("null", "not a line of metrics"),
        (_FAR, "iter must be from 0 to 10000000"),
    ],
)
def test_a_plan_against_lines_that_are_no_metrics_is_refused(copy, workspace, line, said):
    out, _ = copy
    with open(out / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    keys = workspace.arguments(out_dir=out.parent / "new", schedule=workspace.folder / "s.json")
    with pytest.raises(Refused, match=rf"--against .*metrics.jsonl:\d+: {said}"):
        train_orchestrated.main([*keys, "--plan", "--against", str(out)])


def test_weights_must_be_tensors_of_numbers():
    config = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5)
    for value in (None, torch.zeros(5, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="'transformer.wte.weight' is no tensor of floating-point numbers"):
            from_weights(config, {"transformer.wte.weight": value})


@pytest.mark.parametrize("key", ["n_layer", "block_size", "n_embd", "n_head", "n_hidden"])
def test_a_slip_of_the_pen_is_told_at_once(data, key, tmp_path):
    keys = {**TINY, key: 10**11, "dataset": data, "out_dir": tmp_path / "run"}
    with pytest.raises(Refused, match=f"{key} must be a whole number from 1 to"):
        train_orchestrated.main([*(f"--{k}={v}" for k, v in keys.items()), "--plan"])
