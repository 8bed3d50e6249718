"""What an operation is: `plan(settings) -> settings`, pure, and for a change of shape also `reshape`.

An operation never touches an optimizer, DDP, a loader or a file: `Run.adopt` does that for all of them. What a new
hyperparameter operation needs is one class like those in hyperparameters.py and one example row in
tests/operation_examples.py; help, validation, plan, resume and the contract tests follow from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrate.model.config import ModelConfig
from orchestrate.model.gpt import GPT
from orchestrate.model.lineage import Lineage
from orchestrate.training.settings.errors import ScheduleError
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import problems_of, shown

if TYPE_CHECKING:
    from orchestrate.training.run.run import Run


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

    @property
    def keeps_function(self) -> bool:
        """Whether the model computes the same function right after (up to float rounding)."""
        return True

    def plan(self, settings: Settings) -> Settings:
        """The settings after this operation. Pure. Raises ScheduleError where it cannot be applied."""
        raise NotImplementedError

    def fade(self, before: Settings, after: Settings) -> Settings:
        """`after` with what is new in it masked, for an entry with `over`. Raises ScheduleError where it cannot be."""
        raise NotImplementedError(f"{self.name} has nothing to fade in")

    def resolve(self, run: Run) -> Operation:
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

    def register(cls: type[Operation]) -> type[Operation]:
        if name in OPERATIONS:
            raise ValueError(f"there is an operation {name} already")
        cls.name = name
        OPERATIONS[name] = cls
        return cls

    return register


def make(name: Any, arguments: dict[str, Any]) -> Operation:
    """The operation of this name with these arguments ({"value": ...} or {}). Raises ScheduleError."""
    if not isinstance(name, str) or name not in OPERATIONS:
        close = difflib.get_close_matches(str(name), OPERATIONS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(OPERATIONS))}"
        raise ScheduleError(f"unknown operation {shown(name)}{hint}")
    cls = OPERATIONS[name]
    if "value" not in cls.model_fields and arguments.get("value") is not None:
        raise ScheduleError(f"{name} takes no value, got {shown(arguments['value'])}")
    if "value" not in cls.model_fields:
        arguments = {}
    try:
        return cls(**arguments)
    except ValidationError as error:
        raise ScheduleError(
            [f"{name}: {'.'.join(map(str, location)) or 'value'} {message}" for location, message in problems_of(error)]
        ) from None
