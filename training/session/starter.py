"""--init: a commented configuration and schedule to start from, which plan and train as they are.

The comments on keys are those of the help. What is there already is never overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from orchestrate.training.schedule.file_schema import json_schema
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused

_BY_OTHERS = "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps learning_rate min_lr".split()
"""Keys that weights from elsewhere, or `depth`, have a say in."""
_SCHEDULE = """\
# What changes while the run trains. Entries fire in this order, each when one of its triggers holds; the log says so.
# `--plan` shows what comes of it before anything trains. docs/operations.md has every operation, trigger and field.
# yaml-language-server: $schema=schema.json

- name: change_grad_accum          # what is done: twice the micro-steps, so a batch of twice the tokens
  value: 2
  trigger_plateau: {{evals: 3, min_delta: 0.01}}   # when: the validation loss has stopped falling ...
  max_wait_iters: {quarter}{pad}# ... or after so many iterations in any case
  desc: a larger batch for a smoother gradient

- name: change_lr                  # half of the learning rate, reached gently
  value: 0.5
  over: {twentieth}
  max_wait_iters: {quarter}
  reevaluate: true                 # measure the validation loss right before and after, and log both

# More to try. Take the "# " away from an entry to have it.
#
# - name: stack_layers             # a deeper model that computes the same at first, taken back where it hurts
#   value: {{times: 2}}
#   max_wait_iters: {twentieth}
#   guard: {{max_increase: 0.1, within_iters: {twentieth}, then: revert}}
#
# - name: freeze_layer             # the lowest block trains no more
#   value: block.0
#   max_wait_iters: {twentieth}
#
# - name: stop                     # end the run once it is good enough
#   trigger_loss: 1.5
"""


def write(folder: str | Path, config: TrainConfig, given: Collection[str]) -> list[Path]:
    """Write config.py, schedule.yaml and the schedule's schema.json; returns their paths. Raises Refused.

    Args:
        given: the keys of the configuration that are written as they are; of the others those that a start should know.
    """
    folder, iters = Path(folder), config.max_iters if "max_iters" in given else 2000
    texts = {
        "config.py": _config(folder, config, given, iters),
        "schedule.yaml": _schedule(iters),
        "schema.json": json.dumps(json_schema(), indent=1) + "\n",
    }
    if there := [str(folder / name) for name in texts if (folder / name).exists()]:
        raise Refused(f"--init {folder}: {', '.join(there)} would be overwritten; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with open(folder / name, "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise Refused(f"--init {folder}: cannot be written to ({error.strerror})") from None
    return [folder / name for name in texts]


def _groups(folder: Path, iters: int) -> dict[str, dict[str, Any]]:
    """The keys that a start should know, and values to begin with, by what they are about."""
    return {
        "Where things go, and what it learns from.": {
            "out_dir": str(folder / "run"),
            "schedule": str(folder / "schedule.yaml"),
            "dataset": "shakespeare_char",
        },
        "The model: small enough for a CPU.": {
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 128,
            "block_size": 64,
            "dropout": 0.0,
        },
        "What one iteration is.": {"batch_size": 12, "gradient_accumulation_steps": 1},
        "The learning rate, and for how long.": {
            "learning_rate": 1e-3,
            "min_lr": 1e-4,
            "warmup_iters": iters // 20,
            "max_iters": iters,
            "lr_decay_iters": iters,
        },
        "How often it is looked at.": {
            "eval_interval": max(1, iters // 20),
            "eval_iters": 20,
            "log_interval": max(1, iters // 100),
        },
        "The machine.": {"device": "auto", "compile": False},
    }


def _config(folder: Path, config: TrainConfig, given: Collection[str], iters: int) -> str:
    left = {key: getattr(config, key) for key in TrainConfig.model_fields if key in given}
    decided = _BY_OTHERS if config.depth or config.init_from != "scratch" else ()
    lines = ['"""A run to start from. --help explains every key, and the command line overrides what stands here."""']
    for title, keys in _groups(folder, iters).items():
        values = {key: left.pop(key, value) for key, value in keys.items() if key in left or key not in decided}
        lines += ["", f"# {title}", *_assignments(values)] if values else []
    lines += ["", "# As it was given.", *_assignments(left)] if left else []
    return "\n".join(lines) + "\n"


def _assignments(values: dict[str, Any]) -> list[str]:
    return [f"{key} = {value!r}  # {TrainConfig.model_fields[key].description}" for key, value in values.items()]


def _schedule(iters: int) -> str:
    quarter = str(iters // 4)
    return _SCHEDULE.format(quarter=quarter, pad=" " * max(1, 17 - len(quarter)), twentieth=max(1, iters // 20))
