"""What a step holds in memory: weights, optimizer, and the peak of one step, for what saves memory and without it.

    python bench/memory.py [--n_layer 12] [--n_embd 768] [--block_size 256] [--batch_size 4] [--rank 8] [--resident]

On CUDA the peak is the allocator's. On a CPU it is counted: every storage that an operation of torch makes, for as long
as it is there. Buffers inside of kernels are not in it.

With --resident (Linux): a Llama folder in bfloat16 with random weights is made, opened with adapters, and trained for a
step, in a process for each type of the weights that rest. What is measured is what the system counts as resident,
beyond a process that has done the same with a very small model, and so has all libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.model.config import ModelConfig  # noqa: E402
from orchestrate.model.families import FAMILIES  # noqa: E402
from orchestrate.model.gpt import GPT  # noqa: E402
from orchestrate.training.run.distributed import Ranks  # noqa: E402
from orchestrate.training.run.run import Run  # noqa: E402
from orchestrate.training.schedule.file import Schedule  # noqa: E402
from orchestrate.training.session.opening import open_run  # noqa: E402
from orchestrate.training.session.start import opened  # noqa: E402
from orchestrate.training.settings.config import TrainConfig  # noqa: E402


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made inside the block and that are still there; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:  # no view, and not changed in place
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(address)
            self.now -= size

        weakref.finalize(storage, gone)


class OnDevice(AbstractContextManager):
    """The same of CUDA's allocator."""

    def __enter__(self) -> OnDevice:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated() - self._before


def held(run: Run) -> tuple[int, int]:
    """Bytes of the weights, and of what the optimizer keeps."""
    slots = (value for parts in run.optimizer.state_by_name().values() for value in parts.values())
    return sum(p.nbytes for p in run.model.parameters()), sum(value.nbytes for value in slots)


def measure(run: Run) -> tuple[int, float]:
    """Bytes at the peak of a step beyond those before it, gradients among them, and the seconds of another step."""
    run.step()  # the optimizer makes its slots in the first
    with OnDevice() if run.device.type == "cuda" else Live() as meter:
        run.step()
    started = time.perf_counter()
    run.step()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return meter.peak, time.perf_counter() - started


def data_set(folder: Path, vocab_size: int) -> str:
    """Random tokens: what they are costs nothing."""
    ids = np.random.default_rng(0).integers(0, vocab_size, 200_000).astype(np.uint16)
    for name in ("train", "val"):
        ids.tofile(folder / f"{name}.bin")
    meta = {"format": 1, "vocab_size": vocab_size, "dtype": "uint16", "tokenizer": "char"}
    (folder / "meta.json").write_text(json.dumps({**meta, "itos": [chr(256 + i) for i in range(vocab_size)]}), "utf-8")
    return str(folder)


def rows(rank: int) -> list[tuple[str, dict[str, Any]]]:
    """What is compared: name and keys."""
    adapters = {"attn_lora_rank": rank, "mlp_lora_rank": rank, "embedding_rank": rank}
    again = {"activation_checkpointing": True}
    return [
        ("all weights train", {}),
        ("... activation_checkpointing", again),
        (f"LoRA of rank {rank} everywhere", adapters),
        ("... activation_checkpointing", {**adapters, **again}),
        ("... and weights_dtype=bfloat16", {**adapters, **again, "weights_dtype": "bfloat16"}),
    ]


def llama_folder(folder: Path, config: ModelConfig) -> None:
    """A Hugging Face folder of this shape in bfloat16, which is never in memory as anything longer."""
    family = FAMILIES["llama"]
    with torch.device("meta"):
        shapes = family.to_hf(config, {name: p.detach() for name, p in GPT(config).named_parameters()})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(value.shape, dtype=torch.bfloat16)
        if value.ndim == 1
        else torch.empty(value.shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
        for name, value in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(config)), "utf-8")


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory; VmHWM: the most that there were."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])


def one_resident(small: TrainConfig, config: TrainConfig) -> dict[str, float]:
    """Of this process alone: what is there once the run is open, and the peaks until then and of a step."""

    def open_one(config: TrainConfig) -> Run:
        config, foreign = opened(config)
        return open_run(config, None, Schedule(), Ranks("cpu"), foreign)

    open_one(small).step()
    before = resident()
    run = open_one(config)
    whole, opening = resident() - before, resident("VmHWM") - before
    loss = run.step().loss
    weights, slots = held(run)
    return {"parameters": run.parameter_counts()[0], "weights": weights, "optimizer": slots, "open": whole,
            "opening": opening, "peak": resident("VmHWM") - before, "loss": float(loss)}  # fmt: skip


def compare_resident(shape: dict[str, Any], keys: dict[str, Any], rank: int) -> None:
    """The table of --resident."""
    print("| weights that rest | parameters | weights, MB | bytes a weight | optimizer, MB | run open, MB | peak until "
          "then, MB | peak with a step, MB | bytes a weight | loss |")  # fmt: skip
    print("|---" * 10 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small = {"n_layer": 1, "n_embd": 16, "n_head": 2}
        for name, sizes in (("small", {**shape, **small}), ("whole", shape)):
            (Path(folder) / name).mkdir()
            config = ModelConfig(**sizes, **FAMILIES["llama"].preset, tie_weights=False)
            llama_folder(Path(folder) / name, config)
        adapters = dict(lora_targets="all-linear", lora_rank=rank, activation_checkpointing=True)
        keys = {**keys, **adapters, "block_size": shape["block_size"]}
        for kind in ("float32", "bfloat16"):
            asked = [{**keys, "weights_dtype": kind, "init_from": f"{folder}/{name}"} for name in ("small", "whole")]
            command = [sys.executable, __file__, "--one", json.dumps(asked)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            count, loss = found.pop("parameters"), found.pop("loss")
            weights, optimizer, *sizes = (f"{value / 1e6:,.0f}" for value in found.values())
            facts = [f"{count:,}", weights, f"{found['weights'] / count:.2f}", optimizer, *sizes]
            print("|", " | ".join([kind, *facts, f"{found['peak'] / count:.2f}", f"{loss:.4f}"]), "|", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in dict(n_layer=12, n_embd=768, n_head=12, block_size=256, batch_size=4, vocab_size=8192).items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    shape = vars(parser.parse_args(arguments))
    rank, one, at_size = shape.pop("rank"), shape.pop("one"), shape.pop("resident")
    if one:
        print(json.dumps(one_resident(*(TrainConfig(**keys) for keys in json.loads(one)))))
        return
    if at_size:
        with tempfile.TemporaryDirectory() as folder:
            keys = {key: shape.pop(key) for key in ("dtype", "batch_size")}
            fixed = dict(dataset=data_set(Path(folder), shape["vocab_size"]), gradient_accumulation_steps=1)
            compare_resident(shape, {**fixed, **keys, "compile": False, "device": "cpu"}, rank)
        return
    vocab_size = shape.pop("vocab_size")
    print("| run | parameters | weights, MB | bytes a weight | optimizer, MB | peak of a step, MB | s a step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        fixed = dict(dataset=data_set(Path(folder), vocab_size), gradient_accumulation_steps=1, compile=False)
        for name, keys in rows(rank):
            config = TrainConfig(**fixed, **shape, **keys)
            run = open_run(config, None, Schedule(), Ranks("cuda" if torch.cuda.is_available() else "cpu"))
            peak, seconds = measure(run)
            weights, slots = held(run)
            count = run.parameter_counts()[0]
            facts = [f"{count:,}", f"{weights / 1e6:.1f}", f"{weights / count:.2f}", f"{slots / 1e6:.1f}"]
            print("|", " | ".join([name, *facts, f"{peak / 1e6:.1f}", f"{seconds:.2f}"]), "|", flush=True)
            del run


if __name__ == "__main__":
    main()
