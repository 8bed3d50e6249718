"""What a task is: a name, and a function from a model in training to numbers that tell how well it does.

A task is one subclass of `Task` under `@task(NAME)`, in a file of this room that `__init__.py` imports. Its metrics
then stand in metrics.jsonl, and triggers, guards and early stopping may name them. A score leaves the run as it is: no
weight, no random number and no place in the data changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from orchestrate.data.stream import Meta
from orchestrate.training.run.run import Run
from orchestrate.training.settings.metrics import of_task
from orchestrate.training.settings.values import registered


class Task(ABC):
    """Something to do with a model at evaluations.

    Args:
        source: what it reads, as eval_tasks gives it: a folder under data/, or a path. Raises ValueError.
    """

    name: str

    @abstractmethod
    def __init__(self, source: str) -> None: ...

    @property
    @abstractmethod
    def metrics(self) -> Sequence[str]:
        """The names of what `score` measures; larger is better in each."""

    @abstractmethod
    def check(self, meta: Meta, block_size: int) -> str:
        """Why models of this block_size and of these tokens cannot do it, or nothing."""

    @abstractmethod
    def score(self, run: Run, poll: Callable[[], int]) -> dict[str, float] | None:
        """Metric -> value, the same on every rank; None where `poll` said stop. Collective: the ranks share the work.

        `poll` is asked equally often on every rank. With sharded weights all ranks call the model equally often.
        """

    def metric(self, what: str) -> str:
        """The name of one of its metrics."""
        return of_task(f"{self.name}_{what}")


TASKS: dict[str, type[Task]] = {}


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: make a task known to eval_tasks. Raises ValueError for a name that is taken."""
    return registered(TASKS, name, "name", "a task")
