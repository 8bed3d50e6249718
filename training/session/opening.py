"""From a configuration, fresh or resumed, to a Run on this rank's device."""

from __future__ import annotations

import copy
from dataclasses import replace

from orchestrate.training.run.casting import Casting
from orchestrate.training.run.device import pick_device
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.schedule.stages import plan_stages
from orchestrate.training.session.resume import Resumed, check_fingerprint, open_model
from orchestrate.training.session.start import (
    Foreign,
    check_data,
    check_target,
    data_of,
    initial_model,
    planned_model_config,
    settings_from,
)
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.records import Progress


def open_run(
    config: TrainConfig, resumed: Resumed | None, schedule: Schedule, ranks: Ranks, foreign: Foreign | None = None
) -> Run:
    """Data, weights and optimizer on this rank's device. Raises Refused or ValueError."""
    device = pick_device(config.device, ranks.local_rank)
    if resumed is not None:
        state, settings = resumed.loaded.state, resumed.settings
        stages = plan_stages(schedule, settings, ranks.world_size, resumed.position)
        data = data_of(config, stages)
        check_fingerprint(config, state, data)
        check_data(data, config, stages)
        check_target(stages, config)
        progress = copy.deepcopy(state.progress)
        progress.cursor = settings.followed(progress.cursor, settings)
        # In the number types of the checkpoint: what an override of this start rounds is measured where all is whole.
        saved = replace(settings, weights_dtype=state.settings.weights_dtype)
        model, moments = open_model(resumed.loaded, saved, ranks, device)
        run = Run(config, saved, progress, model, data, ranks, device, moments, state.scaler)
        if settings != saved:
            run.cast += run.adopt(settings)
        return run
    model_config, _ = planned_model_config(config, foreign)
    settings = settings_from(config, model_config, foreign)
    stages = plan_stages(schedule, settings, ranks.world_size)
    data = data_of(config, stages)
    check_data(data, config, stages, foreign)
    check_target(stages, config)
    casting = Casting.at_start(settings)
    model = initial_model(config, model_config, foreign, casting)
    run = Run(config, settings, Progress.start(settings), model, data, ranks, device)
    run.cast += casting.cast
    return run
