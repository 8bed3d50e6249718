"""Which panels a report has, and what is drawn in each: stories as plain values for the page's script.

Knows neither HTML nor plotly. A metric that nobody has thought of here gets a panel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrate.training.report.data import AXES, PARTS_OF, Series, Story, known_parts, mark
from orchestrate.training.settings.metrics import VAL_LOSS, of_source

PANELS: dict[str, tuple[str, ...]] = {
    "loss (nats per token)": ("loss", VAL_LOSS),
    "learning rate": ("lr",),
    "tokens per iteration": ("tokens_per_iter",),
    "batch (sequences per iteration)": ("sequences",),
    "sequence length (tokens)": ("sequence_length",),
    "parameters": ("parameters_total", "parameters_trainable"),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
    "seconds per iteration, by part": (),
    "memory (bytes)": ("machine.host_memory", "machine.device_memory", "machine.device_memory_peak"),
    "use (percent)": ("machine.host_memory_percent", "machine.cpu_percent", "machine.gpu_percent"),
    "passes over the data": ("passes",),
    "share of the data seen": ("coverage",),
}
"""Title -> names of its series, in the order of the page. Those of single data sets (val_loss/NAME) join theirs."""
TAKEN_BACK = ("loss", "grad_norm", VAL_LOSS)
"""What is drawn of the ways that the run went back from."""
STEPS = ("sequences", "tokens_per_iter", "sequence_length", "parameters_total", "parameters_trainable")
"""Numbers that stay until something changes them."""
LANES = {
    "operation": "operation",
    "ramp": "ramp, repetition",
    "repetition": "ramp, repetition",
    "guard": "guard",
    "rollback": "rollback",
    "override": "override",
    "start": "start, resume",
    "resume": "start, resume",
    "checkpoint": "checkpoint",
    "error": "trouble",
    "emergency": "trouble",
    "signal": "signal, end",
    "end": "signal, end",
}
"""Kind of a marker -> the row that it stands in."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of what all runs have in common: where they are compared."""


def panels(stories: Sequence[Story]) -> list[dict[str, Any]]:
    """Each: title, traces. A trace: run, name, x (by axis), y, void, and how it is drawn: step, stack, points."""
    titles = {name: title for title, names in PANELS.items() for name in names}
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in PANELS}
    for number, story in enumerate(stories):
        for series in story.series:
            if series.void and series.name.partition("/")[0] not in TAKEN_BACK:
                continue
            if series.name.startswith(PARTS_OF) and len(stories) > 1:
                continue  # parts of several runs are compared in their tables
            found.setdefault(_title(series.name, titles), []).append(_trace(number, series))
    order = [f"{PARTS_OF}{part}" for part in known_parts(n for story in stories for n in story.seconds_by_part)]
    found["seconds per iteration, by part"].sort(key=lambda trace: order.index(trace["name"]))
    return [{"title": title, "traces": traces} for title, traces in found.items() if traces]


def _title(name: str, titles: Mapping[str, str]) -> str:
    """The panel of a series: a known one, that of the metric it is a part of, or one for all names with its head."""
    if name.startswith(PARTS_OF):
        return "seconds per iteration, by part"
    head = name.partition("/")[0]
    # Of two rates the one that has a prefix (step_lr) is drawn beside the other.
    if (known := titles.get(name) or titles.get(head) or titles.get(head.rpartition("_")[2])) is not None:
        return known
    return "task scores" if head == "eval" else head.partition(".")[0]


def _trace(run: int, series: Series) -> dict[str, Any]:
    return {
        "run": run,
        "name": series.name,
        "void": series.void,
        "x": {axis: _numbers(series.at[axis], 10) for axis in AXES},
        "y": _numbers(series.values),
        "step": series.name in STEPS,
        "stack": series.name.startswith(PARTS_OF) and not series.void,
        "main": series.name == VAL_LOSS or series.name.startswith(of_source(VAL_LOSS, "")),
    }


def _numbers(values: np.ndarray, digits: int = 7) -> list[float | None]:
    """As JSON has them, with as many digits as can be seen."""
    return [None if not math.isfinite(value) else float(f"{value:.{digits}g}") for value in values]


def markers(stories: Sequence[Story]) -> list[dict[str, Any]]:
    """Each: run, kind, lane, x (by axis), title, details, void."""
    return [
        {
            "run": number,
            "kind": marker.kind,
            "lane": LANES.get(marker.kind, marker.kind),
            "x": {axis: float(f"{marker.at[axis]:.9g}") for axis in AXES},
            "title": marker.title,
            "details": list(marker.details),
            "void": marker.void,
        }
        for number, story in enumerate(stories)
        for marker in story.markers
    ]


def comparison(stories: Sequence[Story]) -> dict[str, tuple[list[float], list[list[float | None]]]]:
    """Axis -> places that all runs have reached, and for each run its validation loss there.

    Between two evaluations the loss is on the line between them. Runs without evaluations have none.
    """
    found = {}
    for axis in ("tokens", "seconds"):
        reached = [story.evaluations.at[axis][-1] for story in stories if story.evaluations is not None]
        if reached:
            places = [float(min(reached)) * share for share in SHARES]
            rows = [
                [None if story.evaluations is None else mark(story.evaluations, axis, place) for place in places]
                for story in stories
            ]
            found[axis] = places, rows
    return found
