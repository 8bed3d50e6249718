"""When an entry fires: each trigger is one small pure class, `fires(elapsed, measured) -> reason | None`.

A trigger sees only numbers that are the same on every rank, but for the clock, which rank 0 reads; so what rank 0
decides every other rank could have decided too. A trigger is one class under `@trigger`: the schedule's field, its
validation and the documentation follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from orchestrate.training.settings.metrics import VAL_LOSS, MetricName, falling, spoken, told
from orchestrate.training.settings.records import Elapsed, Measured
from orchestrate.training.settings.values import (
    Finite,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    nearest,
    problems_of,
    registered,
    shown,
)


class Trigger(BaseModel):
    """A condition of an entry; any one that holds fires it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    field: ClassVar[str]
    reads_clock: ClassVar[bool] = False
    value: Any

    @property
    def looks_at(self) -> Mapping[str, int]:
        """The metrics that it looks at, and how many of the latest values it compares with those before (0: none)."""
        return {}

    def __str__(self) -> str:
        """The condition in a few words, for a table."""
        return f"{self.field} {_brief(self.value)}"

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        """The reason for firing now, or None."""
        raise NotImplementedError

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        """How far it is from holding, for a person; nothing where that cannot be said."""
        return ""

    def at_latest(self, since: Moment, now: Moment) -> float:
        """The iteration by which it holds whatever is measured, for a plan made ahead; infinity where none is known.

        Args:
            since: from when waits count.
            now: how far the plan has come, and at which pace.
        """
        return math.inf


@dataclass(frozen=True)
class Moment:
    """A moment of a plan."""

    iter: float
    tokens: float
    tokens_per_iter: int

    def iter_at(self, tokens: float) -> float:
        """The iteration at which so many tokens will have been seen."""
        if math.isinf(tokens) or math.isinf(self.tokens):
            return math.inf
        return self.iter + math.ceil((tokens - self.tokens) / self.tokens_per_iter)

    def at(self, iteration: float) -> Moment:
        """An iteration at this pace."""
        return replace(self, iter=iteration, tokens=self.tokens + (iteration - self.iter) * self.tokens_per_iter)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Plateau(BaseModel):
    """`evals` values in a row without a gain of `min_delta` on the lowest before them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    evals: PositiveInt = 5
    min_delta: NonNegativeFloat = 0.01


def _at_or_below(metric: str, limit: float, measured: Measured) -> str | None:
    value = measured.now.get(metric)
    if value is None or not value <= limit:
        return None
    return f"{spoken(metric)} {told(metric, value)} <= {limit:g}"


def _at_or_above(metric: str, limit: float, measured: Measured) -> str | None:
    value = measured.now.get(metric)
    if value is None or not value >= limit:
        return None
    return f"{spoken(metric)} {told(metric, value)} >= {limit:g}"


def _distance(metric: str, limit: float, measured: Measured) -> str:
    value = measured.latest.get(metric)
    if value is None:
        return f"{spoken(metric)} is not measured yet"
    return f"{spoken(metric)} {told(metric, value)}, {told(metric, abs(value - limit))} from {limit:g}"


def _without_gain(metric: str, plateau: Plateau, measured: Measured) -> str:
    values = [falling(metric, value) for value in measured.history.get(metric, ())]
    counts = (n for n in range(min(plateau.evals, len(values) - 1), 0, -1))
    without = next((n for n in counts if min(values[-n:]) > min(values[:-n]) - plateau.min_delta), 0)
    return f"{without} of {plateau.evals} values of {spoken(metric)} without a gain of {plateau.min_delta:g}"


def _no_gain(metric: str, plateau: Plateau, measured: Measured) -> str | None:
    evals, history = plateau.evals, measured.history.get(metric, ())
    if metric not in measured.now or len(history) <= evals:
        return None
    values = [falling(metric, value) for value in history]
    before, recent = min(values[:-evals]), min(values[-evals:])
    if recent > before - plateau.min_delta:
        recent, before = falling(metric, recent), falling(metric, before)
        what, counted = ("plateau", "evaluations") if metric == VAL_LOSS else (f"plateau of {metric}", "values")
        margin = f"min_delta {plateau.min_delta:g}"
        return f"{what}: {told(metric, recent)} in {evals} {counted}, {told(metric, before)} before ({margin})"
    return None


TRIGGERS: dict[str, type[Trigger]] = {}


def trigger(field: str) -> Callable[[type[Trigger]], type[Trigger]]:
    """Class decorator: make the trigger a field of a schedule's entries. Raises ValueError for a name that is taken."""
    return registered(TRIGGERS, field, "field", "a trigger")


@trigger("trigger_loss")
class TriggerLoss(Trigger):
    """The validation loss is at or below this."""

    value: Finite

    @property
    def looks_at(self) -> Mapping[str, int]:
        return {VAL_LOSS: 0}

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        return _at_or_below(VAL_LOSS, self.value, measured)

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return _distance(VAL_LOSS, self.value, measured)


@trigger("max_wait_iters")
class MaxWaitIters(Trigger):
    """So many iterations have passed since the previous entry fired, or since the start."""

    value: NonNegativeInt

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        if elapsed.iters_waited >= self.value:
            return f"waited {elapsed.iters_waited} iterations (max_wait_iters {self.value})"
        return None

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return f"waited {elapsed.iters_waited:,} of {self.value:,} iterations"

    def at_latest(self, since: Moment, now: Moment) -> float:
        return since.iter + self.value


@trigger("max_wait_tokens")
class MaxWaitTokens(Trigger):
    """So many training tokens have passed since the previous entry fired, or since the start."""

    value: NonNegativeInt

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        if elapsed.tokens_waited >= self.value:
            return f"waited {elapsed.tokens_waited} tokens (max_wait_tokens {self.value})"
        return None

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return f"waited {elapsed.tokens_waited:,} of {self.value:,} tokens"

    def at_latest(self, since: Moment, now: Moment) -> float:
        return now.iter_at(since.tokens + self.value)


@trigger("max_wait_seconds")
class MaxWaitSeconds(Trigger):
    """So many seconds of running have passed since the previous entry fired; looked at every log_interval."""

    reads_clock: ClassVar[bool] = True
    value: NonNegativeFloat

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        if elapsed.seconds_waited is not None and elapsed.seconds_waited >= self.value:
            return f"waited {elapsed.seconds_waited:.1f} s (max_wait_seconds {self.value:g})"
        return None

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return f"waited {elapsed.seconds_waited or 0.0:,.0f} of {self.value:,.0f} s"


@trigger("at_iter")
class AtIter(Trigger):
    """The run has done this many iterations."""

    value: NonNegativeInt

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        return f"iteration {elapsed.iter} (at_iter {self.value})" if elapsed.iter >= self.value else None

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return f"iteration {elapsed.iter:,} of {self.value:,}"

    def at_latest(self, since: Moment, now: Moment) -> float:
        return self.value


@trigger("at_tokens")
class AtTokens(Trigger):
    """The run has seen this many training tokens."""

    value: NonNegativeInt

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        return f"{elapsed.tokens} tokens (at_tokens {self.value})" if elapsed.tokens >= self.value else None

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return f"{elapsed.tokens:,} of {self.value:,} tokens"

    def at_latest(self, since: Moment, now: Moment) -> float:
        return now.iter_at(self.value)


@trigger("trigger_plateau")
class TriggerPlateau(Trigger):
    """The validation loss has stopped falling: {evals: 5, min_delta: 0.01}. Counted since the previous entry fired."""

    value: Plateau

    @property
    def looks_at(self) -> Mapping[str, int]:
        return {VAL_LOSS: self.value.evals}

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        return _no_gain(VAL_LOSS, self.value, measured)

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return _without_gain(VAL_LOSS, self.value, measured)


class OnMetric(BaseModel):
    """A metric, and the one condition on it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    metric: MetricName
    below: Finite | None = None
    above: Finite | None = None
    plateau: Plateau | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> OnMetric:
        if [self.below, self.above, self.plateau].count(None) != 2:
            raise ValueError("must have one of below, above and plateau beside metric")
        return self


@trigger("trigger")
class TriggerMetric(Trigger):
    """A metric has come to a number or below (above) it, or has stopped falling.

    For example {metric: grad_norm, below: 0.1}, {metric: tokens_per_second, above: 1e5} or
    {metric: loss, plateau: {evals: 20, min_delta: 0.01}}. It is looked at whenever the metric has a new value. A
    plateau counts the values since the previous entry fired.
    """

    value: OnMetric

    @property
    def looks_at(self) -> Mapping[str, int]:
        return {self.value.metric: self.value.plateau.evals if self.value.plateau else 0}

    def __str__(self) -> str:
        (condition,) = self.value.model_dump(exclude_none=True, exclude={"metric"})
        return f"{self.value.metric} {condition} {_brief(getattr(self.value, condition))}"

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        value = self.value
        if value.below is not None:
            return _at_or_below(value.metric, value.below, measured)
        if value.above is not None:
            return _at_or_above(value.metric, value.above, measured)
        assert value.plateau
        return _no_gain(value.metric, value.plateau, measured)

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        value = self.value
        if value.plateau is not None:
            return _without_gain(value.metric, value.plateau, measured)
        return _distance(value.metric, value.above if value.below is None else value.below, measured)


def _one_of_all(given: Any) -> Any:
    """A trigger from its mapping {field: value}. Raises ValueError."""
    if isinstance(given, Trigger):
        return given
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError("must be a mapping of one trigger, such as {max_wait_iters: 100}")
    ((name, value),) = given.items()
    known = [field for field in TRIGGERS if field != "all_of"]
    if name not in known:
        raise ValueError(f"must be a trigger, and {shown(name)} is none{nearest(str(name), known)}")
    try:
        return TRIGGERS[name](value=value)
    except ValidationError as error:
        told = [(location[1:], text) for location, text in problems_of(error, TRIGGERS[name])]
        # What was given is told with the whole.
        texts = (
            f"{'.'.join([name, *map(str, location)])} {text.rpartition(', got ')[0] or text}" for location, text in told
        )
        raise ValueError("; ".join(texts)) from None


@trigger("all_of")
class AllOf(Trigger):
    """All of these triggers hold together: [{max_wait_iters: 1000}, {trigger_loss: 2.0}].

    Of a metric the latest value since waits began counts, so conditions on numbers that come at different iterations
    can hold together, and waits are exact to the iteration.
    """

    value: Annotated[
        tuple[Annotated[Trigger, BeforeValidator(_one_of_all), WithJsonSchema({"type": "object"})], ...],
        Field(strict=False, min_length=1),
    ]

    @property
    def reads_clock(self) -> bool:  # type: ignore[override]
        return any(one.reads_clock for one in self.value)

    @property
    def looks_at(self) -> Mapping[str, int]:
        return together(self.value)

    def __str__(self) -> str:
        return "(" + " and ".join(map(str, self.value)) + ")"

    def fires(self, elapsed: Elapsed, measured: Measured) -> str | None:
        known = replace(measured, now={**measured.latest, **measured.now})
        reasons = [one.fires(elapsed, known) for one in self.value]
        return None if None in reasons else " and ".join(map(str, reasons))

    def near(self, elapsed: Elapsed, measured: Measured) -> str:
        return " and ".join(one.near(elapsed, measured) or str(one) for one in self.value)

    def at_latest(self, since: Moment, now: Moment) -> float:
        return max(one.at_latest(since, now) for one in self.value)


def together(triggers: Iterable[Trigger]) -> dict[str, int]:
    """The metrics that several triggers look at, with the largest number that one of them compares."""
    found: dict[str, int] = {}
    for one in triggers:
        for name, compared in one.looks_at.items():
            found[name] = max(compared, found.get(name, 0))
    return found
