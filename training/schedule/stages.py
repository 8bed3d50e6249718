"""The check of a whole schedule before anything trains: every entry's plan, folded over the settings."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.schedule.file import Entry, Schedule
from orchestrate.training.settings.errors import Refused, ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import MOST_PROBLEMS


@dataclass(frozen=True)
class Stage:
    """The settings in force after an entry (entry None: at the start), as planned."""

    entry: Entry | None
    settings: Settings


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


def plan_stages(schedule: Schedule, settings: Settings, world_size: int) -> list[Stage]:
    """Fold every entry's plan over the settings. Raises Refused with the problems of all entries at once."""
    stages, problems = [Stage(None, settings)], []
    try:
        check_settings(settings, world_size)
    except ScheduleError as error:
        problems += error.problems
    for entry in schedule.entries:
        if len(problems) > MOST_PROBLEMS:
            problems.append(f"{schedule.source}: entry {entry.number} and those after it were not looked at")
            break
        try:
            after = entry.plan(stages[-1].settings)
            check_settings(after, world_size)
        except ScheduleError as error:
            place = f"{schedule.source}:{entry.line}" if entry.line else schedule.source
            problems += [f"{place}: entry {entry.number}: {problem}" for problem in error.problems]
        else:
            stages.append(Stage(entry, after))
    if problems:
        raise Refused(problems)
    return stages


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
