"""The numbers that a run measures, by name: what triggers, guards and early stopping may look at.

A name is the key of a number in metrics.jsonl; one inside a mapping there has a dot, as in `machine.host_memory`. Knows
no run: the session makes the numbers, the orchestrator remembers those that somebody asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from orchestrate.training.settings.values import nearest

VAL_LOSS = "val_loss"
VAL_BPB = "val_bpb"
PARTS = ("data", "forward_backward", "optimizer", "eval", "operation", "checkpoint")
"""Of the loop, as `seconds_by_part` has them."""

ANALYSED = (
    "rank/attn", "rank/mlp", "embedding/cosine", "embedding/norm", "embedding/isotropy", "attention_entropy", "drift",
    "update_ratio", "grad_noise_scale", "grad_noise_ratio",
)  # fmt: skip
"""Values come with the evaluations at which the model is analysed (analyze_interval)."""
EVALUATED = (VAL_LOSS, VAL_BPB, *ANALYSED)
"""Values come with the evaluations at eval_interval; bits per byte where the tokenizer of the data is at hand."""
ON_FIRST_RANK = (
    "tokens_per_second",
    *(f"seconds_by_part.{part}" for part in PARTS),
    *(f"machine.{fact}" for fact in ("host_memory", "host_memory_percent", "cpu_percent")),
    *(f"machine.{fact}" for fact in ("device_memory", "device_memory_peak", "gpu_percent")),
)
"""Clocks and machines differ from rank to rank: rank 0's number counts, and it travels only where somebody asks."""
LOGGED = (
    "loss", "grad_norm", "lr", "step_lr", "batch_size", "grad_accum", "sequence_length", "passes", "coverage",
    *ON_FIRST_RANK,
)  # fmt: skip
"""Values come with the lines of every log_interval."""
NAMES = (*EVALUATED, *LOGGED)
_OF_SOURCES = (VAL_LOSS, VAL_BPB, "passes", "coverage")
"""What a run with several data sets measures of each, as val_loss/NAME and so on."""
_OF_TASK = "eval/"


def of_source(name: str, source: str) -> str:
    """The name of a metric of one of several data sets."""
    return f"{name}/{source}"


def source_of(name: str) -> str:
    """The data set that a metric is about; nothing where it is about all."""
    kind, _, source = name.partition("/")
    return source if kind in _OF_SOURCES else ""


def of_task(what: str) -> str:
    """The name of a metric that a task of eval_tasks gives, with evaluations."""
    return f"{_OF_TASK}{what}"


def is_of_task(name: str) -> bool:
    """Whether a task may give this; of tasks that are not the run's nobody does."""
    return re.fullmatch(r"eval/[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None


def is_of_bytes(name: str) -> bool:
    """Whether a metric needs the tokenizer of the data."""
    return name.partition("/")[0] == VAL_BPB


def comes_with(name: str, kinds: Container[str]) -> bool:
    """Whether a metric's values come with the evaluations (EVALUATED), or with the lines of log_interval (LOGGED)."""
    if is_of_task(name):
        return VAL_LOSS in kinds
    return name.partition("/")[0] in kinds if source_of(name) else name in kinds


def is_metric(name: str) -> bool:
    """Whether a run may measure this; of data sets and tasks that are not the run's it does not."""
    return name in NAMES or bool(source_of(name)) or is_of_task(name)


def rises(name: str) -> bool:
    """Whether more of a metric is better; of all others less is."""
    return is_of_task(name)


def falling(name: str, value: float) -> float:
    """A metric's value as one of which less is better. Twice, it is the value again."""
    return -value if rises(name) else value


def in_nats(name: str) -> bool:
    """Whether a metric is a cross-entropy."""
    return name in (VAL_LOSS, "loss") or name.startswith(of_source(VAL_LOSS, ""))


def spoken(name: str) -> str:
    """A metric's name in a sentence."""
    return "val loss" if name == VAL_LOSS else name.replace(of_source(VAL_LOSS, ""), "val loss of ", 1)


def told(name: str, value: float) -> str:
    """A metric's value in a sentence."""
    return f"{value:.4f}" if in_nats(name) else f"{value:.6g}"


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics by name; what is null there, and what is no number, is left out."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, _KINDS) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, Mapping):
            for inner, one in value.items():
                if isinstance(one, _KINDS) and not isinstance(one, bool):
                    found[f"{name}.{inner}"] = one
    return found


_KINDS = (float, int)


def finite(value: float | None) -> bool:
    """Whether there is a number, and one to compare with."""
    return value is not None and math.isfinite(value)


def _known(name: str) -> str:
    if not is_metric(name):
        hint = nearest(name, NAMES).removeprefix("; ") or ", ".join(NAMES)
        raise ValueError(f"must be the name of a metric ({hint})")
    return name


_IN_A_SCHEMA = {"enum": list(NAMES)}, {"type": "string", "pattern": f"^({'|'.join(_OF_SOURCES)}|eval)/."}
MetricName = Annotated[str, AfterValidator(_known), WithJsonSchema({"format": "metric", "anyOf": list(_IN_A_SCHEMA)})]
