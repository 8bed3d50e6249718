"""Operations on the run's rhythm: how often it evaluates and logs, a checkpoint now, the end now."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from orchestrate.training.operations.base import Operation, operation
from orchestrate.training.settings.records import Settings
from orchestrate.training.settings.values import NonNegativeInt, PositiveInt


@operation("set_eval_interval")
class SetEvalInterval(Operation):
    """Set the iterations between evaluations; tokens between them (eval_interval_tokens) count no more."""

    touches: ClassVar = ("eval_interval", "eval_interval_tokens")
    value: PositiveInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, eval_interval=self.value, eval_interval_tokens=0)


@operation("set_eval_interval_tokens")
class SetEvalIntervalTokens(Operation):
    """Set the tokens between evaluations: one at the first boundary at or after each multiple. 0: eval_interval."""

    touches: ClassVar = ("eval_interval_tokens",)
    value: NonNegativeInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, eval_interval_tokens=self.value)


@operation("set_eval_iters")
class SetEvalIters(Operation):
    """Set the batches of one evaluation; more of them extend the same fixed windows."""

    touches: ClassVar = ("eval_iters",)
    value: PositiveInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, eval_iters=self.value)


@operation("set_eval_tasks")
class SetEvalTasks(Operation):
    """Set the tasks that evaluations score, each NAME or NAME:FOLDER as eval_tasks has them; []: none."""

    touches: ClassVar = ("eval_tasks",)
    value: list[str]

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, eval_tasks=tuple(self.value))


@operation("set_log_interval")
class SetLogInterval(Operation):
    """Set the iterations between lines of metrics."""

    touches: ClassVar = ("log_interval",)
    value: PositiveInt

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, log_interval=self.value)


@operation("save_checkpoint")
class SaveCheckpoint(Operation):
    """Save a checkpoint at this boundary. Takes no value."""

    touches: ClassVar = ("checkpoints_asked",)

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, checkpoints_asked=settings.checkpoints_asked + 1)


@operation("stop")
class Stop(Operation):
    """End the run here, after a last evaluation and a checkpoint. Takes no value."""

    touches: ClassVar = ("stops_asked",)

    def plan(self, settings: Settings) -> Settings:
        return replace(settings, stops_asked=settings.stops_asked + 1)
