"""The commands as a user types them: exit codes, messages without traceback, the run folder, samples, W&B offline."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, arguments, events, lines

import sample
import train_orchestrated
from orchestrate.training.settings.errors import Refused


def command(script: str, *args, **keys) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        **keys,
    )


SCHEDULE = [
    {"name": "set_lr", "value": 5e-3, "at_iter": 2, "desc": "lower"},
    {"name": "set_attn_lora_rank", "value": 2, "trigger_loss": 99.0, "reevaluate": True},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "s.json").write_text(json.dumps(SCHEDULE))
    given = arguments(data, folder / "run", schedule=folder / "s.json", file_logging=True)
    assert train_orchestrated.main(given) == 0
    return folder / "run"


def test_exit_code_2_without_a_traceback(data, tmp_path):
    (tmp_path / "s.yaml").write_text("- {name: set_lrr, value: 1}\n- {name: stop, trigger_los: 1}\n")
    for args, expected in [
        (
            ["--n_layers=3", "--dropout=2"],
            ["unknown key n_layers; did you mean n_layer?", "dropout must be less than 1"],
        ),
        ([f"--schedule={tmp_path / 's.yaml'}"], ["s.yaml:1: entry 1", "s.yaml:2: entry 2"]),
        (["--init_from=resume", f"--out_dir={tmp_path}"], ["no complete checkpoint"]),
    ]:
        done = command("train_orchestrated.py", *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
        assert all(text in done.stderr for text in expected), done.stderr


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"dataset": "nowhere"}, "no train.bin and val.bin"),
        ({"n_embd": 15}, "multiple of n_head"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"device": "cuda"}, "sees no CUDA device") if not torch.cuda.is_available() else ({"device": "x"}, "device"),
        ({"init_from": "gpt3"}, "gpt3"),
        ({"block_size": 9999}, "too few for block_size"),
        ({"attn_lora_rank": 99}, "LoRA rank of attn.0 must be from 1 to 16"),
        ({"schedule": "none.yaml"}, "cannot be read"),
        ({"backend": "nccl2"}, None),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, keys, message):
    given = arguments(data, tmp_path / "run", **keys)
    if message is None:
        assert train_orchestrated.main([*given, "--max_iters=1"]) == 0  # one process needs no backend
        return
    with pytest.raises(Refused, match=message):
        train_orchestrated.main(given)
    assert not (tmp_path / "run").exists()


def test_plan_trains_nothing(data, tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps([*SCHEDULE, {"name": "freeze_layer", "value": "mlp.*"}]))
    code = train_orchestrated.main([*arguments(data, tmp_path / "run", schedule=tmp_path / "s.json"), "--plan"])
    shown = capsys.readouterr().out
    assert code == 0 and not (tmp_path / "run").exists()
    assert "3 entries, no errors" in shown and "learning_rate 0.01 -> 0.005" in shown and "trigger_loss 99" in shown
    (tmp_path / "s.json").write_text('[{"name": "freeze_layer", "value": "mlp.9"}]')
    with pytest.raises(Refused, match="mlp.9"):
        train_orchestrated.main([*arguments(data, tmp_path / "run", schedule=tmp_path / "s.json"), "--plan"])


def test_the_run_folder(trained):
    assert {"config.json", "schedule.yaml", "metrics.jsonl", "events.jsonl", "checkpoints"} <= {
        p.name for p in trained.iterdir()
    }
    assert json.loads((trained / "config.json").read_text())["n_layer"] == 2
    assert json.loads((trained / "schedule.yaml").read_text()) == SCHEDULE
    metrics = lines(trained / "metrics.jsonl")
    train = [record for record in metrics if record["kind"] == "train"]
    assert [record["iter"] for record in train] == list(range(1, 13))
    for field in (
        "tokens",
        "seconds",
        "loss",
        "lr",
        "batch_size",
        "grad_accum",
        "tokens_per_second",
        "coverage",
        "machine",
    ):
        assert field in train[0], field
    parts = {"data", "forward_backward", "optimizer", "eval", "operation", "checkpoint"}
    assert set(train[0]["seconds_by_part"]) == parts and train[-1]["tokens"] == 12 * 8 * 16
    for before, line in zip([{"tokens": 0}, *train], train, strict=False):  # what a step waits for, and nothing beside
        seconds = sum(line["seconds_by_part"][part] for part in ("data", "forward_backward", "optimizer"))
        assert line["tokens_per_second"] == pytest.approx((line["tokens"] - before["tokens"]) / seconds, rel=1e-3)
    evals = [record for record in metrics if record["kind"] == "eval"]
    assert [(r["iter"], r.get("why")) for r in evals] == [
        (0, None),
        (4, None),
        (4, "after an operation"),
        (8, None),
        (12, None),
    ]
    assert evals[1]["val_loss"] == pytest.approx(evals[2]["val_loss"], abs=1e-5)
    first, second = events(trained, "operation")
    expected = {"name": "set_lr", "value": 5e-3, "iter": 2, "reason": "iteration 2 (at_iter 2)", "desc": "lower"}
    expected |= {"settings_before": {"learning_rate": 0.01}, "settings_after": {"learning_rate": 0.005}}
    assert first | expected == first
    assert second["val_loss_before"] == evals[1]["val_loss"] and second["val_loss_after"] == evals[2]["val_loss"]
    assert second["parameters_trainable"] < second["parameters_total"]
    kinds = [record["kind"] for record in lines(trained / "events.jsonl")]
    assert kinds[0] == "start" and kinds[-1] == "end" and "NaN" not in (trained / "metrics.jsonl").read_text()
    assert "val loss" in (trained / "run.log").read_text()


def test_plain_lines_name_what_is_next(data, tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps([{"name": "set_lr", "value": 1e-3, "at_iter": 99}]))
    train_orchestrated.main(arguments(data, tmp_path / "run", schedule=tmp_path / "s.json", max_iters=2))
    out = capsys.readouterr().out
    assert "iter 1: loss " in out and "tok/s" in out and "next [1] set_lr\n" in out


def test_sample(trained, capsys, tmp_path):
    args = [f"--out_dir={trained}", "--num_samples=2", "--max_new_tokens=20", "--start=To be", "--device=cpu"]
    assert sample.main(args) == 0
    first = capsys.readouterr().out
    assert first.startswith("To be") and first.count("---------------") == 2
    assert sample.main(args) == 0 and capsys.readouterr().out == first
    assert sample.main([*args, "--seed=7"]) == 0 and capsys.readouterr().out != first
    (tmp_path / "p.txt").write_text("that is")
    assert sample.main([*args, f"--start=FILE:{tmp_path / 'p.txt'}", "--checkpoint=best", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("that is")


def test_samples_differ_from_each_other(trained, capsys):
    """And the first is the same whatever their number."""
    args = [f"--out_dir={trained}", "--max_new_tokens=30", "--start=To be", "--device=cpu", "--temperature=1.5"]

    def drawn(number: int) -> list[str]:
        assert sample.main([*args, f"--num_samples={number}"]) == 0
        return [text.strip("\n") for text in capsys.readouterr().out.split("---------------\n")[:-1]]

    three = drawn(3)
    assert len(set(three)) == 3 and drawn(1) == three[:1]
    assert {len(text) for text in three} == {35}, "the prompt and 30 characters"


def test_samples_of_several_prompts(trained, capsys, tmp_path, monkeypatch):
    """Of a file or of standard input, in any batch; each as of its prompt alone."""
    args = [f"--out_dir={trained}", "--num_samples=2", "--max_new_tokens=20", "--device=cpu", "--top_p=0.8",
            "--repetition_penalty=1.1"]  # fmt: skip

    def told(*more: str) -> str:
        assert sample.main([*args, *more]) == 0
        return capsys.readouterr().out

    (tmp_path / "p.txt").write_text("To be\r\n\nor not\n", newline="")
    alone = told("--start=To be") + told("--start=or not")
    assert alone.count("---------------\n") == 4 and alone != told("--start=To be", "--top_p=0.1")
    assert told(f"--prompts={tmp_path / 'p.txt'}") == told(f"--prompts={tmp_path / 'p.txt'}", "--batch_size=3") == alone
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"or not\nTo be")))
    assert told("--prompts=-") == told("--start=or not") + told("--start=To be")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"be\nTo")))
    assert told("--start=-").startswith("be\nTo")


def test_a_stop_string_ends_a_sample_and_pieces_are_flushed(trained, capsys, monkeypatch):
    args = [f"--out_dir={trained}", "--num_samples=1", "--max_new_tokens=40", "--start=To be", "--device=cpu"]
    assert sample.main(args) == 0
    whole = capsys.readouterr().out
    stop = whole[15:18]
    assert sample.main([*args, f"--stop={stop}", "--stop=\\n\\n\\t"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop, 5)] + "\n---------------\n"
    flushed = []
    monkeypatch.setattr("builtins.print", lambda text, end, flush: flushed.append((text, end, flush)))
    assert sample.main([*args, "--stream"]) == 0
    assert "".join(text + end for text, end, _ in flushed) == whole
    assert len(flushed) == 40 and all(flush for *_, flush in flushed)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--start=§"], "character '§'"),
        (["--num_samples=0"], "num_samples: must be at least 1"),
        (["--temperature=nan"], "temperature: must be at least 0"),
        (["--top_p=0"], "--top_p: must be above 0 and at most 1, got 0.0"),
        (["--top_p=1.01"], "--top_p: must be above 0 and at most 1, got 1.01"),
        (["--init_from=gpt2", "--checkpoint=best"], "--checkpoint best: gpt2 is no run folder and has none"),
        (["--repetition_penalty=-1"], "--repetition_penalty: must be positive and finite, got -1.0"),
        (["--stop="], "--stop: the text is empty"),
        (["--batch_size=0"], "--batch_size: must be at least 1"),
        (["--start=a", "--prompts=b"], "--start and --prompts: give one of them"),
        (["--prompts=nowhere.txt"], "--prompts: nowhere.txt cannot be read"),
        ([f"--prompts={os.devnull}"], "--prompts: there is no line that is not empty"),
        ([f"--start=FILE:{sys.executable}"], "is not UTF-8"),
        ([f"--prompts={__file__}"], "prompt 1: the character"),
        (["--start="], "prompt is empty"),
        (["--out_dir=nowhere"], "no complete checkpoint"),
        (["--init_from=nothing"], "nothing"),
        (["--checkpoint=iter_9"], "no checkpoint 'iter_9'; there are iter_000000012, iter_000000008"),
    ],
)
def test_sample_refuses_with_a_message(trained, args, message):
    with pytest.raises(ValueError, match=message):
        sample.main([f"--out_dir={trained}", "--device=cpu", *args])


def test_sample_command_exits_with_2(trained):
    done = command("sample.py", f"--out_dir={trained}", "--start=§")
    assert done.returncode == 2 and done.stderr.startswith("error: the character") and "Traceback" not in done.stderr


def test_shrunken_vocabulary(data, tmp_path, capsys):
    import numpy as np

    meta = json.loads((data / "meta.json").read_text())
    np.save(tmp_path / "r.npy", np.minimum(np.arange(meta["vocab_size"]), 9))
    keys = dict(shrunken_vocab_size=10, vocab_remapping_file=tmp_path / "r.npy", max_iters=3)
    assert train_orchestrated.main(arguments(data, tmp_path / "run", **keys)) == 0
    assert events(tmp_path / "run", "start")[0]["settings"]["model"]["vocab_size"] == 10
    assert sample.main([f"--out_dir={tmp_path / 'run'}", "--start=T", "--num_samples=1", "--max_new_tokens=5"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_128_plus_n(data, tmp_path, number):
    args = arguments(data, tmp_path / "run", max_iters=100000, eval_interval=50000)
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "train_orchestrated.py"), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.02)
        os.kill(job.pid, number)
        _, stderr = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 128 + number and b"Traceback" not in stderr
    saved = events(tmp_path / "run", "checkpoint")[-1]
    assert saved["reason"] == f"signal {int(number)}" and (tmp_path / "run" / saved["path"] / "manifest.json").exists()


def test_wandb_offline_continues_the_same_run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = dict(wandb_log=True, wandb_project="test", wandb_run_name="tiny", max_iters=4)
    assert train_orchestrated.main(arguments(data, tmp_path / "run", **keys)) == 0
    first = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())["wandb_id"]
    assert train_orchestrated.main(["--init_from=resume", f"--out_dir={tmp_path / 'run'}", "--max_iters=6"]) == 0
    second = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())["wandb_id"]
    assert first and first == second
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(first) for name in folders)
