"""--plan: check everything, fold the schedule over the settings, print the stages, train nothing.

Runs the operations' own `plan` code; shapes are built on the meta device, so no weights are allocated.
"""

from __future__ import annotations

from typing import Any

from training import setup
from training.config import TrainConfig
from training.records import differences
from training.schedule import Entry, Schedule, Stage, parameter_counts, plan_stages
from training.values import brief


def describe(config: TrainConfig, given: dict[str, str], world_size: int) -> str:
    """The stages of a run as a table. Raises Refused with every problem of the configuration and the schedule."""
    notes: list[str] = []
    if config.init_from == "resume":
        resumed = setup.resume(config, given)
        fired = resumed.loaded.state["orchestrator"]["position"]["fired"]
        schedule, settings = resumed.schedule, resumed.settings
        rest = Schedule(schedule.entries[fired:], schedule.source, schedule.text)
        notes.append(f"{fired} entries have fired; the rest is planned from {resumed.loaded.path.name}")
    else:
        rest = setup.the_schedule(config)
        model, notes = setup.planned_model_config(config)
        settings = setup.settings_from(config, model)
    stages = plan_stages(rest, settings, world_size)
    rows = [("entry", "when", "operation", "layers", "width", "parameters", "trainable", "tokens/iter", "changes")]
    rows += [_row(stage, stages[i - 1] if i else None) for i, stage in enumerate(stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    guessed = [
        stage.entry.number for stage in stages if stage.entry and stage.entry.operation.name == "adjust_batch_size"
    ]
    if guessed:
        notes.append(f"entries {guessed}: adjust_batch_size is decided on the machine; shown unchanged")
    lines += [f"note: {note}" for note in notes]
    return "\n".join([*lines, f"{len(stages) - 1} entries, no errors"])


def when(entry: Entry) -> str:
    """An entry's triggers in one cell."""
    return " or ".join(f"{trigger.field} {_plain(trigger.value)}" for trigger in entry.triggers) or "at once"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(stage: Stage, before: Stage | None) -> tuple[str, ...]:
    s = stage.settings
    total, trainable = parameter_counts(s.model, s.frozen)
    changes = ""
    if before is not None:
        old, new = differences(before.settings, s)
        changes = ", ".join(f"{name} {brief(old[name])} -> {brief(new[name])}" for name in new)
        if stage.entry and stage.entry.over:
            changes += f" over {stage.entry.over}"
    return (
        str(stage.entry.number) if stage.entry else "start",
        when(stage.entry) if stage.entry else "",
        str(stage.entry) if stage.entry else "",
        str(s.model.n_layer),
        str(s.model.n_embd),
        f"{total:,}",
        f"{trainable:,}",
        f"{s.tokens_per_iter:,}",
        changes,
    )
