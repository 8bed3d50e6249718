"""What an operation is: `plan(settings) -> settings`, pure, and for a change of shape also `reshape`.

An operation never touches an optimizer, DDP, a loader or a file: `Run.adopt` does that for all of them. What a new
hyperparameter operation needs is one class like those in hyperparameters.py and one example row in
tests/operation_examples.py; help, validation, plan, resume and the contract tests follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import Lineage
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import closest, problems_of, registered, shown


class Peers(Protocol):
    """The processes of a run, as far as a decision needs them."""

    @property
    def world_size(self) -> int: ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""


class Machine(Protocol):
    """What an operation may ask of the live run before it plans."""

    @property
    def settings(self) -> Settings: ...

    @property
    def ranks(self) -> Peers: ...

    def largest_batch(self, target: float, candidates: Sequence[int]) -> int:
        """The largest candidate (ascending micro-batch sizes) that trains within a share of memory on every rank.

        Raises ValueError where none does.
        """


class Operation(BaseModel):
    """A change of settings that a schedule can ask for. Subclasses declare `value` (its argument) and `plan`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    """Its name in a schedule."""
    touches: ClassVar[tuple[str, ...]] = ()
    """The fields of Settings, by dotted name, that `plan` may change."""
    ramps: ClassVar[bool] = False
    """Whether `over: N` may move the touched numbers gradually."""
    keeps: ClassVar[str] = "the function; every parameter and its moments"
    """What stays as it was, for docs/operations.md."""
    source: ClassVar[str] = ""
    """The paper or project that a method comes from."""
    fades: ClassVar[bool] = False
    """Whether `over: N` may fade what is new in from zero (masked growth)."""
    renumbers: ClassVar[bool] = False
    """Whether layers change their number or size: such an entry waits until nothing is fading in."""
    decided_on_machine: ClassVar[bool] = False
    """Whether only `resolve` can tell what it does: a plan made ahead shows the settings unchanged."""

    @property
    def keeps_function(self) -> bool:
        """Whether the model computes the same function right after: up to rounding, of which a Cast tells."""
        return True

    def plan(self, settings: Settings) -> Settings:
        """The settings after this operation. Pure. Raises ScheduleError where it cannot be applied."""
        raise NotImplementedError

    def fade(self, before: Settings, after: Settings) -> Settings:
        """`after` with what is new in it masked, for an entry with `over`. Raises ScheduleError where it cannot be."""
        raise NotImplementedError(f"{self.name} has nothing to fade in")

    def resolve(self, machine: Machine) -> Operation:
        """The operation with everything settled that only the live machine can tell (e.g. free memory).

        Called on every rank at once, right before `plan`; must return equal operations on all ranks and leave the
        run as it found it.
        """
        return self

    def reshape(self, model: GPT, target: ModelConfig, generator: torch.Generator) -> tuple[GPT, Lineage]:
        """A new model of the target's shape and where each of its parameters came from; `model` is left unchanged.

        Only structural operations have one. `generator` is seeded alike on every rank: fresh values come from it.
        One that `fades` also takes `masked`: whether nothing of what is new shows at first.
        """
        raise NotImplementedError(f"{self.name} does not change the model's shape")


OPERATIONS: dict[str, type[Operation]] = {}


def operation(name: str) -> Callable[[type[Operation]], type[Operation]]:
    """Class decorator: make the operation available to schedules. Raises ValueError for a name that is taken."""
    return registered(OPERATIONS, name, "name", "an operation")


_ALL_BUT_EMBEDDINGS = (
    "write freeze_layer: [block.*, ln_f], which trains the embeddings alone, as it does there; "
    "freeze_layer: [wte, wpe] freezes them"
)
_ABSOLUTE = "write {}, which takes the new number itself"
# Names that people and other orchestrators use -> what to write instead.
OTHER_NAMES = {
    **{name: "did you mean set_lr?" for name in ("set_learning_rate", "learning_rate", "lr", "set_rate")},
    **{name: "did you mean change_lr?" for name in ("change_learning_rate", "scale_lr", "decrease_lr")},
    **{name: "did you mean set_grad_accum?" for name in ("gradient_accumulation_steps", "set_accumulation",
                                                         "set_gradient_accumulation_steps")},
    **{name: "did you mean stack_layers?" for name in ("add_layers", "grow_layers", "set_n_layer")},
    **{name: "did you mean widen_mlp?" for name in ("set_n_hidden", "grow_mlp")},
    **{name: "did you mean set_layer_lora_rank?" for name in ("set_lora_rank", "add_lora")},
    **{name: "did you mean freeze_layer?" for name in ("freeze", "freeze_layers")},
    **{name: "did you mean unfreeze_layer?" for name in ("unfreeze", "unfreeze_layers")},
    "set_wd": "did you mean set_weight_decay?",
    "merge_lora": "did you mean merge_lora_weights?",
    "set_block_size": "did you mean extend_context (a longer one) or set_sequence_length (a shorter one)?",
    "set_embedding_freeze_mode": _ALL_BUT_EMBEDDINGS,
    "set_embedding_finetune_mode": _ALL_BUT_EMBEDDINGS,
    **{name: "did you mean set_data_mixture?" for name in ("set_mixture", "set_data_weights", "set_datasets")},
    **{f"change_{what}": _ABSOLUTE.format(f"set_{what}")
       for what in ("warmup_iters", "eval_iters", "eval_interval", "lora_alpha")},
    "decrease_attn_lora_scaling": _ABSOLUTE.format("set_attn_lora_rank"),
    "decrease_vocab_lora_scaling": _ABSOLUTE.format("set_embedding_lora_rank"),
}  # fmt: skip


def make(name: Any, arguments: dict[str, Any]) -> Operation:
    """The operation of this name with these arguments ({"value": ...} or {}). Raises ScheduleError."""
    if not isinstance(name, str) or name not in OPERATIONS:
        close = closest(str(name), [*OPERATIONS, *OTHER_NAMES], cutoff=0.7)
        hint = f"did you mean {close}?" if close else f"known: {', '.join(sorted(OPERATIONS))}"
        hint = OTHER_NAMES.get(close, hint)
        raise ScheduleError(f"unknown operation {shown(name)}; {hint}")
    cls = OPERATIONS[name]
    if "value" not in cls.model_fields and arguments.get("value") is not None:
        raise ScheduleError(f"{name} takes no value, got {shown(arguments['value'])}")
    if "value" not in cls.model_fields:
        arguments = {}
    try:
        return cls(**arguments)
    except ValidationError as error:
        problems = problems_of(error, cls)
        raise ScheduleError(
            [f"{name}: {'.'.join(map(str, location)) or 'value'} {message}" for location, message in problems]
        ) from None
