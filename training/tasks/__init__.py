"""All tasks that eval_tasks can name. Importing this package registers them."""

from orchestrate.training.tasks import exact_match
from orchestrate.training.tasks.base import TASKS, Task
from orchestrate.training.tasks.named import make

__all__ = ["TASKS", "Task", "exact_match", "make"]
