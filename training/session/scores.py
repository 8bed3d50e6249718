"""Task scores and analyses at evaluations: when they are made, and metrics that are refused as nothing gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrate.data.stream import Meta
from orchestrate.training.run.run import Run
from orchestrate.training.schedule.stages import Stage
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import ANALYSED, is_of_task
from orchestrate.training.settings.records import Progress
from orchestrate.training.settings.values import nearest
from orchestrate.training.tasks import Task, make


def check_tasks(config: TrainConfig, meta: Meta, stages: Sequence[Stage]) -> None:
    """Raises Refused where a task cannot be done, or where a number is asked for that no task or analysis gives.

    Args:
        meta: what the tokens of the training data are.
    """
    known: list[str] = []
    problems: list[str] = []
    lists = {stage.settings.eval_tasks: stage for stage in reversed(stages)}
    for given, stage in reversed(lists.items()):
        place = "eval_tasks" if stage.entry is None else f"entry {stage.entry.number}: {stage.entry}"
        tasks = make(given, place)
        block_size = min(stage.settings.model.block_size for stage in stages if stage.settings.eval_tasks == given)
        problems += [f"{place}: {task.name}: {why}" for task in tasks if (why := task.check(meta, block_size))]
        known += [name for task in tasks for name in task.metrics if name not in known]
    asked = [
        (f"entry {s.entry.number}: {s.entry}", name) for s in stages if s.entry for name in sorted(s.entry.metrics)
    ]
    if config.early_stopping_patience:
        asked.append(("early_stopping_metric", config.early_stopping_metric))
    there = ", ".join(known) or "none, as eval_tasks is empty"
    problems += [
        f"{place}: {name} is given by no task{nearest(name, known)}; there are {there}"
        for place, name in asked
        if is_of_task(name) and name not in known
    ]
    if not config.analyze_interval:
        problems += [f"{place}: {name} comes with analyses, and analyze_interval is 0"
                     for place, name in asked if name in ANALYSED]  # fmt: skip
    if problems:
        raise Refused(problems)


def falls_due(every: int, p: Progress, ends: bool) -> bool:
    """Whether an evaluation is the first in an interval of so many iterations, or the one at the end.

    Progress knows the evaluation before it.
    """
    return ends or p.iter // every != p.last_eval_iter // every


def scores(run: Run, tasks: Sequence[Task], ends: bool, poll: Callable[[], int]) -> dict[str, float] | None:
    """Metric -> value of the tasks that are due at an evaluation, {} where none is; None where `poll` said stop.

    Args:
        ends: whether this is the evaluation at the end of the run, or the only one.
    """
    every = run.config.eval_tasks_interval
    found: dict[str, float] = {}
    if every and not falls_due(every, run.progress, ends):
        return found
    for task in tasks:
        score = task.score(run, poll)
        if score is None:
            return None
        found |= score
    return found
