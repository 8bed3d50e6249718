"""What the tests share: a tiny data set, a tiny run inside this process, and two gloo processes with a time limit."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_orchestrated
from orchestrate.data.mixture import Sources
from orchestrate.data.stream import Meta, open_data
from orchestrate.data.tokenizer import END_OF_TEXT
from orchestrate.training.run.run import Run
from orchestrate.training.session.start import model_config_from, settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.records import Progress
from orchestrate.training.store.run_folder import EVENTS, METRICS, read_run
from orchestrate.training.store.state import ScheduleText, State

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted({*(ROOT / "schedules").glob("*.yaml"), *(ROOT / "schedules").glob("*.json")})
SHIPPED.remove(ROOT / "schedules" / "schema.json")
"""The schedules that come with the project."""
# Models this small are fastest on one thread, and threads that wait for each other make a busy machine crawl.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer.\n" * 60

TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": 12,
    "lr_decay_iters": 12,
    "warmup_iters": 2,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "eval_interval": 4,
    "eval_iters": 3,
    "log_interval": 1,
    "device": "cpu",
    "report": False,
    "compile": False,
}


def write_data(folder: Path, documents: bool = False) -> Path:
    """A character-level data set of the tests' own text; with `documents` what ends a line ends a document."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(c) for c in TEXT], dtype=np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    itos = [END_OF_TEXT if documents and c == "\n" else c for c in characters]
    meta = {"format": 1, "vocab_size": len(characters), "dtype": "uint16", "tokenizer": "char", "itos": itos}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    return folder


def sources(data: Path) -> Sources:
    """That data set twice, under the names that the examples of operations have; its lines are documents."""
    one = open_data(str(data), 16)
    meta = replace(one.meta, itos=(END_OF_TEXT, *one.meta.itos[1:]))
    return Sources({name: replace(one, name=name, meta=meta) for name in ("first", "second")})


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


def arguments(data: Path, out_dir: Path, **keys) -> list[str]:
    """A command line for a tiny run."""
    values = {**TINY, "dataset": data, "out_dir": out_dir, **keys}
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def tiny(data, tmp_path):
    """tiny(schedule=[...], **keys) trains a tiny run inside this process and returns (exit code, run folder)."""

    def launch(schedule=None, out="run", **keys):
        out_dir = tmp_path / out
        if schedule is not None:
            path = tmp_path / f"{out}.json"
            path.write_text(json.dumps(schedule), "utf-8")
            keys["schedule"] = path
        return train_orchestrated.main(arguments(data, out_dir, **keys)), out_dir

    launch.folder = lambda out: tmp_path / out
    return launch


@pytest.fixture
def resume():
    """resume(run folder, **overrides) goes on with a run inside this process and returns the exit code."""

    def launch(out_dir, **keys):
        given = [f"--{key}={value}" for key, value in keys.items()]
        return train_orchestrated.main(["--init_from=resume", f"--out_dir={out_dir}", *given])

    return launch


def lines(path: Path) -> list[dict]:
    """All lines of a run folder's metrics.jsonl or events.jsonl, each as run_folder.py says that it is."""
    record = read_run(path.parent)
    assert not record.foreign[path.name], f"{path}: lines that are none"
    return record.metrics if path.name == METRICS else record.events


def events(out_dir: Path, kind: str) -> list[dict]:
    """The events of a kind that are not void."""
    return [event for event in lines(out_dir / EVENTS) if event["kind"] == kind and not event.get("void")]


def state_of(run: Run | None = None, **progress) -> State:
    """What a session would save of this run, or of a tiny one with this progress; with a schedule of nothing."""
    config = run.config if run else TrainConfig(n_layer=1, n_head=1, n_embd=4, block_size=4)
    settings = run.settings if run else settings_from(config, model_config_from(config, 5))
    return State(
        config=config,
        settings=settings,
        progress=run.progress if run else Progress(settings.cursor(0), **progress),
        orchestrator={"position": {"fired": 0}, "ramps": []},
        schedule=ScheduleText("", ""),
        scaler={},
        wandb_id=None,
        log_sizes={},
        data={},
        tokenizer=Meta(5),
        world_size=1,
    )


def tensors(out_dir: Path, name: str = "latest") -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint."""
    from safetensors.torch import load_file

    folder = out_dir / "checkpoints" / name
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


_DISTRIBUTED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")


def _on_rank(function, rank: int, world_size: int, port: int, args: tuple, results) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def on_ranks(function, *args, world_size: int = 2, seconds: float = 180.0) -> list:
    """function(rank, *args) on gloo processes; their results in order. A deadlock fails after `seconds`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # Imported once, in a process that runs nothing: each rank is a fork of it.
    context.set_forkserver_preload(["train_orchestrated", "peft", *_DISTRIBUTED])
    results = context.Queue()
    processes = [
        context.Process(target=_on_rank, args=(function, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        got = [results.get(timeout=seconds) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    errors = [f"rank {rank}:\n{error}" for rank, _, error in got if error]
    assert not errors, "\n".join(errors)
    return [value for _, value, _ in sorted(got, key=lambda item: item[0])]
