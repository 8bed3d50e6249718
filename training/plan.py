"""--plan: check everything, fold the schedule over the settings, print the stages, train nothing.

Runs the very same operation code that runs later: `plan` on Settings, and for a change of shape `reshape` on the meta
device, where nothing is allocated. What can only be guessed before a run is labelled so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic wants it until Python 3.12

from orchestrate.model.config import BLOCK_LAYERS, OPTIONS, ModelConfig, layer_of_adapter
from orchestrate.model.lineage import Lineage
from orchestrate.model.lora import trainable_parameters
from orchestrate.training.run.casting import kept
from orchestrate.training.run.changes import needs_agreement, reshapes
from orchestrate.training.run.device import pick_device
from orchestrate.training.run.optimizers import OPTIMIZERS
from orchestrate.training.schedule.doubts import doubts as doubts_of_schedule
from orchestrate.training.schedule.dry import DryRun
from orchestrate.training.schedule.file import Entry, Schedule, title
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.schedule.own import OwnFile
from orchestrate.training.schedule.position import Mark, Position, Queue
from orchestrate.training.schedule.stages import Stage, model_on_meta, plan_stages
from orchestrate.training.session.ending import finished
from orchestrate.training.session.resume import check_fingerprint, resume
from orchestrate.training.session.start import (
    check_data,
    check_target,
    data_of,
    doubts,
    opened,
    planned_model_config,
    settings_from,
    the_schedule,
)
from orchestrate.training.settings.config import TrainConfig, depth_told
from orchestrate.training.settings.errors import OperationFailed, Refused
from orchestrate.training.settings.metrics import EVALUATED, LOGGED, VAL_LOSS, comes_with, numbers
from orchestrate.training.settings.records import Progress, Settings, differences
from orchestrate.training.settings.values import brief
from orchestrate.training.store.manifest import refuse_to_overwrite
from orchestrate.training.store.run_folder import METRICS, METRICS_KINDS, read_lines

_SHAPE = "n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "n_hidden", "block_size", "vocab_size"
_LONGEST = 10**7
"""Iterations of a recorded run; every one of them is replayed."""


@dataclass(frozen=True)
class Row:
    """One stage of the run: the settings in force after an entry, and what they cost."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    entry: int | None
    """Its number in the file; null at the start."""
    track: str
    """Empty for the track without a name."""
    round: int
    rounds: int
    operation: str
    """Name and value, as given."""
    when: str
    """Its triggers in words."""
    label: str
    after: str
    """The label from whose firing its waits count."""
    over: int | None
    """Iterations in which it moves a number, or fades in what is new."""
    style: str | None
    """How it moves there; null where it does not."""
    exponent: float | None
    guard: dict[str, Any] | None
    """What takes it back where it hurts: every field of the guard, defaults too."""
    reevaluate: bool
    on_error: str
    desc: str
    n_layer: int
    n_embd: int
    tokens_per_iter: int
    settings: Settings
    parameters: int
    trainable: int
    flops_per_token: float
    """Forward and backward, by the rule 6 N + 12 L H Q T."""
    model_bytes: int
    """Parameters and their gradients, on one rank."""
    optimizer_bytes: int
    activation_bytes: int
    """Estimate for one micro-step of eager training."""
    rewraps: int
    """How often the model is wrapped anew for several processes."""
    recompiles: int
    """Estimate: graphs of a kind not compiled before, and first changes of batch or length."""
    keeps_function: bool | None
    """Whether the model computes the same right after; null at the start."""
    changes: dict[str, list[Any]]
    """Field of the settings: [before, after]."""

    @property
    def title(self) -> str:
        """As `Entry.title`."""
        return "start" if self.entry is None else title(self.entry, self.round, self.rounds)

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "settings": self.settings.to_json()}


class Written(TypedDict):
    """What `orchestrate plan --json` writes: the stages of a run, and what is to be said about them."""

    stages: list[Row]
    warnings: Annotated[list[str], Field(description="what can hardly be meant")]
    notes: list[str]
    against: Annotated[
        dict[str, str] | None,
        Field(description="with --against: an entry's number, and its round -> when it would have fired"),
    ]


def json_schema() -> dict[str, Any]:
    """The JSON schema of `Written`; docs/plan.schema.json is made of it."""
    return TypeAdapter(Written).json_schema(mode="serialization")


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and what is to be said about them."""

    rows: list[Row]
    notes: list[str]
    fires: dict[str, str] | None = None
    """With --against: entry number, and its round -> when it would have fired on the recorded metrics."""
    warnings: Sequence[str] = ()
    """What is possible and can hardly be meant."""

    def to_json(self) -> str:
        written = {
            "stages": [row.to_json() for row in self.rows],
            "warnings": list(self.warnings),
            "notes": self.notes,
            "against": self.fires,
        }
        return json.dumps(written, indent=1)


def make(
    config: TrainConfig,
    given: dict[str, str],
    world_size: int,
    against: str = "",
    operations: Sequence[OwnFile] = (),
) -> Plan:
    """The plan of a run. Raises Refused with every problem of the configuration and the schedule.

    Args:
        against: a run folder; says when each entry would have fired on its recorded metrics.
        operations: files of the user's own operations, registered now.
    """
    notes: list[str] = []
    foreign, position = None, Position()
    pick_device(config.device, 0)
    if config.init_from == "resume":
        resumed = resume(config, given, operations)
        position, fired = resumed.position, sum(resumed.position.fired.values())
        schedule, settings, config = resumed.schedule, resumed.settings, resumed.config
        notes.append(f"{fired} entries have fired; the rest is planned from {resumed.loaded.path.name}")
        notes += filter(None, [finished(config, resumed.loaded.state.progress)])
    else:
        schedule, (config, foreign) = the_schedule(config), opened(config)
        model, notes = planned_model_config(config, foreign)
        notes += depth_told(config, given)
        settings = settings_from(config, model, foreign)
    stages = plan_stages(schedule, settings, world_size, position)
    notes += _of_tracks(schedule, position, stages)
    data = data_of(config, stages)
    check_data(data, config, stages, foreign)
    check_target(stages, config)
    if config.init_from == "resume":
        check_fingerprint(config, resumed.loaded.state, data)
    notes += doubts(data, config, settings, resumed.loaded.state.tokenizer if config.init_from == "resume" else None)
    share = world_size if config.parallel == "fsdp" else 1
    rows = _rows(stages, config, schedule, share)
    final = stages[-1].settings.model
    if config.target_architecture or final != stages[0].settings.model:
        shape = {key: getattr(final, key) for key in _SHAPE} | {"n_hidden": brief(list(final.n_hidden))}
        told = ", ".join(f"{key} {value}" for key, value in shape.items())
        reached = ", as target_architecture says" if config.target_architecture else ""
        notes.append(f"the final model: {told}, {rows[-1].parameters:,} parameters{reached}")
    if config.parallel == "fsdp":
        notes.append(f"model and optimizer memory is that of one of {share} processes, sharded evenly")
    later = [stage.entry for stage in stages if stage.entry and stage.entry.operation.decided_on_machine]
    if later:
        names = ", ".join(sorted({entry.operation.name for entry in later}))
        numbered = sorted({entry.number for entry in later})
        notes.append(f"entries {numbered}: {names} is decided on the machine; shown unchanged")
    if config.init_from != "resume":
        try:
            refuse_to_overwrite(config.out_dir)
        except Refused as refused:  # a plan is made beside a run, too; what it is of must be elsewhere
            notes.append(f"a start is refused as it is: {refused}")
    fires = None
    if against:
        fires, missing = _replay(schedule, settings, Path(against), position)
        told = f"`fires at` takes metrics, tokens and seconds of {against} as recorded, as if no entry changed them"
        notes += [told, *missing]
    return Plan(rows, notes, fires, doubts_of_schedule(schedule, position, stages, config.max_iters))


def _of_tracks(schedule: Schedule, position: Position, stages: list[Stage]) -> list[str]:
    """What a plan of several tracks says of its order, and of what can never fire."""
    notes = []
    if len(schedule.tracks) > 1:
        notes.append(
            "the tracks go side by side; the stages are in the order of the latest times, what nothing bounds at the "
            "end, and may come in another"
        )
    if ending := sorted({stage.entry.number for stage in stages if stage.entry and stage.entry.until}):
        notes.append(f"entries {ending}: all their rounds are shown, and `until` may end them before")
    planned = {(stage.entry.track, stage.entry.step) for stage in stages if stage.entry}
    never = {
        entry.number
        for name, track in schedule.tracks.items()
        for entry in track[position.fired.get(name, 0) :]
        if (name, entry.step) not in planned
    }
    if never:
        notes.append(f"entries {sorted(never)} never fire: what they come after was skipped or taken back")
    return notes


# ---------------------------------------------------------------------------------------------- what a stage costs


def _rows(stages: list[Stage], config: TrainConfig, schedule: Schedule, share: int) -> list[Row]:
    """The stages, their shapes checked by reshaping on the meta device. Raises Refused."""
    model = model_on_meta(stages[0].settings.model)
    trained = trainable_parameters(model, stages[0].settings.frozen)
    kinds: set[str] = set()
    batches, dropped = {_batch_shape(stages[0].settings)}, stages[0].settings.dropout > 0
    rows = []
    for i, stage in enumerate(stages):
        s, before = stage.settings, stages[i - 1].settings if i else None
        if before is not None and stage.entry is not None and reshapes(before, s):
            try:
                model, lineage = stage.entry.operation.reshape(model, s.model, torch.Generator().manual_seed(0))
            except Exception as error:
                raise Refused(
                    f"{schedule.place(stage.entry)}: {stage.entry}: {type(error).__name__}: {error}"
                ) from error
            trained = _with_moments(lineage, trained)
        trainable = trainable_parameters(model, s.frozen)
        trained = trained | trainable  # a parameter that ever trained keeps its moments
        shapes = {name: p.shape for name, p in model.named_parameters()}
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        model, cast = kept(model, trainable, s.weights_dtype)
        weights = sum(p.nbytes for p in model.parameters())
        state_bytes = OPTIMIZERS[s.optimizer].state_bytes
        graphs = _graphs(s)
        recompiles = len(graphs - kinds) if i else 0
        kinds |= graphs
        if i and _batch_shape(s) not in batches and len(batches) == 1:
            recompiles += len(graphs)  # the batch becomes dynamic, once
        batches.add(_batch_shape(s))
        if s.dropout > 0 and not dropped:
            recompiles, dropped = recompiles + 2, True  # in blocks, and before them
        old, now = differences(before, s) if before is not None else ({}, {})
        rows.append(
            Row(
                **_said(stage.entry),
                n_layer=s.model.n_layer,
                n_embd=s.model.n_embd,
                tokens_per_iter=s.tokens_per_iter,
                settings=s,
                parameters=sum(sizes.values()),
                trainable=sum(sizes[name] for name in trainable),
                flops_per_token=flops_per_token(s.model, sum(sizes.values()), s.sequence_length),
                model_bytes=(weights + 4 * sum(sizes[name] for name in trainable)) // share,
                optimizer_bytes=sum(state_bytes(name, shapes[name], share) for name in trained),
                activation_bytes=activation_bytes(s, 4 if config.dtype in ("auto", "float32") else 2),
                rewraps=int(before is not None and needs_agreement(before, s)),
                recompiles=recompiles if config.compile else 0,
                keeps_function=_keeps_function(stage.entry) and not cast.rounded,
                changes={name: [old[name], now[name]] for name in now},
            )
        )
    return rows


def _said(entry: Entry | None) -> dict[str, Any]:
    """What an entry says of itself, as fields of a Row."""
    if entry is None:
        said: dict[str, Any] = dict.fromkeys(("track", "when", "label", "after", "desc"), "")
        said |= dict.fromkeys(("entry", "over", "style", "exponent", "guard"))
        return {**said, "round": 1, "rounds": 1, "operation": "start", "reevaluate": False, "on_error": "stop"}
    same = "track", "round", "rounds", "label", "after", "over", "reevaluate", "on_error", "desc"
    return {
        **{name: getattr(entry, name) for name in same},
        "entry": entry.number,
        "operation": str(entry),
        "when": when(entry),
        "style": entry.style if entry.over else None,
        "exponent": entry.exponent if entry.over and entry.style == "power" else None,
        "guard": entry.guard.model_dump() if entry.guard else None,
    }


def _with_moments(lineage: Lineage, trained: set[str]) -> set[str]:
    """Names of the new model's parameters that take over moments."""
    return {name for name, o in lineage.items() if (o.name or o.prior) in trained}


def _keeps_function(entry: Entry | None) -> bool | None:
    if entry is None:
        return None
    return entry.operation.keeps_function or bool(entry.over and entry.operation.fades)


def _batch_shape(s: Settings) -> tuple[int, int]:
    return s.batch_size, s.sequence_length


def _graphs(s: Settings) -> set[str]:
    """What compiled graphs depend on: those of blocks, and of what comes before and after them."""
    c = s.model
    shape = [getattr(c, name) for name, option in OPTIONS.items() if option.shapes_blocks]

    def graph(layers: Sequence[str], *more: object) -> str:
        adapters = {name: spec for name, spec in c.lora.items() if layer_of_adapter(name) in layers}
        # Blocks of any number have one graph, so a number says nothing.
        specs = [(name.split(".")[::2], spec) for name, spec in adapters.items()]
        drops = bool(adapters) and s.lora_dropout > 0
        frozen = [name in s.frozen for name in layers]
        return repr((shape, more, specs, drops, frozen, s.weights_dtype if adapters or any(frozen) else ""))

    blocks = {graph([f"{kind}.{n}" for kind in BLOCK_LAYERS], c.n_hidden[n], s.document_mask) for n in range(c.n_layer)}
    before = graph(["wte", "wpe"], "before", c.vocab_size, c.block_size if c.position == "learned" else 0)
    after = graph(["wte", "ln_f"] if c.tie_weights else ["ln_f", "lm_head"], "after", c.vocab_size, c.tie_weights)
    return {*blocks, before, after}


def flops_per_token(c: ModelConfig, parameters: int, length: int) -> float:
    """Forward and backward FLOPs for one token: 6 N + 12 L H Q T (Chowdhery et al. 2022, arXiv:2204.02311, app. B).

    N counts all parameters but the position table.
    """
    n = parameters - (c.block_size * c.n_embd if c.position == "learned" else 0)
    return 6.0 * n + 12.0 * c.n_layer * c.n_head * c.head_size * length


def activation_bytes(s: Settings, width: int) -> int:
    """What one micro-step keeps for its backward, roughly; `width` bytes a number.

    Per block and token: input and output of both norms, queries, keys and values (queries and keys twice where they
    are normed), the heads' output twice, the inner MLP tensors (two, with a gate four); then the logits with their
    softmax and its gradient. With activation checkpointing only the input of each block, and the inside of one. With
    the mask between documents also that mask, once, and keys and values of a head for each head of queries.
    """
    c, tokens = s.model, s.batch_size * s.sequence_length
    heads = (c.n_head + 2 * c.n_kv_head) * c.head_size + 2 * c.n_head * c.head_size
    heads += (c.n_head + c.n_kv_head) * c.head_size if c.qk_norm else 0
    heads += 2 * (c.n_head - c.n_kv_head) * c.head_size if s.document_mask else 0
    mask = tokens * s.sequence_length if s.document_mask else 0
    inner = 4 if c.activation == "swiglu" else 2
    inside = [4 * c.n_embd + heads + inner * hidden for hidden in c.n_hidden]
    blocks = c.n_layer * c.n_embd + max(inside) if s.activation_checkpointing else sum(inside)
    return width * mask + tokens * (width * (blocks + 2 * c.n_embd) + 4 * 3 * c.vocab_size)


# ---------------------------------------------------------------------------------------------- an entry in words


def when(entry: Entry) -> str:
    """An entry's triggers in one cell."""
    waits = " or ".join(map(str, entry.triggers)) or "at once"
    after = f"after {entry.after}: {waits}" if entry.after else waits
    return f"{after}, not once {entry.until.condition}" if entry.until else after


# ---------------------------------------------------------------------------------------------- against a run


def _replay(schedule: Schedule, settings: Settings, run: Path, position: Position) -> tuple[dict[str, str], list[str]]:
    """When each pending step fires on a recorded run's metrics, by the orchestrator's own code. Raises Refused.

    Returns also notes. What has fired by now has fired at the start of the recorded run.
    """
    # Without guards nothing is taken back; a fade has no part in when entries fire, but for what waits for it.
    settings = replace(settings, fading={})
    tracks = {
        name: tuple(replace(entry, guard=None, over=None if entry.operation.fades else entry.over) for entry in entries)
        for name, entries in schedule.tracks.items()
    }
    dry = DryRun(settings, Progress.start(settings))
    orchestrator = Orchestrator(replace(schedule, tracks=tracks), dry, dry)
    orchestrator.position.queues = {name: Queue(position.fired.get(name, 0)) for name in tracks}
    orchestrator.position.marks = dict.fromkeys(position.marks, Mark())
    asked = {name for name in orchestrator.asked if name != VAL_LOSS}
    recorded = _recorded(run, asked)
    losses, logged, p = recorded.losses, recorded.logged, dry.progress
    iters = sorted(recorded.clock)
    tokens, seconds = (np.interp(range(iters[-1] + 1), iters, [recorded.clock[i][n] for i in iters]) for n in (0, 1))
    stopped: int | None = None
    for iteration in range(iters[-1] + 1):
        p.iter, p.tokens, p.seconds = iteration, round(tokens[iteration]), float(seconds[iteration])
        dry.loss = losses.get(iteration, dry.loss)
        orchestrator.observe(logged.get(iteration, {}))
        try:
            orchestrator.consult(losses.get(iteration), look_at_clock=iteration in recorded.clock)
        except OperationFailed:  # in an order that the check did not have; the event says why
            stopped = iteration
            break
    fires = {entry.title: "not at all: its repetition ends before" for entry in schedule.entries}
    until = (
        f"not by iteration {stopped}: the run stops there" if stopped is not None else f"not by iteration {iters[-1]}"
    )
    fires |= {entry.title: until for entry in orchestrator.missed()}
    for iteration, kind, fields in dry.events:
        if kind in ("operation", "error"):
            step = title(fields["entry"], fields.get("round", 1), fields.get("rounds", 1))
            said = fields["reason"] if kind == "operation" else f"fails: {fields['message']}"
            fires[step] = f"{iteration}: {said}"
    missing = asked.difference(*logged.values())
    return fires, [f"{run} has no values of {name}" for name in sorted(missing)]


@dataclass
class _Recorded:
    """A metrics file, by iteration."""

    losses: dict[int, float] = field(default_factory=dict)
    """Of the evaluations at eval_interval."""
    clock: dict[int, tuple[int, float]] = field(default_factory=lambda: {0: (0, 0.0)})
    """(tokens, seconds)."""
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    """The metrics that are asked for, but val_loss."""


def _recorded(run: Path, asked: Set[str]) -> _Recorded:
    """The metrics of a run folder. Raises Refused."""
    path = run / METRICS if run.is_dir() else run
    found = _Recorded()
    try:
        for number, record in read_lines(path, METRICS_KINDS):
            if record is None:
                raise Refused(f"--against {path}:{number}: not a line of metrics")
            if record.get("void"):
                continue
            iteration = record["iter"]
            if iteration > _LONGEST:
                raise Refused(f"--against {path}:{number}: iter must be from 0 to {_LONGEST}, got {iteration}")
            found.clock[iteration] = record["tokens"], record["seconds"]
            if record["kind"] == "eval" and "why" not in record and record["val_loss"] is not None:
                found.losses[iteration] = record["val_loss"]
            if asked and "why" not in record:
                kinds = LOGGED if record["kind"] == "train" else EVALUATED
                values = {name: v for name, v in numbers(record).items() if name in asked and comes_with(name, kinds)}
                found.logged.setdefault(iteration, {}).update(values)
    except OSError as error:
        raise Refused(f"--against {run}: {path} cannot be read ({error})") from None
    if not found.losses:
        raise Refused(f"--against {path}: it holds no validation loss")
    return found
