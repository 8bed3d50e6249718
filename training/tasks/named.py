"""The tasks that eval_tasks names: those of this project, and those of lm-eval, scored by a model while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from orchestrate.data.keeping import spoken
from orchestrate.data.stream import Meta
from orchestrate.training.run.run import Run
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import of_task
from orchestrate.training.settings.values import nearest, shown
from orchestrate.training.tasks.adapter import Adapter, Interrupted, NotFinite
from orchestrate.training.tasks.base import TASKS, Task
from orchestrate.training.tasks.harness import Loaded

_loaded = lru_cache(maxsize=64)(Loaded)


class HarnessTask(Task):
    """A task of lm-eval.

    `eval/NAME` is its first metric of which more is better, `eval/NAME/METRIC` each of them, and `eval/NAME/stderr` the
    first one's standard error where there is one.
    """

    def __init__(self, name: str, source: str) -> None:
        if source and not Path(source).is_dir():
            raise ValueError(f"{source}: there is no such folder of local data sets")
        self.name = name
        self.loaded = _loaded(name, Path(source) if source else None)
        if not self.loaded.metrics:
            raise ValueError("it has no metric of which more is better")

    @property
    def metrics(self) -> Sequence[str]:
        return [self._called(), *(self._called(metric) for metric in self.loaded.metrics), self._called("stderr")]

    def _called(self, metric: str = "") -> str:
        return of_task(f"{self.name}/{metric.replace(',', '_')}" if metric else self.name)

    def check(self, meta: Meta, block_size: int) -> str:
        return self.loaded.check(block_size)

    def score(self, run: Run, poll: Callable[[], int]) -> dict[str, float] | None:
        adapter = Adapter(
            run.model,
            spoken(run.batches.opened.speaks, run.settings.vocabulary_map),
            run.eval_batch_size,
            run.ranks,
            run.autocast,
            poll,
        )
        try:
            with run.stopwatch.part("eval"):
                result = self.loaded.score(adapter, run.config.eval_tasks_limit or None)
        except Interrupted:
            return None
        except NotFinite:  # what becomes of such a run is decided elsewhere
            return {}
        # A metric may have no value, as a correlation where all answers are alike.
        given = {metric: result.scores[metric] for metric in self.loaded.metrics if metric in result.scores}
        found = {self._called(metric): value for metric, (value, _) in given.items()}
        first, error = given.get(self.loaded.metrics[0], (None, None))
        found |= {self._called(): first} if first is not None else {}
        return found if error is None else {**found, self._called("stderr"): error}


def make(given: Sequence[str], place: str = "eval_tasks") -> tuple[Task, ...]:
    """The tasks that a list names, NAME or NAME:FOLDER. Raises Refused.

    Args:
        place: where it stands, for messages.
    """
    found: dict[str, Task] = {}
    problems = []
    for text in given:
        name, _, source = text.partition(":")
        if name in found:
            problems.append(f"{place}: {name} is there twice")
            continue
        try:
            found[name] = TASKS[name](source or name) if name in TASKS else HarnessTask(name, source)
        except Refused as error:
            unknown = f"there is no task {shown(name)}"
            told = f"{unknown}{nearest(name, TASKS)}; there are {', '.join(TASKS)}, and those of lm-eval"
            problems += [f"{place}: {told if text.startswith(unknown) else text}" for text in error.problems]
        except ValueError as error:
            problems.append(f"{place}: {name}: {error}")
    if problems:
        raise Refused(problems)
    return tuple(found.values())
