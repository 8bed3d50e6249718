"""What a run is now (Settings) and how far it has come (Progress): plain values that a checkpoint can hold.

Settings is everything that a schedule may change. It holds no tensors and is compared, printed and stored as it is.
Events such as "restart the warmup" are counters in it, so that every change is a difference between two Settings.
Progress is what only grows. Neither knows how to do anything to a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from orchestrate.data.proportions import UNITS
from orchestrate.data.stream import Cursor
from orchestrate.model.config import ONCE_SHAPE, Fade, ModelConfig, check_fading
from orchestrate.training.settings.metrics import VAL_LOSS
from orchestrate.training.settings.values import (
    Finite,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    WeightsDtype,
    changed,
)

SKETCH = 1021
"""Numbers that stand for all weights, where drift is measured from one analysis to the next."""
EXACTLY = ConfigDict(extra="forbid")
"""As __pydantic_config__ of a dataclass that is read from a file: a field that it has not is an error."""


def _whole_sketch(sketch: tuple[float, ...]) -> tuple[float, ...]:
    if len(sketch) not in (0, SKETCH):
        raise ValueError(f"no sketch of weights: {len(sketch)} numbers")
    return sketch


def _possible(cursor: Cursor) -> Cursor:
    if not 0 <= cursor.sample < 2**60 or cursor.length < 1 or cursor.block_size % cursor.length:
        raise ValueError(f"no place in a stream: {cursor}")
    names, units = [s.name for s in cursor.sources], [s.units for s in cursor.sources]
    possible = all(0 <= s.sample < 2**60 and abs(s.debt) < 2**40 for s in cursor.sources)
    if names and not (possible and len({*names}) == len(names) and min(units) >= 0 and sum(units) == UNITS):
        raise ValueError(f"no place in a mixture: {cursor.sources}")
    return cursor


@dataclass(frozen=True)
class Settings:
    """Everything about a run that a schedule may change. Units: iterations (optimizer steps) unless named otherwise."""

    __pydantic_config__ = EXACTLY

    model: ModelConfig
    batch_size: PositiveInt
    """Sequences in one micro-step on one rank."""
    grad_accum: PositiveInt
    """Micro-steps in one iteration, counted over all ranks."""
    learning_rate: NonNegativeFloat
    min_lr: NonNegativeFloat
    warmup_iters: NonNegativeInt
    lr_decay_iters: NonNegativeInt
    decay_lr: bool
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"]
    wsd_decay_fraction: PositiveFloat
    weight_decay: NonNegativeFloat
    beta1: Fraction
    beta2: Fraction
    grad_clip: NonNegativeFloat
    """Largest global gradient norm; 0 switches clipping off."""
    eval_interval: PositiveInt
    eval_iters: PositiveInt
    """Batches of one evaluation."""
    log_interval: PositiveInt
    lora_alpha: PositiveFloat
    """Alpha given to adapters that are added from now on."""
    use_rslora: bool = False
    init_lora_weights: Literal["default", "pissa"] = "default"
    """How adapters that are added from now on are scaled, and how they start."""
    lora_dropout: Fraction = 0.0
    """Of what the adapters of Linear layers read."""
    dropout: Fraction = 0.0
    eval_tasks: tuple[str, ...] = ()
    """Tasks that evaluations score, each NAME or NAME:FOLDER."""
    eval_interval_tokens: NonNegativeInt = 0
    """An evaluation at the first boundary at or after each multiple of so many tokens; 0: eval_interval counts."""
    document_mask: bool = False
    """Whether no token of training and validation sees another document of its row (model/gpt.py)."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes the inside of each block again instead of keeping it."""
    weights_dtype: WeightsDtype = "float32"
    """The number type in which matrices that do not train are kept; all else is float32."""
    optimizer: OptimizerName = "adamw"
    momentum: Fraction = 0.9
    sequence_length: NonNegativeInt = 0
    """Tokens in one training sequence, at most (and 0 for) model.block_size."""
    frozen: tuple[str, ...] = ()
    """Leaf layer names (attn.0, ln_f, ...) in model order whose parameters do not train."""
    lr_restarts: NonNegativeInt = 0
    """Counter: each increase starts the learning-rate schedule anew."""
    rewarm_iters: NonNegativeInt = 0
    """Iterations over which the rate climbs back from 0 after a rewarming."""
    rewarms: NonNegativeInt = 0
    """Counter: each increase starts a rewarming."""
    reshapes_asked: NonNegativeInt = 0
    """Counter: each increase is a change of weights or moments that the shape does not show (other order, reset)."""
    vocabulary_map: tuple[NonNegativeInt, ...] = ()
    """New token id of each id in the data files; () where they are the same."""
    mixture: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Data set -> its share of the samples; all together 1. Empty in states of versions that had one data set."""
    curriculum_alpha: Annotated[NonNegativeFloat, Field(le=1)] = 0.0
    """How far samples of rare tokens are preferred, from 0 (not at all) to 1 (data/curriculum.py)."""
    checkpoints_asked: NonNegativeInt = 0
    """Counter: each increase asks for a checkpoint at this boundary."""
    stops_asked: NonNegativeInt = 0
    """Counter: each increase ends the run at this boundary."""
    fading: dict[str, Fade] = field(default_factory=dict)
    """attn.N, mlp.N or lm_head (tied or not) -> how far its newest part is faded in. Empty but for a while."""

    def __post_init__(self) -> None:
        check_fading(self.model, self.fading)
        if not self.sequence_length:
            object.__setattr__(self, "sequence_length", self.model.block_size)

    @property
    def samples_per_iter(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def tokens_per_iter(self) -> int:
        return self.samples_per_iter * self.sequence_length

    def cursor(self, sample: int) -> Cursor:
        """The place of a sample in the units in force, of one data set."""
        return Cursor(self.model.block_size, self.sequence_length, sample)

    def followed(self, cursor: Cursor, before: Settings) -> Cursor:
        """A place in the stream of earlier settings, from which on these hold."""
        cut = cursor.cut(self.model.block_size, self.sequence_length)
        return cut.mixed(self.mixture, only=next(iter(before.mixture), "")) if self.mixture else cut

    def evaluates_as(self, other: Settings) -> bool:
        """Whether the same weights, carried from these settings to the others, have the same validation loss."""

        def facts(s: Settings) -> tuple[Any, ...]:
            rounded = () if s.weights_dtype == "float32" else (s.weights_dtype, s.frozen)
            return s.model, s.reshapes_asked, s.fading, s.vocabulary_map, s.eval_iters, s.document_mask, rounded

        return facts(self) == facts(other)

    def in_smaller_pieces(self) -> Settings | None:
        """The same global batch in smaller micro-batches; None where a micro-batch is one sequence already."""
        for factor in range(2, self.batch_size + 1):
            if self.batch_size % factor == 0:
                return replace(self, batch_size=self.batch_size // factor, grad_accum=self.grad_accum * factor)
        return None

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lists = {name: list(values[name]) for name in ("frozen", "vocabulary_map", "eval_tasks")}
        fading = {layer: dataclasses.asdict(fade) for layer, fade in self.fading.items()}
        return {**values, "model": self.model.to_json(), **lists, "fading": fading}

    @classmethod
    def from_json(cls, values: Any) -> Settings:
        """Raises ValueError (pydantic's) for what `to_json` cannot have made, now or in an older version."""
        if isinstance(values, dict) and isinstance(model := values.get("model"), dict):
            moved = {name: model[name] for name in ONCE_SHAPE if name in model and name not in values}
            kept = {name: value for name, value in model.items() if name not in moved}
            values = {**values, **moved, "model": kept}
        return TypeAdapter(cls).validate_python(values)


_FADING, _MIXTURE = "fading.", "mixture."


def present_name(name: str) -> str:
    """The dotted name that a field of Settings has now, of one from a checkpoint of an older version."""
    bare = name.removeprefix("model.")
    return bare if bare.split(".")[0] in ONCE_SHAPE else name


def get_field(settings: Settings, name: str) -> Any:
    """The value of a field by its name, e.g. `learning_rate`, `mixture.NAME` or `fading.mlp.3`.

    The latter is the share of what is being faded in, 1.0 where nothing is.
    """
    if name.startswith(_MIXTURE):
        return settings.mixture.get(name.removeprefix(_MIXTURE), 0.0)
    if name.startswith(_FADING):
        fade = settings.fading.get(name.removeprefix(_FADING))
        return 1.0 if fade is None else fade.share
    return getattr(settings, name)


def with_field(settings: Settings, name: str, value: Any) -> Settings:
    """A copy of the settings with one field, by its name, replaced. What has faded in fully is plain again."""
    if name.startswith(_MIXTURE):
        return replace(settings, mixture={**settings.mixture, name.removeprefix(_MIXTURE): value})
    if name.startswith(_FADING):
        fading, layer = dict(settings.fading), name.removeprefix(_FADING)
        if value >= 1.0:
            fading.pop(layer, None)
        else:
            fading[layer] = replace(fading[layer], share=value)
        return replace(settings, fading=fading)
    return replace(settings, **{name: value})


def numbers_in(settings: Settings, field_name: str) -> list[str]:
    """The names by which `get_field` and `with_field` know the numbers of a field: of a mixture one a source."""
    return [f"mixture.{name}" for name in settings.mixture] if field_name == "mixture" else [field_name]


def differences(before: Settings, after: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that differ, by dotted name, as (values before, values after), fit for JSON."""

    def flat(settings: Settings) -> dict[str, Any]:
        values = settings.to_json()
        model = values.pop("model")
        return {**values, **{f"model.{key}": value for key, value in model.items()}}

    old, new = flat(before), flat(after)
    names = [name for name in new if old.get(name) != new[name]]
    return {name: old.get(name) for name in names}, {name: new[name] for name in names}


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Differences on one line. That weights were asked to move, a counter, tells a person nothing."""
    return ", ".join(changed(name, old, after[name]) for name, old in before.items() if name != "reshapes_asked")


@dataclass(frozen=True)
class Place:
    """Where a step begins."""

    iter: int
    cursor: Cursor
    tokens: int


@dataclass
class Progress:
    """How far the run has come. Saved whole in every checkpoint."""

    __pydantic_config__ = EXACTLY

    cursor: Annotated[Cursor, AfterValidator(_possible)]
    """The next sample of the training stream, over all ranks."""
    iter: NonNegativeInt = 0
    """Optimizer steps done."""
    tokens: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    """Wall-clock seconds spent in this run, over all its starts."""
    lr_start_iter: NonNegativeInt = 0
    """Where the learning-rate schedule last (re)started."""
    rewarm_start_iter: NonNegativeInt = 0
    """Where the latest rewarming started."""
    best_val_loss: Finite | None = None
    best_iter: NonNegativeInt | None = None
    last_val_loss: Finite | None = None
    last_eval_iter: int = -1
    last_eval_tokens: int = -1
    changed_since_eval: bool = False
    """Whether the schedule has changed what the evaluation of this very iteration had measured."""
    stopping_metric: str = VAL_LOSS
    """What the next two are about."""
    stopping_best: Finite | None = None
    """The value that early stopping measures against (the lowest less what min_delta ignores)."""
    evals_without_gain: NonNegativeInt = 0
    loss_mean: Finite = 0.0
    """Running mean and variance of the training loss, kept where spikes are looked for (spike_sigma)."""
    loss_variance: NonNegativeFloat = 0.0
    losses_seen: NonNegativeInt = 0
    sick_steps: NonNegativeInt = 0
    """Steps in a row that were not taken."""
    noise: tuple[Finite, Finite, Finite] = (0.0, 0.0, 0.0)
    """Of the gradient noise scale: running means of |G|^2, of tr(Sigma) and of 1. As of the last save."""
    sketch: Annotated[tuple[Finite, ...], AfterValidator(_whole_sketch)] = ()
    """The weights at the last analysis, in SKETCH numbers."""
    sketch_of: str = ""
    """A text that tells which weights these are."""

    @classmethod
    def start(cls, settings: Settings) -> Progress:
        """The beginning of a run."""
        return cls(settings.followed(settings.cursor(0), settings))

    @property
    def place(self) -> Place:
        return Place(self.iter, self.cursor, self.tokens)

    def go(self, place: Place) -> None:
        """Be where a step begins. Clock, losses and counters stay."""
        self.iter, self.cursor, self.tokens = place.iter, place.cursor, place.tokens

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if not self.cursor.sources:
            del values["cursor"]["sources"]
        return values

    @classmethod
    def from_json(cls, values: Any, settings: Settings) -> Progress:
        """Raises ValueError (pydantic's) for what `to_json` cannot have made.

        Older states hold `samples`, a number in the units of their settings, instead of a cursor.
        """
        if isinstance(values, dict) and "samples" in values and "cursor" not in values:
            rest = {name: value for name, value in values.items() if name != "samples"}
            samples = TypeAdapter(NonNegativeInt).validate_python(values["samples"])
            values = {**rest, "cursor": dataclasses.asdict(settings.cursor(samples))}
        progress = TypeAdapter(cls).validate_python(values)
        if progress.cursor != settings.followed(progress.cursor, settings):
            raise ValueError(f"cursor counts in other units or another mixture than the settings: {progress.cursor}")
        return progress


@dataclass(frozen=True)
class Measured:
    """What a trigger may look at: metrics by name (settings/metrics.py), equal on every rank."""

    now: Mapping[str, float] = field(default_factory=dict)
    """Those that this boundary's evaluation or line of metrics has just given."""
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Values since the head of the queue became the head, oldest first, those of now included, for the metrics that
    its triggers look back on. The lowest of the oldest may stand for all of them."""
    latest: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric since waits began: what `all_of` compares where there is none of now."""


@dataclass(frozen=True)
class Elapsed:
    """How far the run has come, and how much of that the head of the queue has waited."""

    iter: int
    tokens: int
    iters_waited: int
    tokens_waited: int
    seconds_waited: float | None
    """None where the clock is not looked at (it is read every log_interval, on rank 0 only)."""
