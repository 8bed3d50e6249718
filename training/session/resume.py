"""From a run folder to where a run goes on: its newest whole checkpoint, and what this start changes of it.

What is wrong with the folder or with the overrides is found here, as `Refused`, before anything is written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from orchestrate.data.mixture import Sources
from orchestrate.data.stream import read_remap
from orchestrate.model.config import OPTIONS
from orchestrate.model.gpt import GPT, check_shapes, from_weights
from orchestrate.model.lineage import State as Moments
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.run import out_of_memory, sharding
from orchestrate.training.run.casting import kept
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.schedule.file import Entry, Schedule, parse_schedule, read_schedule
from orchestrate.training.schedule.own import OwnFile, compare
from orchestrate.training.schedule.position import Position
from orchestrate.training.schedule.ramps import Ramp, in_smaller_pieces, without
from orchestrate.training.session.start import IN_SETTINGS, named_checkpoint, other_tokenizer
from orchestrate.training.settings.config import MODEL_KEYS, TrainConfig, unread
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings, get_field, numbers_in, with_field
from orchestrate.training.settings.values import shown
from orchestrate.training.store import checkpoint
from orchestrate.training.store.manifest import Damaged, survey
from orchestrate.training.store.state import State

_SHAPE = "the checkpoint's weights have this shape; an operation of a schedule can change it"
_MADE = "the checkpoint's weights were trained with it, and no operation changes it"
# Keys that a resume must not change, and why.
FIXED = {
    **{key: _SHAPE if OPTIONS[name].by_operation else _MADE for key, name in MODEL_KEYS.items()},
    **dict.fromkeys(
        "attn_lora_rank mlp_lora_rank embedding_rank lora_targets lora_rank shrunken_vocab_size".split(), _SHAPE
    ),
    "depth": _SHAPE,
    "base_model": "the checkpoint holds the weights of the base",
    "lora_alpha": "set_lora_alpha in a schedule changes it without a jump",
    "frozen_layers": "freeze_layer and unfreeze_layer in a schedule change it",
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
    position: Position
    """In it."""
    orchestrator: dict[str, Any]
    """As in the checkpoint, without the ramps of what this start sets."""
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


def _newest_whole(out_dir: str) -> dict[str, Any]:
    """name; problems and names of the damaged; or, in `refused`, why there is nothing to go on from."""
    name, problems, damaged = "", [], []
    try:
        for path, result in survey(out_dir):
            try:
                if isinstance(result, Refused):
                    raise result
                if not name:
                    with reading(path):
                        checkpoint.load(path)
                    name = path.name
            except Damaged as error:
                problems += error.problems
                damaged += [path.name] if path.exists() else []
    except Refused as error:
        return {"refused": [*problems, *error.problems]}
    except OSError as error:
        return {"refused": [f"out_dir {out_dir}: cannot be read ({error})"]}
    none = [] if name else [*problems, f"out_dir {out_dir}: there is no complete checkpoint to resume from"]
    return {"name": name, "problems": problems, "damaged": damaged, "refused": none}


def latest_good(out_dir: str, from_first: FromFirst = _alone) -> tuple[checkpoint.Checkpoint, list[str], list[Path]]:
    """The newest checkpoint that is whole, what is wrong with others, and their folders. Raises Refused."""
    newest = newest_whole(out_dir, from_first)
    with reading(newest.path):
        return checkpoint.load(newest.path, whole=False), newest.problems, newest.damaged


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What comes of a checkpoint that is removed while it is read, in one line. That can be only without the lock."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if path.exists():  # a removal begins with another name
            raise
        raise Damaged(f"checkpoint {path}: removed while it was read: another job is running, try again") from error


def resume(
    config: TrainConfig,
    given: dict[str, str],
    operations: Sequence[OwnFile] = (),
    from_first: FromFirst = _alone,
) -> Resumed:
    """Read the run folder and settle every key that was given. Raises Refused with all that cannot be done."""
    if config.checkpoint == "latest":
        loaded, passed_over, damaged = latest_good(config.out_dir, from_first)
    else:
        loaded, passed_over, damaged = named_checkpoint(config.out_dir, config.checkpoint), [], []
    state, recorded, settings = loaded.state, loaded.state.config, loaded.state.present
    overrides = compare(state.operations, operations)
    problems = unread(settings.optimizer, given)
    schedule = parse_schedule(state.schedule.text, state.schedule.source or "schedule")
    try:
        position = Position.from_json(state.orchestrator["position"]).fitted(schedule)
        ramps = [Ramp.from_json(ramp) for ramp in state.orchestrator["ramps"]]
    except ValueError as error:
        raise Refused(f"checkpoint {loaded.path}: state.json: orchestrator: {error}") from None
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
        elif key == "dataset" and (problem := _no_other_data(recorded, config, settings)):
            problems.append(f"{given[key]}: {problem}")
        elif key not in ("init_from", "out_dir", "schedule"):
            if key == "dataset":
                in_force = settings.mixture if len(settings.mixture) > 1 else before
                settings = replace(settings, mixture={**dict.fromkeys(settings.mixture, 0.0), **config.datasets})
                if len(config.datasets) == 1 and len(recorded.datasets) == 1:
                    settings = replace(settings, mixture=config.datasets)
            if key in IN_SETTINGS:
                settings = with_field(settings, IN_SETTINGS[key], after)
            reason, numbers = (
                given[key],
                numbers_in(settings, IN_SETTINGS.get(key, "mixture" if key == "dataset" else key)),
            )
            if ended := [ramp for ramp in ramps if not ramp.fields.keys().isdisjoint(numbers)]:
                reason += f"; the ramp of entry {ended[0].entry} ({ended[0].name}) ends with it"
                ramps = without(ramps, numbers)
            overrides.append({"key": key, "before": in_force, "after": after, "applied": True, "reason": reason})

    if "eval_interval" in given and settings.eval_interval_tokens:
        problems.append(
            f"{given['eval_interval']}: eval_interval counts for nothing while eval_interval_tokens is "
            f"{settings.eval_interval_tokens}: give --eval_interval_tokens=0 too"
        )
    if "schedule" in given:
        new = read_schedule(config.schedule) if config.schedule else _only(schedule, position.fired)
        for name, count in position.fired.items():
            now = [_as_fired(entry) for entry in new.tracks.get(name, ())]
            for i, entry in enumerate(schedule.tracks[name][:count]):
                if now[i : i + 1] != [_as_fired(entry)]:
                    problems.append(
                        f"{config.schedule}: entry {entry.title} has fired already and must stay as it was: "
                        f"{json.dumps(dict(entry.given))}"
                    )
        if _as_written(new) != _as_written(schedule) and not problems:
            overrides.append(
                {
                    "key": "schedule",
                    "before": _pending(schedule, position.fired),
                    "after": _pending(new, position.fired),
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
        ramps, settings = in_smaller_pieces(ramps, settings, smaller), smaller
    if recorded.log_dir and "log_dir" not in given:
        reason = "a checkpoint does not choose where files are written: give it again"
        overrides.append({"key": "log_dir", "before": recorded.log_dir, "after": "", "applied": True, "reason": reason})
        recorded = recorded.model_copy(update={"log_dir": ""})
    if problems:
        raise Refused(problems)
    update = {key: getattr(config, key) for key in given} | {"out_dir": config.out_dir, "init_from": "resume"}
    config, position = recorded.model_copy(update=update), position.fitted(schedule)
    orchestrator = {**state.orchestrator, "ramps": [ramp.to_json() for ramp in ramps]}
    return Resumed(loaded, config, settings, schedule, position, orchestrator, overrides, passed_over, damaged)


def _no_other_data(recorded: TrainConfig, config: TrainConfig, settings: Settings) -> str:
    """Why a resume cannot go on with these data sets instead of those; nothing where it can."""
    before, after = recorded.datasets, config.datasets
    if (len(settings.mixture) == len(after) == 1) or (list(before) == list(after) and len(after) > 1):
        return ""
    return (
        f"dataset cannot change on resume from {shown(recorded.dataset)} to {shown(config.dataset)}: each data set of "
        "a mixture has its place in the run by its name; set_data_mixture in a schedule brings in others"
    )


def open_model(
    loaded: checkpoint.Checkpoint, settings: Settings, ranks: Ranks, device: torch.device
) -> tuple[GPT, Moments]:
    """A checkpoint's model and moments; where the ranks are sharded each reads its own parts. Raises Refused."""
    config, optimizer = settings.model, OPTIMIZERS[settings.optimizer]
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
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
    model, _ = kept(model, trainable_parameters(model, settings.frozen), settings.weights_dtype)
    model = sharding.empty(model, ranks.mesh, device, ranks.dtype)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {
        key: sharding.empty_state(shape, weights[key.rpartition("|")[0]])
        for key, shape in loaded.shapes.items()
        if "|" in key
    }
    with reading(loaded.path):
        loaded.read_into({**weights, **moments})
    return model, checkpoint.by_parameter(moments)


def _as_fired(entry: Entry) -> dict[str, Any]:
    """What must stay of an entry that has fired; what it is called and what it waited for may change."""
    return {key: value for key, value in entry.given.items() if key not in ("label", "after")}


def _as_written(schedule: Schedule) -> dict[str, Any]:
    return {
        name: [(entry.given, entry.rounds, entry.until, entry.closes) for entry in track]
        for name, track in schedule.tracks.items()
    }


def _pending(schedule: Schedule, fired: Mapping[str, int]) -> list[Mapping[str, Any]]:
    """The steps that have not fired, as they were written."""
    return [entry.given for name, track in schedule.tracks.items() for entry in track[fired.get(name, 0) :]]


def _only(schedule: Schedule, fired: Mapping[str, int]) -> Schedule:
    """A schedule of the steps that have fired, and no more."""
    tracks = {
        name: [_as_fired(entry) for entry in track[: fired.get(name, 0)]] for name, track in schedule.tracks.items()
    }
    plain = tracks.pop("", [])
    document = {"operations": plain, "tracks": tracks} if tracks else plain
    return parse_schedule(json.dumps(document, indent=1), "fired.json")


def check_fingerprint(config: TrainConfig, state: State, data: Sources) -> None:
    """Raises Refused where the data is not what the checkpoint was trained on, whatever its name is."""
    known = {name: print_ for name, print_ in data.fingerprint().items() if name in (*state.data, "train", "val")}
    changed = [name for name, print_ in known.items() if state.data.get(name) != print_]
    if changed and not state.settings.mixture:  # older versions read through the map of a file from the start
        size, path = config.shrunken_vocab_size, config.vocab_remapping_file
        through = data.remapped(read_remap(path, None, size)) if size else data
        changed = [name for name, print_ in through.fingerprint().items() if state.data.get(name) != print_]
    problems = []
    if changed and not config.allow_changed_data:
        problems.append(
            f"dataset {config.dataset}: the content of {' and '.join(f'{name}.bin' for name in changed)} is not what "
            f"the checkpoint was trained on ({state.config.dataset}; fingerprints differ): the stream of samples "
            "would not go on where it stopped; --allow_changed_data=True goes on all the same"
        )
    other = other_tokenizer(data.speaks, config, state.tokenizer)
    if changed and other and not config.allow_other_tokenizer:
        problems.append(f"{other}; --allow_other_tokenizer=True goes on all the same")
    if problems:
        raise Refused(problems)
