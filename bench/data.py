"""Whether reading from a slow disk is hidden: steps with and without reading ahead, where a read takes long.

    python bench/data.py [--milliseconds 120] [--steps 12] [--rounds 3]

A cold read is simulated: each batch is asked of the files that much later, and the host is free meanwhile, as it is
while a disk works. The batches and the losses of both ways are compared, and must be equal to the bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.data.stream import DataSet, Meta, TokenFile  # noqa: E402
from orchestrate.model.config import ModelConfig  # noqa: E402
from orchestrate.model.gpt import GPT, init_weights  # noqa: E402
from orchestrate.training.run.distributed import Ranks  # noqa: E402
from orchestrate.training.run.run import Run  # noqa: E402
from orchestrate.training.session.start import settings_from  # noqa: E402
from orchestrate.training.settings.config import TrainConfig  # noqa: E402
from orchestrate.training.settings.records import Progress  # noqa: E402


class Slow:
    """Tokens whose every read takes so many seconds more."""

    def __init__(self, tokens: Any, seconds: float) -> None:
        self.tokens, self.seconds, self.dtype = tokens, seconds, tokens.dtype

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        return self.tokens[where]


def steps(folder: Path, ahead: bool, seconds: float, count: int) -> tuple[dict[str, float], list[float]]:
    """Seconds by part of so many steps, behind the first, and their losses."""
    file = TokenFile(folder / "tokens.bin")
    file.tokens = Slow(file.tokens, seconds)
    shape = ModelConfig(block_size=128, vocab_size=256, n_layer=4, n_head=4, n_embd=128)
    model = GPT(shape)
    init_weights(model, 0)
    config = TrainConfig(
        out_dir=str(folder), batch_size=12, block_size=128, gradient_accumulation_steps=1, device="cpu", compile=False
    )
    settings = settings_from(config, shape)
    data = DataSet(file, file, Meta(256))
    run = Run(config, settings, Progress.start(settings), model, data, Ranks("cpu"), torch.device("cpu"))
    if not ahead:
        run.batches.read_ahead = lambda *_: None
    losses = [float(run.step().loss)]
    run.stopwatch.take()
    begin = time.perf_counter()
    losses += [float(run.step().loss) for _ in range(count)]
    return run.stopwatch.take() | {"step": time.perf_counter() - begin}, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=120, help="that a batch takes to be read")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        np.random.default_rng(0).integers(0, 256, 10**6).astype(np.uint16).tofile(Path(name) / "tokens.bin")
        print("| read of a batch | read ahead | data, ms a step | whole step, ms |\n|---|---|---|---|")
        for seconds in (0.0, options.milliseconds / 1000):
            found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            losses = set()
            for _ in range(options.rounds):
                for ahead, parts in found.items():
                    taken, told = steps(Path(name), ahead, seconds, options.steps)
                    parts.append(taken)
                    losses.add(tuple(told))
            assert len(losses) == 1, "both ways must read the same"
            for ahead, parts in found.items():
                data, step = (
                    1000 * statistics.median(p.get(part, 0.0) for p in parts) / options.steps
                    for part in ("data", "step")
                )
                print(f"| {1000 * seconds:.0f} ms | {'yes' if ahead else 'no'} | {data:.1f} | {step:.1f} |")


if __name__ == "__main__":
    main()
