"""From a run folder to where a run goes on: its newest whole checkpoint, and what this start changes of it.

What is wrong with the folder or with the overrides is found here, as `Refused`, before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT, check_shapes, from_weights
from orchestrate.training.run import out_of_memory, sharding
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.optimizers import State
from orchestrate.training.schedule.file import Schedule, parse_schedule, read_schedule
from orchestrate.training.session.start import IN_SETTINGS
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings, get_field, with_field
from orchestrate.training.settings.values import shown
from orchestrate.training.store import checkpoint
from orchestrate.training.store.manifest import Damaged, held, survey

_SHAPE = "the checkpoint's weights have this shape; an operation of a schedule can change it"
# Keys that a resume must not change, and why.
FIXED = {
    **{
        key: _SHAPE
        for key in (
            "block_size n_layer n_head n_kv_head n_embd n_hidden bias norm norm_eps activation use_rotary_embeddings "
            "rotary_base tie_weights attn_lora_rank mlp_lora_rank embedding_rank shrunken_vocab_size"
        ).split()
    },
    "lora_alpha": "set_lora_alpha in a schedule changes it without a jump",
    "vocab_remapping_file": "the tokens that the weights know would change their meaning",
    "seed": "the order of the data follows from it, and samples would repeat or be left out",
    "dataset": "the stream of samples would not go on where it stopped",
}


@dataclass(frozen=True)
class Resumed:
    """What a resume starts from: the checkpoint, and what this start changes of it."""

    loaded: checkpoint.Checkpoint
    config: TrainConfig
    settings: Settings
    schedule: Schedule
    overrides: list[dict[str, Any]]
    """Events: key, before, after, applied, reason."""
    passed_over: list[str]
    """What is wrong with other checkpoints."""
    damaged: list[Path]
    """Their folders."""


FromFirst: TypeAlias = Callable[[str, Callable[[], str]], str]
"""from_first(question, answer): the text that `answer` returns on rank 0, on every rank; only rank 0 calls it."""


def _alone(question: str, answer: Callable[[], str]) -> str:
    return answer()


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint that is whole, and what is wrong with others."""

    path: Path
    problems: list[str]
    damaged: list[Path]


def newest_whole(out_dir: str, from_first: FromFirst = _alone) -> Newest:
    """Find it. Raises Refused where there is none.

    Checksums are those of whole checkpoints, so rank 0 alone computes them and tells the others what it found.
    """
    found = json.loads(from_first("the newest whole checkpoint", lambda: json.dumps(_newest_whole(out_dir))))
    if found["refused"]:
        raise Refused(found["refused"])
    root = checkpoint.folder(out_dir)
    return Newest(root / found["name"], found["problems"], [root / name for name in found["damaged"]])


def latest_good(out_dir: str, from_first: FromFirst = _alone) -> tuple[checkpoint.Checkpoint, list[str], list[Path]]:
    """The newest checkpoint that is whole, what is wrong with others, and their folders. Raises Refused."""
    newest = newest_whole(out_dir, from_first)
    return checkpoint.load(newest.path, whole=False), newest.problems, newest.damaged


def _newest_whole(out_dir: str) -> dict[str, Any]:
    """name; problems and names of the damaged; or, in `refused`, why there is nothing to go on from."""
    name, problems, damaged = "", [], []
    for path, result in survey(out_dir):
        try:
            if isinstance(result, Refused):
                raise result
            if not name:
                checkpoint.load(path)
                name = path.name
        except Damaged as error:
            problems += error.problems
            damaged.append(path.name)
        except Refused as error:
            return {"refused": [*problems, *error.problems]}
    none = [] if name else [*problems, f"out_dir {out_dir}: there is no complete checkpoint to resume from"]
    return {"name": name, "problems": problems, "damaged": damaged, "refused": none}


def resume_after_restart(config: TrainConfig, given: dict[str, str]) -> tuple[TrainConfig, dict[str, str]]:
    """When torchrun or Slurm starts the same command again, it means to go on from the latest checkpoint."""
    counts = [os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    restarted = any(count.isdigit() and int(count) > 0 for count in counts)
    # Checkpoints that cannot be read are a reason to go on too: that is refused, where a new run would hide the loss.
    if restarted and config.init_from != "resume" and held(config.out_dir):
        # Keys of the command are those that the run was started with; the schedule may have moved them since.
        kept = {key: place for key, place in given.items() if key != "init_from"}
        return config.model_copy(update={"init_from": "resume"}), kept
    return config, given


def resume(config: TrainConfig, given: dict[str, str], from_first: FromFirst = _alone) -> Resumed:
    """Read the run folder and settle every key that was given. Raises Refused with all that cannot be done."""
    loaded, passed_over, damaged = latest_good(config.out_dir, from_first)
    state, recorded, settings = loaded.state, loaded.state.config, loaded.state.settings
    overrides: list[dict[str, Any]] = []
    problems: list[str] = []
    for key in given:
        before, after = getattr(recorded, key), getattr(config, key)
        in_force = get_field(settings, IN_SETTINGS[key]) if key in IN_SETTINGS else before
        if before == after:
            # The same command again: what a schedule has changed since stays as it is.
            if in_force != after:
                reason = "this is what the run was started with, and its schedule has changed it since"
                overrides.append(
                    {"key": key, "before": in_force, "after": in_force, "applied": False, "reason": reason}
                )
        elif key in FIXED:
            problems.append(
                f"{given[key]}: {key} cannot change on resume from {shown(before)} to {shown(after)}: {FIXED[key]}"
            )
        elif key not in ("init_from", "out_dir"):
            if key in IN_SETTINGS:
                settings = with_field(settings, IN_SETTINGS[key], after)
            overrides.append({"key": key, "before": in_force, "after": after, "applied": True, "reason": given[key]})

    schedule = parse_schedule(state.schedule.text, state.schedule.source or "schedule")
    if "schedule" in given and config.schedule:
        new = read_schedule(config.schedule)
        for i, done in enumerate(schedule.as_given[: state.fired]):
            if i >= len(new.entries) or new.as_given[i] != done:
                problems.append(
                    f"{config.schedule}: entry {i + 1} has fired already and must stay as it was: {json.dumps(done)}"
                )
        if new.as_given != schedule.as_given and not problems:
            overrides.append(
                {
                    "key": "schedule",
                    "before": schedule.as_given[state.fired :],
                    "after": new.as_given[state.fired :],
                    "applied": True,
                    "reason": given["schedule"],
                }
            )
        schedule = new
    if out_of_memory.noted(config.out_dir) == settings.batch_size and (smaller := settings.in_smaller_pieces()):
        reason = "memory ran out in the last start: the same global batch in smaller pieces"
        for key in ("batch_size", "gradient_accumulation_steps"):
            before, after = (get_field(s, IN_SETTINGS[key]) for s in (settings, smaller))
            overrides.append({"key": key, "before": before, "after": after, "applied": True, "reason": reason})
        settings = smaller
    if recorded.log_dir and "log_dir" not in given:
        reason = "a checkpoint does not choose where files are written: give it again"
        overrides.append({"key": "log_dir", "before": recorded.log_dir, "after": "", "applied": True, "reason": reason})
        recorded = recorded.model_copy(update={"log_dir": ""})
    if problems:
        raise Refused(problems)
    update = {key: getattr(config, key) for key in given} | {"out_dir": config.out_dir, "init_from": "resume"}
    return Resumed(loaded, recorded.model_copy(update=update), settings, schedule, overrides, passed_over, damaged)


def open_model(
    loaded: checkpoint.Checkpoint, config: ModelConfig, ranks: Ranks, device: torch.device
) -> tuple[GPT, State]:
    """A checkpoint's model and moments; where the ranks are sharded each reads its own parts. Raises Refused."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    wanted = dict(shapes)
    for name in {key.rpartition("|")[0] for key in loaded.shapes if "|" in key}:
        if name not in shapes:
            raise Refused(f"checkpoint {loaded.path}: there are moments of {name}, which is not in the model")
        wanted |= {f"{name}|exp_avg": shapes[name], f"{name}|exp_avg_sq": shapes[name], f"{name}|step": torch.Size([])}
    try:
        check_shapes(wanted, loaded.shapes)
    except ValueError as error:
        raise Refused(f"checkpoint {loaded.path}: {error}") from None
    if not ranks.sharded:
        return from_weights(config, loaded.model), loaded.optimizer
    model = sharding.empty(config, ranks.mesh, device, ranks.dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {
        key: torch.zeros(()) if key.endswith("|step") else torch.zeros_like(weights[key.rpartition("|")[0]])
        for key in loaded.shapes
        if "|" in key
    }
    loaded.read_into({**weights, **moments})
    return model, checkpoint.by_parameter(moments)


def pending(schedule: Schedule, fired: int) -> Schedule:
    """The entries that have not fired."""
    return Schedule(schedule.entries[fired:], schedule.source, schedule.text)
