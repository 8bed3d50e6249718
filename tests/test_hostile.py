"""Files that somebody else may have written: what is wrong on purpose is refused, not obeyed.

tests/fuzzing.py makes up cases; what larger runs of it (bench/fuzz.py) found has a test of its own here.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, events
from fuzzing import TARGETS, Workspace, fuzz, in_bounds, seal, write_manifest
from safetensors.torch import load_file, save_file

import train_orchestrated
from orchestrate.data.stream import read_meta, read_remap
from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import from_weights
from orchestrate.model.nanogpt import open_model
from orchestrate.training.schedule import file
from orchestrate.training.settings.config import resolve
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint
from orchestrate.training.store.run_folder import read_run

CASES = {
    "large_schedules": 20,
    "schedule_runs": 30,
    "forged_state": 60,
    "forged_tensors": 40,
    "jsonl": 40,
    "exported_shapes": 40,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_made_up_input_is_accepted_or_refused(workspace, target):
    answers = fuzz(target, workspace, CASES.get(target, 80))
    assert answers["refused"] and answers["accepted"], "cases of both kinds were made"


def _nine_levels(link: str) -> str:
    levels = "".join(f"\n    a{i}: &a{i} {link.replace('@', f'*a{i - 1}')}" for i in range(1, 10))
    return f"- name: set_lr\n  value:\n    a0: &a0 {{x: 1}}{levels}\n"


@pytest.mark.parametrize(
    "text, said",
    [
        (
            _nine_levels("[" + ", ".join(["@"] * 9) + "]"),
            "line 9: not YAML (more than 300,000 values, aliases included)",
        ),
        (_nine_levels("{<<: [" + ", ".join(["@"] * 9) + "]}"), "more than 300,000 values, aliases included"),
        ("- name: set_lr\n  value: &a [1, *a]\n", "line 2: not YAML (*a stands inside &a)"),
        ("- name: set_lr\n  value: " + "[" * 100, "line 2: not YAML (nested more than 40 deep)"),
        ("- name: set_lr\n  value: 0x" + "f" * 10**6, "value must be a valid number, got '0xfff"),
        ("- name: set_lr\n  value: " + "1:" * 10**6 + "1", "value must be a valid number, got '1:1:"),
        ("- name: set_lr\n  value: !!int '" + "9" * 4000 + "'", "a number of 4000 characters"),
        ("- name: set_lr\n  value: 1\n" * 10_001, "a schedule has at most 10,000 entries, got 10,001"),
    ],
)
@pytest.mark.parametrize("base", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_a_short_text_cannot_become_a_long_schedule(text, said, base, monkeypatch):
    monkeypatch.setattr(file, "_Loader", file._loader(base))
    with in_bounds(), pytest.raises(Refused, match=re.escape(said)):
        file.parse_schedule(text, "s.yaml")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 100 + "]" * 100, "nested more than 40 deep"),
        ("[{" + ", ".join(f'"k{i}": 0' for i in range(100_000)) + ', "k7": 1}]', "'k7' is given twice"),
        ('[{"name": "set_lr", "value": ' + "9" * 4000 + "}]", "a number of 4000 characters"),
        ("[" + "0, " * 300_000 + "0]", "more than 300,000 values"),
        (
            '[{"name": "stack_layers", "value": [' + '"x", ' * 100_000 + "0]}]",
            "value.0 must be a valid integer, got 'x'",
        ),
        (" " * (8 * 2**20 + 1), "longer than 8,388,608 bytes"),
    ],
)
def test_a_long_json_schedule_is_refused_soon(text, said, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with in_bounds(), pytest.raises(Refused, match=re.escape(said)) as refused:
        file.read_schedule(tmp_path / "s.json")
    assert len(refused.value.problems) <= 50


@pytest.mark.parametrize("name", ["s.yaml", "s.json"])
def test_the_largest_vocabulary_map_and_a_thousand_entries_are_read(name):
    entries = [{"name": "resize_vocabulary", "value": {"size": 9, "map": [i % 9 for i in range(262_144)]}}]
    entries += [{"name": "set_lr", "value": 1e-3, "at_iter": i} for i in range(1000)]
    with in_bounds():
        read = file.parse_schedule(json.dumps(entries), name)
    assert read.entries[0].operation.value.map[-1] == 262_143 % 9 and len(read.entries) == 1001


def test_a_json_entry_has_the_line_of_its_first_bracket():
    text = '{"b": [1,\n2],\n "operations": [\n {"name": "stop"}, {"name":\n "stop"},\n\n  {"name": "no"}]}'
    with pytest.raises(Refused) as refused:
        file.parse_schedule(text, "s.json")
    assert [problem.split(";")[0] for problem in refused.value.problems] == [
        "s.json: unknown key 'b' beside `operations`",
        "s.json:7: entry 3: unknown operation 'no'",
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("_a = 'abcdefgh'\n" + "_a = _a + _a\n" * 40, ":11: _a: a text of 8192 characters is not a setting"),
        ("_a = 'abcdefgh'\n" + "_a = f'{_a}{_a}'\n" * 40, ":11: _a: a text of 8192 characters is not a setting"),
        ("_a = 99999\n" + "_a = _a * _a\n" * 40, ":7: _a: a whole number of 1064 bits is not a setting"),
        ("_a = 9\n" + "_a = int(str(_a) + str(_a))\n" * 40, "_a: a whole number of 1701 bits is not a setting"),
        ("_a = round(123, -1000000000)", "round to -1000000000 digits"),
        ("batch_size = 0x" + "f" * 5000, "a whole number of 20000 bits is not a setting"),
        ("\n".join(f"k{i} = 1" for i in range(1001)), "at most 1000 statements, got 1001"),
        ("#" * 65_537, "longer than 65,536 bytes"),
        ("import time\nout_dir = time.strftime('" + "%c" * 2000 + "')", "characters is not a setting"),
    ],
)
def test_a_short_configuration_cannot_become_a_long_one(text, said, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with in_bounds(), pytest.raises(Refused, match=re.escape(said)) as refused:
        resolve([tmp_path / "c.py"], [])
    assert len(refused.value.problems) < 60


def test_a_number_too_long_to_be_written_is_refused_from_the_command_line():
    with pytest.raises(Refused, match="max_iters must be a valid integer, got '0xfff"):
        resolve([], [("max_iters", "0x" + "f" * 100_000)])
    with pytest.raises(Refused, match="got a list of too many digits to show"):
        resolve([], [("batch_size", "[0x" + "f" * 100_000 + "]")])


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\x80\x04K\x01r\xff\xff\xff\x7f.", "it numbers a value 2147483647"),  # would take 32 GiB
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "not a plain nanoGPT meta.pkl"),
        (b"cos\nsystem\n(S'touch CANARY'\ntR.", "it names os.system"),
        (b"\x80\x04(ios\nsystem\n.", "more than plain values"),
        (pickle.dumps({"vocab_size": 10**12, "itos": {}}), "needs a vocab_size from 1 to"),
        (pickle.dumps({"vocab_size": 2, "itos": {0: ["a"], 1: "b"}}), "itos must hold texts"),
    ],
)
def test_a_meta_that_asks_for_memory_is_refused(content, said, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    with in_bounds(), pytest.raises(ValueError, match=said):
        read_meta(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_nanogpts_meta_is_read_whatever_wrote_it(protocol, tmp_path):
    made = {"vocab_size": 3, "itos": {0: "a", 1: "\n", 2: "中"}, "stoi": {"a": 0, "\n": 1, "中": 2}, "x": [1.5, None]}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(made, protocol=protocol))
    assert read_meta(tmp_path).itos == ("a", "\n", "中")


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
        (("settings", "fading"), {"ln_f": {"known": 1, "share": 0.5}}, "ln_f cannot fade in"),
        (("settings", "model", "fading"), {}, "model.fading"),
        (("settings", "dropout"), 1.0, "dropout must be less than 1"),
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
            open_model(tmp_path / "ckpt.pt")


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
