"""From a run folder to where a run goes on: its newest whole checkpoint, and what this start changes of it.

What is wrong with the folder or with the overrides is found here, as `Refused`, before anything is written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orchestrate.data.stream import DataSet
from orchestrate.model.gpt import GPT, check_shapes, from_weights
from orchestrate.model.lineage import State
from orchestrate.training.run import out_of_memory, sharding
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.schedule.file import Schedule, parse_schedule, read_schedule
from orchestrate.training.schedule.own import OwnFile, compare
from orchestrate.training.session.start import IN_SETTINGS
from orchestrate.training.settings.config import MODEL_KEYS, TrainConfig, unread
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Progress, Settings, get_field, with_field
from orchestrate.training.settings.values import problems_of, shown
from orchestrate.training.store import checkpoint

_SHAPE = "the checkpoint's weights have this shape; an operation of a schedule can change it"
# Keys that a resume must not change, and why.
FIXED = {
    **dict.fromkeys(MODEL_KEYS, _SHAPE),
    **dict.fromkeys("attn_lora_rank mlp_lora_rank embedding_rank shrunken_vocab_size".split(), _SHAPE),
    "lora_alpha": "set_lora_alpha in a schedule changes it without a jump",
    "vocab_remapping_file": "the tokens that the weights know would change their meaning",
    "seed": "the order of the data follows from it, and samples would repeat or be left out",
    "optimizer": "what one optimizer has gathered means nothing to another",
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
    """What is wrong with newer checkpoints."""
    damaged: list[Path]
    """Their folders."""


def latest_good(out_dir: str) -> tuple[checkpoint.Checkpoint, list[str], list[Path]]:
    """The newest checkpoint that is whole, what is wrong with newer ones, and their folders. Raises Refused."""
    problems: list[str] = []
    damaged: list[Path] = []
    for path in checkpoint.find(out_dir):
        try:
            with reading(path):
                return checkpoint.load(path), problems, damaged
        except Refused as error:
            problems += error.problems
            damaged += [path] if path.exists() else []
    raise Refused([*problems, f"out_dir {out_dir}: there is no complete checkpoint to resume from"])


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What comes of a checkpoint that is removed while it is read, in one line. That can be only without the lock."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        # A removal begins with the manifest; but a checkpoint without one may also be refused for that.
        if (path if isinstance(error, Refused) else path / "manifest.json").exists():
            raise
        raise Refused(f"checkpoint {path}: removed while it was read: another job is running, try again") from error


def named(out_dir: str, name: str) -> checkpoint.Checkpoint:
    """The checkpoint of a name, or `best`. Raises Refused."""
    path = checkpoint.folder(out_dir) / name
    if not path.exists():
        there = [found.name for found in checkpoint.find(out_dir)]
        raise Refused(f"out_dir {out_dir}: there is no checkpoint {name}; there are {', '.join(there) or 'none'}")
    return checkpoint.load(path)


def understood(loaded: checkpoint.Checkpoint) -> tuple[TrainConfig, Settings]:
    """The configuration and settings of a checkpoint. Raises Refused for a state that this version did not write."""
    state, place = loaded.state, f"checkpoint {loaded.path}: state.json"
    parts: dict[str, Any] = {}
    try:
        parts["config"] = TrainConfig.model_validate(state["config"])
        parts["settings"] = Settings.from_json(state["settings"])
        Progress.from_json(state["progress"], parts["settings"])
        TypeAdapter(_State).validate_python(state)
    except ValidationError as error:
        raise Refused(
            [f"{place}: {'.'.join(map(str, loc))} {message}" for loc, message in problems_of(error)]
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Refused(f"{place}: not a state of this version ({type(error).__name__}: {error})") from None
    return parts["config"], parts["settings"]


_Count = Annotated[int, Field(ge=0, strict=True)]


class _Position(BaseModel):
    model_config = ConfigDict(extra="allow")
    fired: _Count


class _Orchestrator(BaseModel):
    position: _Position
    ramps: list[dict[str, Any]]


class _Text(BaseModel):
    source: str
    text: str


class _OwnFile(BaseModel):
    file: str
    sha256: str


class _State(BaseModel):
    """What else is read from a checkpoint's state before the run is built."""

    orchestrator: _Orchestrator
    schedule: _Text
    scaler: dict[str, Any]
    log_sizes: dict[str, _Count]
    data: dict[str, str]
    tokenizer: dict[str, Any]
    wandb_id: str | None
    operations: list[_OwnFile] = []


def resume(config: TrainConfig, given: dict[str, str], operations: Sequence[OwnFile] = ()) -> Resumed:
    """Read the run folder and settle every key that was given. Raises Refused with all that cannot be done."""
    loaded, passed_over, damaged = latest_good(config.out_dir)
    recorded, settings = understood(loaded)
    overrides = compare(loaded.state.get("operations", []), operations)
    problems = unread(settings.optimizer, given)
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
        elif key not in ("init_from", "out_dir", "schedule"):
            if key in IN_SETTINGS:
                settings = with_field(settings, IN_SETTINGS[key], after)
            overrides.append({"key": key, "before": in_force, "after": after, "applied": True, "reason": given[key]})

    schedule = parse_schedule(loaded.state["schedule"]["text"], loaded.state["schedule"]["source"] or "schedule")
    fired = loaded.state["orchestrator"]["position"]["fired"]
    if "schedule" in given:
        new = read_schedule(config.schedule) if config.schedule else _only(schedule, fired)
        for i, done in enumerate(schedule.as_given[:fired]):
            if i >= len(new.entries) or new.as_given[i] != done:
                problems.append(
                    f"{config.schedule}: entry {i + 1} has fired already and must stay as it was: {json.dumps(done)}"
                )
        if new.as_given != schedule.as_given and not problems:
            overrides.append(
                {
                    "key": "schedule",
                    "before": schedule.as_given[fired:],
                    "after": new.as_given[fired:],
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
    loaded: checkpoint.Checkpoint, settings: Settings, ranks: Ranks, device: torch.device
) -> tuple[GPT, State]:
    """A checkpoint's model and moments; where the ranks are sharded each reads its own parts. Raises Refused."""
    config, optimizer = settings.model, OPTIMIZERS[settings.optimizer]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}
    wanted = dict(shapes)
    for name in {key.rpartition("|")[0] for key in loaded.shapes if "|" in key}:
        if name not in shapes:
            raise Refused(f"checkpoint {loaded.path}: there are moments of {name}, which is not in the model")
        wanted |= {f"{name}|{slot}": shape for slot, shape in optimizer.state_shapes(name, shapes[name]).items()}
    try:
        check_shapes(wanted, loaded.shapes)
    except ValueError as error:
        raise Refused(f"checkpoint {loaded.path}: {error}") from None
    if not ranks.sharded:
        with reading(loaded.path):
            return from_weights(config, loaded.model), loaded.optimizer
    model = sharding.empty(config, ranks.mesh, device, ranks.dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {
        key: sharding.empty_state(shape, weights[key.rpartition("|")[0]])
        for key, shape in loaded.shapes.items()
        if "|" in key
    }
    with reading(loaded.path):
        loaded.read_into({**weights, **moments})
    return model, checkpoint.by_parameter(moments)


def _only(schedule: Schedule, fired: int) -> Schedule:
    """A schedule of the entries that have fired, and no more."""
    return parse_schedule(json.dumps(schedule.as_given[:fired], indent=1), "fired.json")


def check_fingerprint(config: TrainConfig, state: dict[str, Any], data: DataSet) -> None:
    """Raises Refused where the data is not what the checkpoint was trained on, whatever its name is."""
    changed = [name for name, print_ in data.fingerprint().items() if state["data"].get(name) != print_]
    if changed and not config.allow_changed_data:
        raise Refused(
            f"dataset {config.dataset}: the content of {' and '.join(f'{name}.bin' for name in changed)} is not what "
            f"the checkpoint was trained on ({state['config']['dataset']}; fingerprints differ): the stream of samples "
            "would not go on where it stopped; --allow_changed_data=True goes on all the same"
        )


def pending(schedule: Schedule, state: dict[str, Any]) -> Schedule:
    """The entries that have not fired."""
    fired = state["orchestrator"]["position"]["fired"]
    return Schedule(schedule.entries[fired:], schedule.source, schedule.text)
