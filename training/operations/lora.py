"""Operations on LoRA adapters (Hu et al. 2021, arXiv:2106.09685). Every change of a rank keeps the function.

An adapted layer's base weight is frozen while it is adapted (PEFT's convention); rank 0 merges the adapter into the
base, which trains again. Growing pads with zeros; shrinking keeps the strongest directions in the factors and folds
the rest into the base weight. Of a layer with adapters on single projections (attn.3.q) only those train.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Strict, field_validator

from orchestrate.model.config import PROJECTIONS, LoraSpec, ModelConfig, layer_of_adapter
from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import Lineage
from orchestrate.model.lora import reshape_lora, restart_adapters
from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.operations.layers import LayerNames, adapters, layers
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import NonNegativeInt, PositiveFloat


def adaptable(name: str) -> bool:
    """Whether a leaf layer or projection can carry an adapter: attention, MLP, token embedding, output head."""
    return name.split(".")[0] in (*PROJECTIONS, "wte", "lm_head")


def _on(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """The adapters that there are on these leaf layers, on projections of them too, and on these projections."""
    named = set(names)
    return [name for name in config.lora if name in named or layer_of_adapter(name) in named]


def with_rank(settings: Settings, names: Iterable[str], rank: int) -> Settings:
    """Settings with this rank on these leaf layers or projections. Raises ScheduleError.

    New adapters get the alpha, the scaling and the start in force. Rank 0 of a layer is that of its projections too.
    """
    present = dict(settings.model.lora)
    new = LoraSpec(rank, settings.lora_alpha, settings.use_rslora, settings.init_lora_weights)
    names = list(names)
    for name in names:
        if not adaptable(name):
            raise ScheduleError(f"{name} cannot carry a LoRA adapter; attn.N, mlp.N, wte and lm_head can")
        if rank:
            present[name] = replace(present.get(name, new), rank=rank)
    for name in _on(settings.model, names) if rank == 0 else ():
        del present[name]
    try:
        return replace(settings, model=replace(settings.model, lora=present))
    except ValueError as error:
        raise ScheduleError(str(error)) from None


class LoraOperation(Operation):
    """What the operations on adapters share: the reshape follows from the target's ranks and alphas alone."""

    touches: ClassVar = ("model.lora",)
    keeps: ClassVar = "the function; moments of all that is not cut (a smaller rank mixes directions and starts anew)"
    source: ClassVar = "Hu et al. 2021 (LoRA, arXiv:2106.09685)"

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return reshape_lora(model, target, generator)


@operation("set_layer_lora_rank")
class SetLayerLoraRank(LoraOperation):
    """Set the LoRA rank of the named layers: [names, rank], e.g. ["attn.2", 16] or [["attn.*", "mlp.0"], 8].

    A projection is named by itself: attn.2.q, k, v, o, mlp.2.up, gate, down, or globs such as attn.*.q, or as peft's
    target_modules has it: q_proj, all-linear. attn.2 is all matrices of its layer, and attn.2.qkv the one of q, k, v.
    Of a layer with adapters on projections only the adapters train.
    """

    value: Annotated[tuple[LayerNames, NonNegativeInt], Strict(False)]

    @field_validator("value", mode="before")
    @classmethod
    def _names_first(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], int):
            raise ValueError('must be [names, rank] in this order, e.g. ["attn.2", 16]')
        return value

    def plan(self, settings: Settings) -> Settings:
        return with_rank(settings, adapters(settings.model, self.value[0]), self.value[1])


@operation("set_attn_lora_rank")
class SetAttentionLoraRank(LoraOperation):
    """Set the LoRA rank of every attention layer."""

    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return with_rank(settings, layers(settings.model, "attn.*"), self.value)


@operation("set_embedding_lora_rank")
class SetEmbeddingLoraRank(LoraOperation):
    """Set the LoRA rank of the token embedding, which a tied output head shares."""

    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return with_rank(settings, ["wte"], self.value)


@operation("set_lora_alpha")
class SetLoraAlpha(LoraOperation):
    """Set alpha of all adapters, present and to come; the factors are rescaled so that the function stays.

    What changes is how far an update of the factors moves the layer: by the ratio of the alphas.
    """

    touches: ClassVar = ("model.lora", "lora_alpha")
    value: PositiveFloat

    def plan(self, settings: Settings) -> Settings:
        lora = {name: replace(spec, alpha=self.value) for name, spec in settings.model.lora.items()}
        return replace(settings, lora_alpha=self.value, model=replace(settings.model, lora=lora))


@operation("merge_lora_weights")
class MergeLoraWeights(LoraOperation):
    """Merge adapters into their base weights and remove them; without a value all, else those of the named layers or
    projections."""

    value: LayerNames | None = None

    def plan(self, settings: Settings) -> Settings:
        adapted = settings.model.lora
        names = _on(settings.model, adapted if self.value is None else adapters(settings.model, self.value))
        if not names:
            raise ScheduleError(
                f"merge_lora_weights: no adapter on {self.value or 'any layer'}; "
                f"adapted: {', '.join(adapted) or 'none'} (merging removes adapters; relora merges and keeps them)"
            )
        return with_rank(settings, names, 0)


class Relora(BaseModel):
    """Which adapters start anew (of leaf layers or projections), and how the learning rate recovers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    layers: LayerNames | None = None
    """All adapted ones by default."""
    warmup_iters: NonNegativeInt = 50


@operation("relora")
class ReloraOperation(LoraOperation):
    """Merge the adapters, start their factors and moments anew, and rewarm the rate: {layers, warmup_iters}.

    Repeated, a sum of low ranks becomes a high one. Without a value all adapters, with 50 iterations of rewarming.
    """

    keeps: ClassVar = "the function; moments of everything but the factors"
    source: ClassVar = "Lialin et al. 2023 (ReLoRA, arXiv:2307.05695)"
    touches: ClassVar = ("reshapes_asked", "rewarm_iters", "rewarms")
    value: Relora | None = None

    def names(self, config: ModelConfig) -> list[str]:
        """The adapters that start anew."""
        wanted = (self.value or Relora()).layers
        return _on(config, config.lora if wanted is None else adapters(config, wanted))

    def plan(self, settings: Settings) -> Settings:
        if not self.names(settings.model):
            raise ScheduleError(f"relora: no adapter to restart; adapted: {', '.join(settings.model.lora) or 'none'}")
        return replace(
            settings,
            reshapes_asked=settings.reshapes_asked + 1,
            rewarm_iters=(self.value or Relora()).warmup_iters,
            rewarms=settings.rewarms + 1,
        )

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        return restart_adapters(model, self.names(model.config), generator)
