"""From a configuration to settings, data, weights and a Session: everything that happens before the first step.

What is wrong with the input is found here, as `Refused` or ValueError, before anything is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from orchestrate.data.stream import DataSet, find_folder, open_data, read_meta, read_remap
from orchestrate.model import hugging_face, nanogpt
from orchestrate.model.config import OPTIONS, LoraSpec, ModelConfig
from orchestrate.model.gpt import GPT, check_shapes, from_weights, init_weights
from orchestrate.training.run import out_of_memory, sharding
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.optimizers import State
from orchestrate.training.run.run import Run, pick_device
from orchestrate.training.schedule.file import Schedule, Stage, parse_schedule, plan_stages, read_schedule
from orchestrate.training.settings.config import MODEL_KEYS, TrainConfig, model_values
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Progress, Settings, get_field, with_field
from orchestrate.training.settings.values import problems_of, shown
from orchestrate.training.store import checkpoint
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

DEFAULT_VOCAB = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as nanoGPT has it

# Configuration keys that are fields of Settings: a resume may override them.
IN_SETTINGS = {
    **{
        key: key
        for key in (
            "batch_size learning_rate min_lr warmup_iters lr_decay_iters decay_lr lr_schedule wsd_decay_fraction "
            "weight_decay beta1 beta2 grad_clip dropout eval_interval eval_iters log_interval"
        ).split()
    },
    "gradient_accumulation_steps": "grad_accum",
}
_SHAPE = "the checkpoint's weights have this shape; an operation of a schedule can change it"
# Keys that a resume must not change, and why.
FIXED = {
    **dict.fromkeys(MODEL_KEYS, _SHAPE),
    **dict.fromkeys("attn_lora_rank mlp_lora_rank embedding_rank shrunken_vocab_size".split(), _SHAPE),
    "lora_alpha": "set_lora_alpha in a schedule changes it without a jump",
    "vocab_remapping_file": "the tokens that the weights know would change their meaning",
    "seed": "the order of the data follows from it, and samples would repeat or be left out",
    "dataset": "the stream of samples would not go on where it stopped",
}


def model_config_from(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model that a configuration describes from scratch. Raises Refused."""
    try:
        return ModelConfig(vocab_size=vocab_size, **model_values(config), lora=adapters_from(config, config.n_layer))
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def adapters_from(config: TrainConfig, n_layer: int) -> dict[str, LoraSpec]:
    """The adapters that a configuration asks for on a model of so many layers."""
    ranks = {"attn": config.attn_lora_rank, "mlp": config.mlp_lora_rank}
    adapters = {
        f"{kind}.{n}": LoraSpec(rank, config.lora_alpha)
        for n in range(min(n_layer, OPTIONS["n_layer"].limit))
        for kind, rank in ranks.items()
        if rank
    }
    if config.embedding_rank:
        adapters["wte"] = LoraSpec(config.embedding_rank, config.lora_alpha)
    return adapters


def settings_from(config: TrainConfig, model: ModelConfig) -> Settings:
    """The settings that a run of this configuration starts with."""
    values = {name: getattr(config, key) for key, name in IN_SETTINGS.items()}
    return Settings(model=model, lora_alpha=config.lora_alpha, **values)


def planned_model_config(config: TrainConfig) -> tuple[ModelConfig, list[str]]:
    """The model's configuration without loading weights or data, and notes on what was assumed. Raises Refused."""
    notes: list[str] = []
    if config.init_from == "scratch":
        vocab = config.shrunken_vocab_size
        if not vocab:
            vocab = read_meta(find_folder(config.dataset)).vocab_size
        if not vocab:
            vocab = DEFAULT_VOCAB
            notes.append(f"no vocabulary size with data set {config.dataset}: {DEFAULT_VOCAB} (GPT-2) is assumed")
        return model_config_from(config, vocab), notes
    if config.init_from in hugging_face.GPT2_MODELS:
        model = hugging_face.gpt2_config(config.init_from)
    elif Path(config.init_from).is_dir():
        model = hugging_face.config_from_folder(config.init_from)
    else:
        model = nanogpt.config_from_checkpoint(config.init_from)
    return _adjusted(config, model), notes


def _adjusted(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    """A foreign model's configuration with this run's adapters and (shorter) block_size. Raises Refused."""

    def has(name: str, value: Any) -> bool:
        try:
            return replace(model, **{name: value}) == model
        except ValueError:
            return False

    wanted, problems = model_values(config), []
    if config.block_size > model.block_size:
        problems.append(
            f"block_size {config.block_size} is longer than the {model.block_size} that {config.init_from} was made for"
        )
    for key, name in MODEL_KEYS.items():
        if key in config.model_fields_set and key != "block_size" and not has(name, wanted[name]):
            given, present = shown(getattr(config, key)), shown(getattr(model, name))
            problems.append(f"{key}: got {given}, but the weights of {config.init_from} have {name} {present}")
    if problems:
        raise Refused(problems)
    try:
        return replace(model, block_size=config.block_size, lora=adapters_from(config, model.n_layer))
    except ValueError as error:
        raise Refused(str(error).split("; ")) from None


def initial_model(config: TrainConfig, model_config: ModelConfig) -> GPT:
    """Fresh or foreign weights in the planned shape. Raises ValueError."""
    if config.init_from == "scratch":
        model = GPT(model_config)
        init_weights(model, config.seed)
        return model
    from orchestrate.model.gpt import crop_block_size
    from orchestrate.model.lora import reshape_lora

    load = nanogpt.load_checkpoint if Path(config.init_from).is_file() else hugging_face.load
    model = crop_block_size(load(config.init_from), config.block_size)
    if model_config.lora:
        model, _ = reshape_lora(model, model_config, torch.Generator().manual_seed(config.seed))
    return model


def the_schedule(config: TrainConfig) -> Schedule:
    return read_schedule(config.schedule) if config.schedule else Schedule()


# ---------------------------------------------------------------------------------------------- resume


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
            return checkpoint.load(path), problems, damaged
        except Refused as error:
            problems += error.problems
            damaged.append(path)
    raise Refused([*problems, f"out_dir {out_dir}: there is no complete checkpoint to resume from"])


def understood(loaded: checkpoint.Checkpoint) -> tuple[TrainConfig, Settings]:
    """The configuration and settings of a checkpoint. Raises Refused for a state that this version did not write."""
    state, place = loaded.state, f"checkpoint {loaded.path}: state.json"
    parts: dict[str, Any] = {}
    try:
        parts["config"] = TrainConfig.model_validate(state["config"])
        parts["settings"] = Settings.from_json(state["settings"])
        Progress.from_json(state["progress"])
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


class _State(BaseModel):
    """What else is read from a checkpoint's state before the run is built."""

    orchestrator: _Orchestrator
    schedule: _Text
    scaler: dict[str, Any]
    log_sizes: dict[str, _Count]
    data: dict[str, str]
    tokenizer: dict[str, Any]
    wandb_id: str | None


def resume(config: TrainConfig, given: dict[str, str]) -> Resumed:
    """Read the run folder and settle every key that was given. Raises Refused with all that cannot be done."""
    loaded, passed_over, damaged = latest_good(config.out_dir)
    recorded, settings = understood(loaded)
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

    schedule = parse_schedule(loaded.state["schedule"]["text"], loaded.state["schedule"]["source"] or "schedule")
    if "schedule" in given and config.schedule:
        new = read_schedule(config.schedule)
        fired = loaded.state["orchestrator"]["position"]["fired"]
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


# ---------------------------------------------------------------------------------------------- the whole


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
        if state["data"] != data.fingerprint() and not config.allow_changed_data:
            raise Refused(
                f"dataset {config.dataset}: train.bin or val.bin is not the file that the checkpoint was trained on "
                "(fingerprints differ); --allow_changed_data=True goes on all the same"
            )
        settings = resumed.settings
        check_lengths(plan_stages(_rest(schedule, state), settings, ranks.world_size), data)
        model, moments = open_model(resumed.loaded, settings.model, ranks, device)
        return Run(
            config,
            settings,
            Progress.from_json(state["progress"]),
            model,
            data,
            ranks,
            device,
            moments,
            state["scaler"],
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
    return Run(config, settings, Progress(), initial_model(config, model_config), data, ranks, device)


def check_lengths(stages: list[Stage], data: DataSet) -> None:
    """Raises Refused where a stage's block_size is longer than a data file."""
    for stage in stages:
        for file in (data.train, data.val):
            try:
                file.require(stage.settings.model.block_size)
            except ValueError as error:
                place = f"entry {stage.entry.number}: {stage.entry}: " if stage.entry else ""
                raise Refused(f"{place}{error}") from None


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
    model = sharding.empty(config, ranks.mesh, device)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {
        key: torch.zeros(()) if key.endswith("|step") else torch.zeros_like(weights[key.rpartition("|")[0]])
        for key in loaded.shapes
        if "|" in key
    }
    loaded.read_into({**weights, **moments})
    return model, checkpoint.by_parameter(moments)


def _rest(schedule: Schedule, state: dict[str, Any]) -> Schedule:
    """The entries that have not fired."""
    fired = state["orchestrator"]["position"]["fired"]
    return Schedule(schedule.entries[fired:], schedule.source, schedule.text)
