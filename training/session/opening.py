"""From a configuration, fresh or resumed, to a Run on this rank's device."""

from __future__ import annotations

import copy

from orchestrate.data.stream import DataSet, find_folder, open_data, read_meta, read_remap
from orchestrate.training.run.device import pick_device
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.schedule.stages import plan_stages
from orchestrate.training.session.resume import Resumed, open_model, pending
from orchestrate.training.session.start import check_lengths, initial_model, planned_model_config, settings_from
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Progress


def open_run(config: TrainConfig, resumed: Resumed | None, schedule: Schedule, ranks: Ranks) -> Run:
    """Data, weights and optimizer on this rank's device. Raises Refused or ValueError."""
    device = pick_device(config.device, ranks.local_rank)
    if config.shrunken_vocab_size:
        old = read_meta(find_folder(config.dataset)).vocab_size
        remap = read_remap(config.vocab_remapping_file, old, config.shrunken_vocab_size)
    else:
        remap = None
    data: DataSet = open_data(config.dataset, config.block_size, remap)
    if resumed is not None:
        state = resumed.loaded.state
        if state.data != data.fingerprint() and not config.allow_changed_data:
            raise Refused(
                f"dataset {config.dataset}: train.bin or val.bin is not the file that the checkpoint was trained on "
                "(fingerprints differ); --allow_changed_data=True goes on all the same"
            )
        settings = resumed.settings
        check_lengths(plan_stages(pending(schedule, state.fired), settings, ranks.world_size), data)
        model, moments = open_model(resumed.loaded, settings.model, ranks, device)
        return Run(
            config,
            settings,
            copy.deepcopy(state.progress),
            model,
            data,
            ranks,
            device,
            moments,
            state.scaler,
        )
    model_config, _ = planned_model_config(config)
    settings = settings_from(config, model_config)
    check_lengths(plan_stages(schedule, settings, ranks.world_size), data)
    vocab = config.shrunken_vocab_size or data.meta.vocab_size
    if vocab and vocab > model_config.vocab_size:
        raise Refused(
            f"dataset {config.dataset} has a vocabulary of {vocab}, "
            f"more than the {model_config.vocab_size} of {config.init_from}"
        )
    return Run(config, settings, Progress.start(settings), initial_model(config, model_config), data, ranks, device)
