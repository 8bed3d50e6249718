"""What analyses cost: a step without them, one that keeps the noise scale up, one seen from near, and an analysis.

    python bench/analysis.py CONFIG.py [--rounds 5] [--KEY=VALUE ...]

In turns inside one process; medians in seconds, and each as a share of a step without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step import make_run

from orchestrate.training.run.analysis import analyze
from orchestrate.training.settings.config import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--rounds", type=int, default=5)
    options, rest = parser.parse_known_args()
    keys = [(key.removeprefix("--"), value) for key, _, value in (text.partition("=") for text in rest)]
    with tempfile.TemporaryDirectory() as folder:
        config, _ = resolve([options.config], [*keys, ("out_dir", folder)])
        tokens = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 65, 200_000).astype(np.uint16).tofile(tokens)
        runs = {every: make_run(config.model_copy(update={"analyze_interval": every}), tokens) for every in (0, 1)}
        work: dict[str, Callable[[], object]] = {
            "a step": lambda: runs[0].step(),
            "with the noise scale": lambda: runs[1].step(),
            "seen from near": lambda: runs[1].step(near=True),
            "an analysis": lambda: analyze(runs[1]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(options.rounds + 1):
            for name, call in work.items():
                began = time.perf_counter()
                call()
                if runs[0].device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - began)
        total, s = runs[0].parameter_counts()[0], runs[0].settings
        print(f"{total:,} parameters, {s.tokens_per_iter:,} tokens in a step, {runs[0].device}")
        step = statistics.median(seconds["a step"])
        for name, values in seconds.items():
            median = statistics.median(values)
            print(f"| {name} | {median:.3f} s | {median / step:.2f} | {min(values):.3f} to {max(values):.3f} |")


if __name__ == "__main__":
    main()
