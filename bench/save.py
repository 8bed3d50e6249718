"""How long a save stops the run: in the foreground, and in the background (async_save).

    python bench/save.py [--megabytes 160] [--rounds 6]

Builds a run whose weights and moments have that size, and saves it in turns both ways.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.data.stream import DataSet, Meta, TokenFile  # noqa: E402
from orchestrate.model.config import ModelConfig  # noqa: E402
from orchestrate.model.gpt import GPT, init_weights  # noqa: E402
from orchestrate.training.run.distributed import Ranks  # noqa: E402
from orchestrate.training.run.run import Run  # noqa: E402
from orchestrate.training.schedule.file import Schedule  # noqa: E402
from orchestrate.training.schedule.orchestrator import Orchestrator  # noqa: E402
from orchestrate.training.session.session import Session  # noqa: E402
from orchestrate.training.session.start import settings_from  # noqa: E402
from orchestrate.training.session.stopping import NoSignals  # noqa: E402
from orchestrate.training.settings.config import TrainConfig  # noqa: E402
from orchestrate.training.settings.records import Progress  # noqa: E402
from orchestrate.training.store.reporting import Silent  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=160, help="of weights and moments together")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        np.zeros(5000, dtype=np.uint16).tofile(Path(folder) / "tokens.bin")
        tokens = TokenFile(Path(folder) / "tokens.bin")
        width = 256
        # 12 bytes a parameter with its two moments; a block has 12 * width^2.
        layers = max(1, round(options.megabytes * 1e6 / 12 / (12 * width**2)))
        shape = ModelConfig(block_size=16, vocab_size=64, n_layer=layers, n_head=4, n_embd=width)
        model = GPT(shape)
        init_weights(model, 0)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        config = TrainConfig(out_dir=folder, batch_size=1, gradient_accumulation_steps=1, device="cpu", compile=False)
        settings = settings_from(config, shape)
        data = DataSet(tokens, tokens, Meta(64))
        run = Run(config, settings, Progress.start(settings), model, data, Ranks("cpu"), torch.device("cpu"))
        run.step()
        size = sum(p.nbytes for p in run.model.parameters())
        size += sum(t.nbytes for moments in run.optimizer.state_by_name().values() for t in moments.values())
        for _ in range(options.rounds):
            for background in (False, True):
                run.progress.iter += 1
                saves = config.model_copy(update={"async_save": background})
                session = Session(saves, run, Orchestrator(Schedule(), run), Silent(), NoSignals())
                started = time.perf_counter()
                session.save("bench", required=False)
                seconds[background].append(time.perf_counter() - started)
                session.saver.finish()
    print(f"{size / 1e6:.0f} MB of weights and moments, torch {torch.__version__}")
    for background, values in seconds.items():
        name = "in the background" if background else "in the foreground"
        print(f"{name:20} blocks {statistics.median(values):.3f} s   ({min(values):.3f} .. {max(values):.3f})")
    print(f"ratio {statistics.median(seconds[True]) / statistics.median(seconds[False]):.3f} (promised: at most 0.2)")


if __name__ == "__main__":
    main()
