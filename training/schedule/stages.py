"""The check of a whole schedule before anything trains: every entry's plan, folded over the settings.

Several tracks go side by side, and what is measured decides their order. Checked is the order in which they fire by
their latest times; another may come, and then an entry that cannot be carried out follows its `on_error`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.schedule.file import Entry, Schedule
from orchestrate.training.schedule.position import Position, Queue
from orchestrate.training.schedule.triggers import Moment
from orchestrate.training.settings.errors import Refused, ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import MOST_PROBLEMS


@dataclass(frozen=True)
class Stage:
    """The settings in force after an entry (entry None: at the start), as planned."""

    entry: Entry | None
    settings: Settings
    by: float = 0.0
    """The iteration by which the entry fires at the latest; infinity where nothing bounds it."""


def check_settings(settings: Settings, world_size: int) -> None:
    """What must hold for any settings in force. Raises ScheduleError with all that does not."""
    problems = []
    if settings.grad_accum % world_size:
        problems.append(
            f"grad_accum {settings.grad_accum} (micro-steps over all ranks) must be a multiple of the "
            f"{world_size} processes"
        )
    if settings.model.block_size % settings.sequence_length:
        problems.append(
            f"sequence_length {settings.sequence_length} must divide block_size {settings.model.block_size}, "
            "so that windows are cut into whole sequences"
        )
    if not trainable_names(settings.model, settings.frozen):
        problems.append("nothing would be left to train: every parameter is frozen")
    if problems:
        raise ScheduleError(problems)


def plan_stages(
    schedule: Schedule, settings: Settings, world_size: int, position: Position | None = None
) -> list[Stage]:
    """Fold the pending entries' plans over the settings. Raises Refused with the problems of all entries at once.

    Args:
        position: how far the schedule has come; by default nothing has fired.
    """
    stages, problems = [Stage(None, settings)], []
    try:
        check_settings(settings, world_size)
    except ScheduleError as error:
        problems += error.problems
    for entry, by in in_order(schedule, position or Position(), lambda: stages[-1].settings.tokens_per_iter):
        if len(problems) > MOST_PROBLEMS:
            problems.append(f"{schedule.source}: entry {entry.number} and those after it were not looked at")
            break
        try:
            after = entry.plan(stages[-1].settings)
            check_settings(after, world_size)
        except ScheduleError as error:
            problems += [f"{schedule.place(entry)}: {problem}" for problem in error.problems]
        else:
            stages.append(Stage(entry, after, by))
    if problems:
        raise Refused(problems)
    return stages


def in_order(
    schedule: Schedule, position: Position, tokens_per_iter: Callable[[], int]
) -> Iterator[tuple[Entry, float]]:
    """The pending steps as they fire if each waits as long as it can, and the iteration; the first in the file first.

    What nothing bounds comes after all that is bounded. Left out are steps that can never fire, because what they come
    after was skipped or taken back, and those behind them.

    Args:
        tokens_per_iter: those in force after the steps that have been given out.
    """
    queues = {name: position.queues.get(name, Queue()) for name in schedule.tracks}
    done = {name: queue.fired for name, queue in queues.items()}
    since = {name: Moment(queue.since.iter, queue.since.tokens, 1) for name, queue in queues.items()}
    known = {label: Moment(mark.iter, mark.tokens, 1) for label, mark in position.marks.items()}
    now = max((*since.values(), *known.values()), key=lambda moment: moment.iter, default=Moment(0, 0, 1))
    while True:
        now = replace(now, tokens_per_iter=tokens_per_iter())
        heads = []
        for name, track in schedule.tracks.items():
            entry = track[done[name]] if done[name] < len(track) else None
            begun = None if entry is None else known.get(entry.after) if entry.after else since[name]
            if entry is not None and begun is not None:
                waits = [trigger.at_latest(begun, now) for trigger in entry.triggers]
                heads.append((max(now.iter, begun.iter, since[name].iter, min(waits, default=0)), entry))
        if not heads:
            return
        time, entry = min(heads, key=lambda head: head[0])
        yield entry, time
        fired = now.at(time)
        now = now if math.isinf(time) else fired
        done[entry.track] += 1
        since[entry.track] = fired
        known |= dict.fromkeys(filter(None, (entry.label, entry.closes)), fired)


def _shape_key(config: ModelConfig) -> str:
    return json.dumps(config.to_json(), sort_keys=True)


@functools.lru_cache(maxsize=4)  # a model of thousands of blocks is large even without its numbers
def _model(shape: str) -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig.from_json(json.loads(shape)))


@functools.lru_cache(maxsize=1024)
def _trainable(shape: str, frozen: tuple[str, ...]) -> frozenset[str]:
    model = _model(shape)
    trainable = trainable_parameters(model, frozen)
    return frozenset(trainable)


def model_on_meta(config: ModelConfig) -> GPT:
    """A model of this shape without values, made once for the check and the plan of a schedule: leave it as it is."""
    return _model(_shape_key(config))


def trainable_names(config: ModelConfig, frozen: tuple[str, ...]) -> frozenset[str]:
    """Names of the parameters that train under these settings, without allocating any."""
    return _trainable(_shape_key(config), frozen)
