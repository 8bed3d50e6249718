"""Operations that grow the model while it trains: deeper, wider, more heads, more words, longer sequences.

Each says in `plan` what the model is afterwards and leaves weights and lineage to model/growth.py. With `over: N`
what is new is masked and fades in (masked growth, Yao et al. 2023, arXiv:2305.02869), so that the function is exact at
the switch whatever the new weights are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from orchestrate.model import growth
from orchestrate.model.config import OPTIONS, ModelConfig, layer_names
from orchestrate.model.gpt import GPT
from orchestrate.model.growth import Layer
from orchestrate.model.lineage import Lineage
from orchestrate.training.operations.base import Machine, Operation, operation
from orchestrate.training.operations.layers import LayerNames, layers
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

_COPIES = "the function; every parameter and its moments, exactly where gradients have an exact image"


class Arguments(BaseModel):
    """Base of the mappings that operations take as `value`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _size(name: str, what: str, wanted: int | None, times: float | None, present: int, step: int = 1) -> int:
    """An absolute size, or a multiple of the present one, rounded down to one of `step`. Raises ScheduleError.

    Exactly one of them is given.
    """
    if (wanted is None) == (times is None):
        raise ScheduleError(f"{name}: give either {what} or times, got {'both' if times else 'neither'}")
    return wanted if wanted is not None else int(present * (times or 1) + 1e-6) // step * step


def _with_model(settings: Settings, **changes: Any) -> Settings:
    """Settings with another model; sequences that filled the context go on to fill it. Raises ScheduleError."""
    try:
        model = replace(settings.model, **changes)
    except ValueError as error:
        raise ScheduleError(str(error)) from None
    full = settings.sequence_length == settings.model.block_size
    return replace(settings, model=model, sequence_length=model.block_size if full else settings.sequence_length)


class GrowthOperation(Operation):
    """What operations that change the model's shape share."""

    touches: ClassVar = ("model",)
    renumbers: ClassVar = True

    def new_layers(self, before: ModelConfig, after: ModelConfig) -> list[int]:
        """Numbers of blocks that were not there before."""
        return []

    def fade(self, before: Settings, after: Settings) -> Settings:
        parts = growth.fading_parts(before.model, after.model, self.new_layers(before.model, after.model))
        if not parts:
            raise ScheduleError(f"{self.name}: `over` fades new parts in, and there are none here")
        return replace(after, fading={**after.fading, **parts})


# ---------------------------------------------------------------------------------------------- depth


class Stack(Arguments):
    """How many blocks (or how many times as many), what the new ones are, and where they go."""

    n_layer: PositiveInt | None = None
    times: Annotated[PositiveFloat, Field(le=OPTIONS["n_layer"].limit)] | None = None
    how: Literal["identity", "identity_copy", "copy", "cycle", "depth_up_scaling", "random"] = "identity"
    """identity: fresh, with zero output projections; identity_copy: of the block beside, with zero output projections;
    copy: of the block beside; cycle: of all blocks in turn; depth_up_scaling: see StackLayers; random: fresh."""
    where: Literal["top", "bottom", "interleave"] = "top"


class LayerOperation(GrowthOperation):
    """What stacking and dropping share: a list of the blocks that there will be."""

    touches: ClassVar = ("model", "frozen", "reshapes_asked")

    def layers(self, config: ModelConfig) -> list[Layer]:
        """The blocks of the new model in terms of the old one's. Raises ScheduleError."""
        raise NotImplementedError

    def plan(self, settings: Settings) -> Settings:
        config, found = settings.model, self.layers(settings.model)
        pairs = growth.rename_layers(list(config.lora), found)
        planned = _with_model(
            settings,
            n_layer=len(found),
            n_hidden=tuple(config.n_hidden[layer.kin] for layer in found),
            lora={new: config.lora[old] for new, old in pairs},
        )
        frozen = {new for new, _ in growth.rename_layers(settings.frozen, found)}
        same = [layer.source for layer in found] == list(range(config.n_layer))
        return replace(
            planned,
            frozen=tuple(name for name in layer_names(planned.model) if name in frozen),
            # Blocks in another order need not show in the model's configuration.
            reshapes_asked=settings.reshapes_asked + (not same),
        )

    def new_layers(self, before: ModelConfig, after: ModelConfig) -> list[int]:
        seen: set[int | None] = {None}
        found = []
        for n, layer in enumerate(self.layers(before)):
            if layer.source in seen:
                found.append(n)
            seen.add(layer.source)
        return found


@operation("stack_layers")
class StackLayers(LayerOperation):
    """Add blocks: a list of source blocks such as [0, 0, 1, 1], or {n_layer: 12, how: identity, where: top}; times: 2
    instead of n_layer doubles, and 1.5 makes three of two (whole blocks, rounded down).

    how: identity (fresh blocks that add nothing at first: the function stays), identity_copy (the same, but for their
    zero output projections copies of the block beside them: LLaMA Pro with where: interleave), copy (each new block is
    a copy of the block beside it), cycle (copies of all blocks in turn: G_stack with where: top), depth_up_scaling (the
    stack twice, without the last blocks of the first and as many first ones of the second: SOLAR; times makes an even
    number), random (fresh).
    where: top, bottom or interleave. Copies and random blocks change the function, unless `over: N` fades them in.
    """

    keeps: ClassVar = (
        "identity, or with over: the function and all moments exactly; copies: weights, adapters and moments of their "
        "source, not the function"
    )
    source: ClassVar = (
        "Gong et al. 2019 (progressive stacking, ICML); Du et al. 2024 (G_stack, arXiv:2405.15319); "
        "Wu et al. 2024 (LLaMA Pro, arXiv:2401.02415); Kim et al. 2023 (depth up-scaling, arXiv:2312.15166)"
    )
    fades: ClassVar = True
    value: Annotated[list[NonNegativeInt], Field(min_length=1)] | Stack

    @field_validator("value", mode="before")
    @classmethod
    def _no_bare_number(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError("must say what the number is: {n_layer: 12} (blocks) or {times: 2} (a factor)")
        return value

    @property
    def keeps_function(self) -> bool:
        if isinstance(self.value, Stack):
            return self.value.how.startswith("identity")
        return self.value == list(range(len(self.value)))

    def layers(self, config: ModelConfig) -> list[Layer]:
        old = config.n_layer
        if isinstance(self.value, list):
            if max(self.value) >= old:
                raise ScheduleError(f"stack_layers: source blocks are 0 to {old - 1}, got {max(self.value)}")
            return [Layer(n, n) for n in self.value]
        wanted = self.value
        step = 2 if wanted.how == "depth_up_scaling" else 1
        n_layer = _size("stack_layers", "n_layer", wanted.n_layer, wanted.times, old, step)
        added = n_layer - old
        if added < 1:
            raise ScheduleError(f"stack_layers: n_layer must be more than the {old} there are, got {n_layer}")
        if n_layer > OPTIONS["n_layer"].limit:
            raise ScheduleError(f"stack_layers: n_layer may be {OPTIONS['n_layer'].limit} at most, got {n_layer}")
        if wanted.how == "depth_up_scaling":
            if wanted.where != "top":
                raise ScheduleError(f"stack_layers: depth_up_scaling puts one stack on the other, got {wanted.where}")
            if n_layer % 2 or n_layer > 2 * old:
                allowed = f"an even number of blocks, at most twice the {old} there are"
                raise ScheduleError(f"stack_layers: depth_up_scaling makes {allowed}, got {n_layer}")
            return [Layer(n, n) for n in (*range(n_layer // 2), *range(old - n_layer // 2, old))]

        def new(beside: int, turn: int) -> Layer:
            match wanted.how:
                case "copy":
                    return Layer(beside, beside)
                case "cycle":
                    return Layer(turn % old, turn % old)
            return Layer(None, beside)

        kept = [Layer(n, n) for n in range(old)]
        match wanted.where:
            case "top":
                return kept + [new(old - 1, turn) for turn in range(added)]
            case "bottom":
                return [new(0, turn) for turn in range(added)] + kept
        found: list[Layer] = []
        turn = 0
        for n in range(old):
            found.append(kept[n])
            # Spread evenly: block n is followed by as many as bring the count to its share.
            while turn < (n + 1) * added // old:
                found.append(new(n, turn))
                turn += 1
        return found

    def reshape(
        self, model: GPT, target: ModelConfig, generator: torch.Generator, masked: bool = False
    ) -> tuple[GPT, Lineage]:
        how = self.value.how if isinstance(self.value, Stack) else ""
        zero, copied = how.startswith("identity"), how == "identity_copy"
        return growth.stack(model, target, self.layers(model.config), zero, generator, masked, copied)


@operation("drop_layers")
class DropLayers(LayerOperation):
    """Remove blocks by their numbers (-1 is the last); the others close up and keep weights, adapters, flags, moments.

    The loss jumps, and training on brings much of it back ("healing").
    """

    keeps: ClassVar = "the parameters that stay and their moments; not the function"
    source: ClassVar = "Men et al. 2024 (ShortGPT, arXiv:2403.03853); Fan et al. 2020 (LayerDrop, arXiv:1909.11556)"
    value: Annotated[list[int], Field(min_length=1)]

    @property
    def keeps_function(self) -> bool:
        return False

    def layers(self, config: ModelConfig) -> list[Layer]:
        last = config.n_layer - 1
        for number in self.value:
            if not -config.n_layer <= number <= last:
                raise ScheduleError(f"drop_layers: blocks are 0 to {last} (-1 is the last), got {number}")
        gone = {number % config.n_layer for number in self.value}
        kept = [Layer(n, n) for n in range(config.n_layer) if n not in gone]
        if not kept:
            raise ScheduleError(f"drop_layers would leave none of the {config.n_layer} blocks")
        return kept

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return growth.stack(model, target, self.layers(model.config), False, generator)


# ---------------------------------------------------------------------------------------------- width


class WidenMlp(Arguments):
    """The new width (or times the present one), of which MLPs, and what the new units are."""

    width: PositiveInt | None = None
    times: PositiveInt | None = None
    layers: LayerNames = "mlp.*"
    how: Literal["duplicate", "zero", "random"] | None = None
    """duplicate (the default): copies of old units; zero (the default with over): fresh units that write zeros;
    random: fresh, only with over."""
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """duplicate: how unequal the copies' shares are, so that they can drift apart."""


@operation("widen_mlp")
class WidenMlpOperation(GrowthOperation):
    """Widen MLPs: a width for all, or {width or times, layers, how: duplicate | zero | random, noise}."""

    keeps: ClassVar = _COPIES
    source: ClassVar = "Chen et al. 2016 (Net2WiderNet, arXiv:1511.05641)"
    fades: ClassVar = True
    value: PositiveInt | WidenMlp

    @field_validator("value", mode="before")
    @classmethod
    def _no_fraction(cls, value: Any) -> Any:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("must be the new width; a factor is {times: 2}, and it is a whole number")
        return value

    @property
    def wanted(self) -> WidenMlp:
        return self.value if isinstance(self.value, WidenMlp) else WidenMlp(width=self.value)

    @property
    def keeps_function(self) -> bool:
        return self.wanted.how != "random"

    def plan(self, settings: Settings) -> Settings:
        wanted, widths = self.wanted, list(settings.model.n_hidden)
        for name in layers(settings.model, wanted.layers):
            kind, _, number = name.partition(".")
            if kind != "mlp":
                raise ScheduleError(f"widen_mlp: {name} is no MLP; mlp.N are")
            present = widths[int(number)]
            width = _size("widen_mlp", "width", wanted.width, wanted.times, present)
            if present > width:
                raise ScheduleError(f"widen_mlp: {name} is {present} wide already, more than {width}")
            widths[int(number)] = width
        if tuple(widths) == settings.model.n_hidden:
            raise ScheduleError(f"widen_mlp: all of {wanted.layers} are that wide already")
        return _with_model(settings, n_hidden=tuple(widths))

    def fade(self, before: Settings, after: Settings) -> Settings:
        if self.wanted.how == "duplicate":
            raise ScheduleError("widen_mlp: duplicates share what their source wrote and cannot start masked; "
                                "with `over`, how is zero or random")  # fmt: skip
        return super().fade(before, after)

    def reshape(
        self, model: GPT, target: ModelConfig, generator: torch.Generator, masked: bool = False
    ) -> tuple[GPT, Lineage]:
        how = self.wanted.how or ("zero" if masked else "duplicate")
        return growth.widen_mlp(model, target, how, self.wanted.noise, generator)


class AddHeads(Arguments):
    """The new head counts (or times the present ones), and what the new heads are."""

    n_head: PositiveInt | None = None
    times: PositiveInt | None = None
    n_kv_head: PositiveInt | None = None
    """By default as many more as there are query heads."""
    how: Literal["duplicate", "zero", "random"] | None = None
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.5


@operation("add_heads")
class AddHeadsOperation(GrowthOperation):
    """More attention heads of the same size: a number of query heads, or {n_head or times, n_kv_head, how, noise}.

    how: duplicate (the default: copies share what their source wrote), zero (fresh heads that write zeros; the default
    with over), random (only with over).
    """

    keeps: ClassVar = _COPIES
    source: ClassVar = "Chen et al. 2022 (bert2BERT, arXiv:2110.07143)"
    fades: ClassVar = True
    value: PositiveInt | AddHeads

    @property
    def wanted(self) -> AddHeads:
        return self.value if isinstance(self.value, AddHeads) else AddHeads(n_head=self.value)

    @property
    def keeps_function(self) -> bool:
        return self.wanted.how != "random"

    def plan(self, settings: Settings) -> Settings:
        config, wanted = settings.model, self.wanted
        n_kv, n_head = wanted.n_kv_head, _size("add_heads", "n_head", wanted.n_head, wanted.times, config.n_head)
        if n_kv is None:
            n_kv = n_head * config.n_kv_head // config.n_head
        if n_head <= config.n_head:
            raise ScheduleError(f"add_heads: n_head must be above the {config.n_head} there are, got {n_head}")
        if n_kv < config.n_kv_head or not n_kv or n_head % n_kv:
            raise ScheduleError(
                f"add_heads: n_kv_head must be {config.n_kv_head} or more and divide n_head {n_head}, got {n_kv}"
            )
        if n_head // n_kv < config.n_head // config.n_kv_head:
            raise ScheduleError(
                f"add_heads: {config.n_head // config.n_kv_head} query heads share a key now and keep together, so "
                f"n_head / n_kv_head cannot fall to {n_head // n_kv}"
            )
        return _with_model(settings, n_head=n_head, n_kv_head=n_kv)

    def fade(self, before: Settings, after: Settings) -> Settings:
        if self.wanted.how == "duplicate":
            raise ScheduleError("add_heads: duplicates share what their source wrote and cannot start masked; "
                                "with `over`, how is zero or random")  # fmt: skip
        old, new = before.model, after.model
        if new.n_head * old.n_kv_head != old.n_head * new.n_kv_head:
            raise ScheduleError("add_heads: with `over`, query and key heads grow in proportion")
        return super().fade(before, after)

    def reshape(
        self, model: GPT, target: ModelConfig, generator: torch.Generator, masked: bool = False
    ) -> tuple[GPT, Lineage]:
        how = self.wanted.how or ("zero" if masked else "duplicate")
        return growth.add_heads(model, target, how, self.wanted.noise, generator)


class WidenEmbd(Arguments):
    """The new width (or times the present one), what becomes of the heads, and how unequal the copies are."""

    n_embd: PositiveInt | None = None
    times: PositiveInt | None = None
    heads: Literal["more", "larger", "keep"] = "more"
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.25


@operation("widen_embd")
class WidenEmbdOperation(GrowthOperation):
    """Widen the residual stream to a multiple: a number, or {n_embd or times, heads, noise}.

    heads: more of the same size (the default), larger (as many, with more features), or keep. The MLPs keep their
    widths (widen_mlp). noise 0 makes all moments exact, but then the copies never drift apart.
    """

    keeps: ClassVar = _COPIES + " (with noise, those of who writes to the stream are near)"
    source: ClassVar = "Chen et al. 2016 (Net2Net, arXiv:1511.05641); Shen et al. 2022 (arXiv:2203.06211)"
    value: PositiveInt | WidenEmbd

    @property
    def wanted(self) -> WidenEmbd:
        return self.value if isinstance(self.value, WidenEmbd) else WidenEmbd(n_embd=self.value)

    def plan(self, settings: Settings) -> Settings:
        config, wanted = settings.model, self.wanted
        n_embd = _size("widen_embd", "n_embd", wanted.n_embd, wanted.times, config.n_embd)
        if n_embd % config.n_embd or n_embd == config.n_embd:
            raise ScheduleError(
                f"widen_embd: n_embd must be a multiple (2 or more) of the present {config.n_embd}, got {n_embd}"
            )
        k = n_embd // config.n_embd
        changes: dict[str, int] = {"n_embd": n_embd}
        if wanted.heads == "more":
            changes.update(n_head=config.n_head * k, n_kv_head=config.n_kv_head * k)
        elif wanted.heads == "larger":
            if config.rotary_dynamic_factor:
                raise ScheduleError(
                    "widen_embd: heads: larger is not for dynamic NTK (rotary_dynamic_factor "
                    f"{config.rotary_dynamic_factor}), whose frequencies follow from the head size; heads: more is"
                )
            changes["head_size"] = config.head_size * k
        return _with_model(settings, **changes)

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return growth.widen_embd(model, target, self.wanted.noise, generator)


# ---------------------------------------------------------------------------------------------- words


class CopyOf(Arguments):
    """A new row is a copy of this id's."""

    copy_: NonNegativeInt = Field(alias="copy")


class Vocabulary(Arguments):
    """The new size, how new rows start, and for a smaller one which id becomes which."""

    size: PositiveInt | None = None
    add: PositiveInt | None = None
    """How many words more, instead of the size."""
    init: Literal["mean", "zero"] | CopyOf = "mean"
    noise: NonNegativeFloat = 0.0
    """Standard deviation of what is added to a new row, as a share of that of the old rows."""
    map: list[NonNegativeInt] | None = None
    """To shrink: the new id of each old id."""


@operation("resize_vocabulary")
class ResizeVocabulary(GrowthOperation):
    """Grow or shrink the vocabulary: {size or add, init: mean | zero | {copy: ID}, noise, map}.

    Old ids keep their meaning and their logits; the loss moves by what the new words take of the softmax, and with
    `over` that is faded in. To shrink, `map` lists the new id of each old one (a new row is that of the first old id
    that maps to it), and the data files are read through it from then on.
    """

    keeps: ClassVar = "the rows, logits and moments of the old ids; with over also the loss at the switch"
    source: ClassVar = "Hewitt 2021 (initialising new word embeddings)"
    fades: ClassVar = True
    touches: ClassVar = ("model", "vocabulary_map")
    value: PositiveInt | Vocabulary

    @field_validator("value", mode="before")
    @classmethod
    def _no_pair(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("must say the new size; [ID, NOISE] is {size: 50304, init: {copy: ID}, noise: NOISE}")
        return value

    @property
    def wanted(self) -> Vocabulary:
        return self.value if isinstance(self.value, Vocabulary) else Vocabulary(size=self.value)

    @property
    def keeps_function(self) -> bool:
        return False

    def plan(self, settings: Settings) -> Settings:
        wanted, old = self.wanted, settings.model.vocab_size
        if (wanted.size is None) == (wanted.add is None):
            raise ScheduleError(
                f"resize_vocabulary: give either size or add, got {'both' if wanted.add else 'neither'}"
            )
        size = wanted.size or old + (wanted.add or 0)
        if size == old:
            raise ScheduleError(f"resize_vocabulary: the vocabulary has {old} already")
        if isinstance(wanted.init, CopyOf) and wanted.init.copy_ >= old:
            raise ScheduleError(f"resize_vocabulary: copy must be an id below {old}, got {wanted.init.copy_}")
        planned = _with_model(settings, vocab_size=size)
        if wanted.map is None:
            if size < old:
                raise ScheduleError(f"resize_vocabulary: from {old} to {size} needs `map`, the new id of each old one")
            return planned
        if size > old:
            raise ScheduleError(
                "resize_vocabulary: `map` is for a smaller vocabulary; old ids keep their place in a larger"
            )
        if len(wanted.map) != old:
            raise ScheduleError(
                f"resize_vocabulary: map needs the new id of each of the {old} old ones, got {len(wanted.map)}"
            )
        if set(wanted.map) != set(range(size)):
            raise ScheduleError(f"resize_vocabulary: map must name every new id from 0 to {size - 1} and no other")
        through = settings.vocabulary_map or tuple(range(old))
        return replace(planned, vocabulary_map=tuple(wanted.map[i] for i in through))

    def reshape(
        self, model: GPT, target: ModelConfig, generator: torch.Generator, masked: bool = False
    ) -> tuple[GPT, Lineage]:
        wanted = self.wanted
        init = ("copy", wanted.init.copy_) if isinstance(wanted.init, CopyOf) else wanted.init
        old_ids = None
        if wanted.map is not None:
            first = {new: old for old, new in reversed(list(enumerate(wanted.map)))}
            old_ids = [first[new] for new in range(target.vocab_size)]
        return growth.resize_vocabulary(model, target, init, wanted.noise, old_ids, generator)


class Restored(Arguments):
    """How the rows of the dropped tokens start apart."""

    noise: NonNegativeFloat = 0.0
    """Standard deviation of what is added to them, as a share of that of the old rows."""
    rare: NonNegativeInt | None = None
    """Of the ids that shared a row the one whose row it was; else the first of them."""


@operation("disable_vocab_remapping")
class DisableVocabRemapping(GrowthOperation):
    """Undo a shrunken vocabulary: read the data's own ids again. Takes no value, or {noise: 0.02, rare: ID}.

    Each id gets the row of the one that stood for it: a token that was kept its own, and each that was dropped the row
    of the rare token, plus noise. So no token changes its meaning, and the loss moves by what the dropped ones take of
    the softmax.
    """

    keeps: ClassVar = "the rows, logits and moments of the tokens that were kept"
    source: ClassVar = "the orchestrator fork of nanoGPT (JinxCodesAI/nano_gpt), which relabelled the kept tokens"
    touches: ClassVar = ("model", "vocabulary_map")
    value: Restored | None = None
    through: tuple[int, ...] = Field(default=(), exclude=True)
    """The map that is undone, once the run has told it."""

    @property
    def keeps_function(self) -> bool:
        return False

    def plan(self, settings: Settings) -> Settings:
        through, size = settings.vocabulary_map, settings.model.vocab_size
        if not through:
            raise ScheduleError("disable_vocab_remapping: the data is read in its own ids already")
        if set(through) != set(range(size)):
            lost = min(set(range(size)) - set(through), default=max(through))
            raise ScheduleError(
                f"disable_vocab_remapping: token {lost} of the model's {size} stands for none of the data's, and would "
                "be lost"
            )
        if self.value and (self.value.rare or 0) >= len(through):
            raise ScheduleError(
                f"disable_vocab_remapping: rare must be an id below {len(through)}, got {self.value.rare}"
            )
        return replace(_with_model(settings, vocab_size=len(through)), vocabulary_map=())

    def resolve(self, machine: Machine) -> Operation:
        return self.model_copy(update={"through": machine.settings.vocabulary_map})

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        through = self.through or (0,) * target.vocab_size  # a plan needs the shapes alone
        rare = self.value.rare if self.value else None
        stays = {} if rare is None else {through[rare]: rare}
        for old, new in enumerate(through):
            stays.setdefault(new, old)
        old_ids = [new if stays[new] == old else -1 for old, new in enumerate(through)]
        noise = self.value.noise if self.value else 0.0
        return growth.resize_vocabulary(model, target, ("copy", through), noise, old_ids, generator)


@operation("untie_head")
class UntieHead(GrowthOperation):
    """Give the output head a matrix of its own, which starts as the embedding is. Takes no value."""

    keeps: ClassVar = "the function; moments of both matrices near (the tied gradient was their sum)"
    touches: ClassVar = ("model", "frozen")

    def plan(self, settings: Settings) -> Settings:
        if not settings.model.tie_weights:
            raise ScheduleError("untie_head: the head is not tied")
        planned = _with_model(settings, tie_weights=False)
        head = ("lm_head",) if "wte" in settings.frozen else ()
        return replace(planned, frozen=settings.frozen + head)

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return growth.untie(model, target, generator)


# ---------------------------------------------------------------------------------------------- length


class Context(Arguments):
    """The new block_size, and what becomes of the positions."""

    block_size: PositiveInt
    how: Literal["extend", "interpolate"] = "extend"
    """Learned positions: new rows, or the table stretched. Rotary: as they are, or divided by the ratio."""
    rotary_base: PositiveFloat | None = None
    """Another base of the rotary frequencies (e.g. for NTK-aware scaling)."""


@operation("extend_context")
class ExtendContext(GrowthOperation):
    """A longer block_size: a number, or {block_size, how: extend | interpolate, rotary_base}.

    extend keeps what short sequences compute; interpolate stretches learned positions or divides rotary ones by the
    ratio, after the scaling of Llama 3 where the model has it, which stays as it is. Training and evaluation use the
    new length from then on.
    """

    keeps: ClassVar = "extend: the function of sequences up to the old length, and all moments"
    source: ClassVar = "Chen et al. 2023 (position interpolation, arXiv:2306.15595)"
    touches: ClassVar = ("model", "sequence_length")
    value: PositiveInt | Context

    @property
    def wanted(self) -> Context:
        return self.value if isinstance(self.value, Context) else Context(block_size=self.value)

    @property
    def keeps_function(self) -> bool:
        return self.wanted.how == "extend" and self.wanted.rotary_base is None

    def plan(self, settings: Settings) -> Settings:
        config, wanted = settings.model, self.wanted
        if wanted.block_size <= config.block_size:
            raise ScheduleError(
                f"extend_context: block_size must be more than the present {config.block_size}, got {wanted.block_size}"
            )
        changes: dict[str, Any] = {"block_size": wanted.block_size}
        if config.position == "rotary":
            if wanted.how == "interpolate":
                changes["rotary_scale"] = config.rotary_scale * wanted.block_size / config.block_size
            if wanted.rotary_base is not None:
                changes["rotary_base"] = wanted.rotary_base
        elif wanted.rotary_base is not None:
            raise ScheduleError("extend_context: rotary_base is given and the positions are learned")
        return _with_model(settings, **changes)

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return growth.extend_context(model, target, self.wanted.how, generator)


class Share(Arguments):
    """A part of block_size."""

    share: Annotated[float, Field(gt=0, le=1)]


@operation("set_sequence_length")
class SetSequenceLength(Operation):
    """Train on sequences of this many tokens, a divisor of block_size, or {share: 0.25} of it.

    Evaluation keeps the full length. The windows of the data are cut into pieces, so the stream's tokens keep their
    order.
    """

    touches: ClassVar = ("sequence_length",)
    source: ClassVar = "Li et al. 2022 (sequence length warmup, arXiv:2108.06084)"
    value: PositiveInt | Share

    def plan(self, settings: Settings) -> Settings:
        block_size = settings.model.block_size
        length = self.value if isinstance(self.value, int) else max(1, round(self.value.share * block_size))
        if length > block_size:
            raise ScheduleError(f"set_sequence_length: at most block_size {block_size}, got {length}")
        return replace(settings, sequence_length=length)
