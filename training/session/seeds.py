"""Several seeds of one configuration in one command: a folder each, one run after the other, then mean and spread.

Each run is a process of its own, started with the same arguments; what it saves and how it ends is what any run does.
The same command again goes on where it stopped: a finished seed is not run again, an unfinished one is resumed. This
file trains nothing, and ends no process: a signal that comes here is passed on to the run, which saves and ends.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orchestrate
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.values import shown
from orchestrate.training.store.manifest import find
from orchestrate.training.store.run_folder import EVENTS, RunRecord, read_run, write_whole

SUMMARY = "summary.json"
_POLL_SECONDS = 0.1
_GOES_ON = "max_iters", "early_stopping_patience"
"""Keys by which a finished run may go on."""


class _Alone:
    """The other ranks of a process that has none: a signal is remembered, and agreed on at once."""

    def exchange_later(self, flag: int) -> int:
        return flag


def folder_of(config: TrainConfig, seed: int) -> Path:
    return Path(config.out_dir) / f"seed-{seed}"


def train_seeds(
    config: TrainConfig,
    given: Mapping[str, str],
    arguments: Sequence[str],
    watch: SignalWatch,
    say: Callable[[str], None],
) -> int:
    """Train every seed that is not finished, then write OUT_DIR/summary.json; returns the exit code.

    Args:
        given: where each key was given.
        arguments: of the command line, as each run gets them.
        watch: installed already.
        say: prints a text.

    Raises Refused where a folder holds the run of another configuration. The exit code of a run that did not come to
    its end is returned at once: 128 + N after signal N.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Refused(
            f"seeds {','.join(map(str, config.seeds))}: the runs of several processes cannot follow each other inside "
            "one torchrun: start it once for each seed, with --seed=N --out_dir=OUT_DIR/seed-N, and then this "
            "command without torchrun, which makes the summary"
        )
    if given.get("seed", "").startswith("--"):
        raise Refused("--seed and --seeds are given: each run has its seed from seeds")
    done = {seed: _finished(config, given, folder_of(config, seed)) for seed in config.seeds}
    watch.begin(_Alone())
    for seed in config.seeds:
        if done[seed]:
            say(f"seed {seed}: finished before")
            continue
        code = _train(config, seed, arguments, watch)
        if code:
            return code
    table, facts = summary({seed: read_run(folder_of(config, seed)) for seed in config.seeds})
    path = Path(config.out_dir) / SUMMARY
    write_whole(path, json.dumps(facts, indent=1).encode("utf-8"))
    say(f"{table}\nwritten to {path}")
    return 0


def _train(config: TrainConfig, seed: int, arguments: Sequence[str], watch: SignalWatch) -> int:
    folder = folder_of(config, seed)
    more = ["--seeds=", f"--seed={seed}", f"--out_dir={folder}", *(["--init_from=resume"] if find(folder) else [])]
    # The run imports the same code as this process, installed or not.
    root = str(Path(orchestrate.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "orchestrate", "train", *arguments, *more]
    passed_on = False
    if watch.received:
        return 128 + watch.received
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    while True:
        try:
            code = process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if watch.received and not passed_on:
                process.send_signal(watch.received)
                passed_on = True
        else:
            # A signal that came when the run was at its end ends the command all the same.
            return 128 - code if code < 0 else code or (128 + watch.received if watch.received else 0)


def _finished(config: TrainConfig, given: Mapping[str, str], folder: Path) -> bool:
    """Whether a folder holds a run that came to the end that is asked for now. Raises Refused for another's run."""
    if not (folder / EVENTS).exists():
        return False
    record = read_run(folder)
    recorded, now = record.config or {}, config.model_dump(mode="json")
    for key in given.keys() - {*_GOES_ON, "out_dir", "seed", "seeds", "init_from"}:
        if key in recorded and recorded[key] != now[key]:
            raise Refused(
                f"{folder} holds a run with {key} {shown(recorded[key])}, and {given[key]} says {shown(now[key])}: "
                "seeds are compared with all else equal; give another --out_dir"
            )
    ends = [event for event in record.valid.events if event["kind"] in ("end", "start", "resume")]
    if not ends or ends[-1]["kind"] != "end" or ends[-1]["reason"].startswith("signal"):
        return False
    if ends[-1]["reason"] == "max_iters":
        return ends[-1]["iter"] >= config.max_iters
    return recorded.get("early_stopping_patience") == config.early_stopping_patience


def results(record: RunRecord) -> dict[str, float]:
    """The last value of everything that the evaluations of a run have measured, and the lowest of val_loss."""
    found: dict[str, float] = {}
    for line in record.valid.metrics:
        if line["kind"] == "eval" and "why" not in line:
            for name, value in line.items():
                if (name == "best_val_loss" or name.startswith(("val_loss", "eval/"))) and type(value) in (int, float):
                    found[name] = value
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample: n - 1) and standard error of the mean; null of a single value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    error = None if std is None else std / math.sqrt(len(values))
    return {"n": len(values), "mean": statistics.fmean(values), "std": std, "stderr": error}


def summary(records: Mapping[int, RunRecord]) -> tuple[str, dict[str, Any]]:
    """A table for a person and the same as values for JSON, of what every seed has measured."""
    measured = {seed: results(record) for seed, record in records.items()}
    names = [name for name in next(iter(measured.values())) if all(name in values for values in measured.values())]
    metrics = {name: spread([values[name] for values in measured.values()]) for name in names}
    rows = [["seed", *names], *[[str(seed), *(f"{v[name]:.6g}" for name in names)] for seed, v in measured.items()]]
    for key in ("mean", "std", "stderr"):
        cells = (metrics[name][key] for name in names)
        rows.append([key, *("-" if value is None else f"{value:.6g}" for value in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines), {"seeds": {str(seed): values for seed, values in measured.items()}, "metrics": metrics}
