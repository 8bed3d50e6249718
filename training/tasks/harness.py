"""Tasks of EleutherAI's lm-eval, scored by our models.

A task is known by its name in the installed lm-eval, which says what is asked and how it is counted; the models are
asked by adapter.py. Data sets come from the hub through `datasets`, or from a folder: what the hub has as
ORG/NAME, configuration C, split S lies there as ORG/NAME/C/S.jsonl (without C where a task names none). Then nothing
else is read. No code comes with data: a data set that is a script, a metric that is one, and a task that runs what the
model writes are refused. lm-eval is imported late, where it is needed: it is an extra.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.values import nearest, shown
from orchestrate.training.tasks.adapter import Adapter, CannotDo, Interrupted, NotFinite, wanted_of

_LARGEST = 2**30
"""Bytes of a file of local data."""
_BOOTSTRAP = 1000
"""Draws for the standard errors that have no formula."""
_NO_ERROR = "contains"
"""A mean of zeros and ones of which lm-eval gives no standard error."""


@dataclass(frozen=True)
class Result:
    """What came of a task.

    Attributes:
        scores: metric, as acc or exact_match,strict-match -> (value, standard error or None).
        documents: how many were asked.
    """

    task: str
    version: str
    few_shot: int
    documents: int
    scores: dict[str, tuple[float, float | None]]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "scores": {name: list(pair) for name, pair in self.scores.items()}}

    @classmethod
    def from_json(cls, values: Any) -> Result:
        """Raises KeyError, TypeError, ArithmeticError or ValueError for what `to_json` cannot have made."""
        scores = {str(name): (float(v), None if e is None else float(e)) for name, (v, e) in values["scores"].items()}
        if not scores or not all(math.isfinite(v) and 0 <= (e or 0) < math.inf for v, e in scores.values()):
            raise ValueError("a result has scores, and they are finite")
        return cls(
            str(values["task"]), str(values["version"]), int(values["few_shot"]), int(values["documents"]), scores
        )


class Loaded:
    """A task or a group of lm-eval with its data. Raises Refused.

    Args:
        data: the folder of local data sets; None: the hub's.
        few_shot: examples before each question; None: what the task says.
    """

    def __init__(self, name: str, data: Path | None = None, few_shot: int | None = None) -> None:
        self.name, self.data = name, data
        index = index_of((name,))
        if name not in index.task_index:
            raise Refused(f"there is no task {shown(name)} in lm-eval{nearest(name, every_name())}")
        kind = index.task_index[name].kind.name
        if kind == "TAG":
            listed = ", ".join(sorted(index.task_index[name].tags)[:6])
            raise Refused(f"{name} is a tag of lm-eval, not a task: name its tasks ({listed}, ...)")
        with _reading(name, data), _same_chance():
            self._found = index.load([name])
        tasks = self._found["tasks"].values()
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False):
                raise Refused(f"{name} runs what the model writes: such tasks are not evaluated here")
            if getattr(task, "MULTIMODAL", False):
                raise Refused(f"{name} asks about images or sounds")
            if few_shot is not None:
                task.set_config(key="num_fewshot", value=few_shot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        self.few_shot = max(task.get_config("num_fewshot") for task in tasks)
        group = self._found.get("groups", {}).get(name)
        self.version = str(_version(group.metadata if group is not None else None, tasks))
        if group is None:
            task = next(iter(tasks))
            filters = [ensemble.name for ensemble in task._filters]
            better = task.higher_is_better()
            metrics = [(metric, one) for one in filters for metric in task.aggregation() if better.get(metric)]
        else:
            metrics = [
                (one.metric, name) for one in group.aggregate_metric_list or [] for name in one.filter_list or ["none"]
            ]
        self.metrics = tuple(_metric(metric, one) for metric, one in metrics)
        """Those of which more is better."""

    def check(self, block_size: int) -> str:
        """Why a model with this context cannot be asked, as far as that is known beforehand, or nothing."""
        for task in self._found["tasks"].values():
            given = task.get_config("generation_kwargs")
            if task.OUTPUT_TYPE == "generate_until" and given:
                try:
                    wanted_of(given, block_size)
                except CannotDo as error:
                    return str(error)
        return ""

    def score(self, adapter: Adapter, limit: int | None = None) -> Result:
        """Ask the model. The same on every rank of the adapter. Raises Refused, NotFinite and Interrupted."""
        import lm_eval

        with _reading(self.name, self.data), _same_chance():
            for task in self._found["tasks"].values():
                task.set_fewshot_seed(seed=1234)
                task._instances = None
            try:
                found = lm_eval.evaluate(
                    adapter, self._found, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
                )
            except NotFinite:
                raise
            except CannotDo as error:
                raise Refused(f"{self.name}: {error}") from None
        values = found["results"].get(self.name, {})
        count = sum(n["effective"] for n in found["n-samples"].values())
        scores: dict[str, tuple[float, float | None]] = {}
        for key, value in values.items():
            metric, _, one = key.partition(",")
            if not one or metric.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            error = values.get(f"{metric}_stderr,{one}")
            known = isinstance(error, int | float) and math.isfinite(error)
            if metric == _NO_ERROR and count > 1:
                error, known = math.sqrt(value * (1 - value) / (count - 1)), True
            scores[_metric(metric, one)] = float(value), float(error) if known else None
        if not scores:
            raise Refused(f"{self.name}: lm-eval gave no score ({values})")
        return Result(self.name, self.version, self.few_shot, count, scores)


def _metric(metric: str, one: str) -> str:
    return metric if one == "none" else f"{metric},{one}"


def _version(metadata: Any, tasks: Any) -> Any:
    if isinstance(metadata, dict) and "version" in metadata:
        return metadata["version"]
    return next((task.VERSION for task in tasks), "")


# ---------------------------------------------------------------------------------------------- what lm-eval has


def require() -> None:
    """Raises Refused where lm-eval is not installed."""
    try:
        import datasets
        import lm_eval.api.metrics
        import lm_eval.api.task
        import tqdm
    except ImportError:
        raise Refused(
            "tasks of lm-eval need the extra evaluate: pip install 'training-orchestrator[evaluate]'"
        ) from None
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a model in training is not forked for a standard error
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    name = "transformers.data.metrics"  # what coqa imports, and transformers 5 has no more
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        package, module = ModuleType(name), ModuleType(f"{name}.squad_metrics")
        module.compute_exact, module.compute_f1 = squad_exact, squad_f1
        package.squad_metrics = module
        sys.modules |= {one.__name__: one for one in (package, module)}
    datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.metrics):
        module.tqdm = partial(tqdm.tqdm, disable=True)


def _squad_words(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def squad_exact(gold: str, said: str) -> int:
    """1 where two answers have the same words, else 0, as SQuAD counts (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    return int(_squad_words(gold) == _squad_words(said))


def squad_f1(gold: str, said: str) -> float:
    """The harmonic mean of the shares of common words, as SQuAD counts; two answers without words are equal."""
    ours, theirs = _squad_words(said), _squad_words(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _tasks_folder() -> Path:
    require()
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@lru_cache(maxsize=1)
def _places() -> dict[str, Path]:
    """Name of a task or a group -> its file, by a look at the files' text: 2 s where the whole index takes 10 and more.

    Of several files with a name the first counts, as in lm-eval.
    """
    found: dict[str, Path] = {}
    for path in sorted(_tasks_folder().glob("**/*.yaml"), key=lambda path: path.as_posix()):
        text = path.read_text("utf-8", "replace")
        keys = dict(re.findall(r"""^["']?(task|group|class)["']?:[ \t]*["']?([^\s"'#\[]+)""", text, re.M))
        name = keys.get("task") if "class" in keys else keys.get("group") or keys.get("task")
        if name and "__pycache__" not in path.parts:
            found.setdefault(name, path)
    return found


@lru_cache(maxsize=16)
def index_of(names: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks with these in it, and with all that their groups hold."""
    require()
    from lm_eval.tasks import TaskManager

    root = _tasks_folder()
    folders = {root / path.relative_to(root).parts[0] for name in names if (path := _places().get(name))}
    if len(folders) and all(name in _places() for name in names):
        manager = TaskManager(include_path=sorted(folders), include_defaults=False)
        if all(_whole(name, manager.task_index) for name in names):
            return manager
    return TaskManager()


def _whole(name: str, index: dict[str, Any]) -> bool:
    """Whether a task, and all that a group of this name holds, is in the index."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(_whole(m if isinstance(m, str) else m.get("task") or m.get("group") or "", index) for m in members)


def every_name() -> list[str]:
    """The names of all tasks and groups that the installed lm-eval has."""
    return sorted(_places())


def version_of(name: str) -> str:
    """A task's version, without its data. That of lm-eval where it says none. Raises Refused."""
    require()
    import lm_eval

    entry = index_of((name,)).task_index.get(name)
    metadata = (entry.cfg or {}).get("metadata") if entry else None
    return str(_version(metadata, ()) or f"lm-eval {lm_eval.__version__}")


# ---------------------------------------------------------------------------------------------- data


@contextlib.contextmanager
def _reading(name: str, data: Path | None) -> Iterator[None]:
    """Data sets come from the folder, or from the hub without their code; metrics are lm-eval's own."""
    import datasets
    import evaluate

    real, metric = datasets.load_dataset, evaluate.load

    def load(path: str, name: str | None = None, *args: Any, **keys: Any) -> Any:
        keys.pop("trust_remote_code", None)
        if data is not None:
            return local_data(data, path, name, keys.get("data_files"), keys.get("split"))
        return real(path, name, *args, **keys)

    def refuse(path: str, *args: Any, **keys: Any) -> Any:
        raise Refused(f"{name}: its metric {path} is code from the hub, which is not run here")

    datasets.load_dataset, evaluate.load = load, refuse
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # lm-eval says there what it draws
            yield
    except (Refused, CannotDo, Interrupted, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a task is code of lm-eval's and data of anybody's: it can raise nearly anything
        first = next(iter(str(error).splitlines()), "")
        why = f"{type(error).__name__}: {first}"
        if "script" in first and "supported" in first:
            why = f"its data set is a script, which is not run here ({first})"
        elif data is None and (isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub")):
            why += "; --data FOLDER reads data sets from local files"
        raise Refused(f"{name}: {why}") from error
    finally:
        datasets.load_dataset, evaluate.load = real, metric


def local_data(
    folder: Path, path: str, name: str | None = None, files: dict[str, str] | None = None, split: str | None = None
) -> Any:
    """A data set of the hub out of a folder of JSON lines, a file a split. Raises Refused.

    Args:
        files: split -> file of the hub, where a task names files (hf://datasets/ORG/NAME/FILE).
    """
    from datasets import Dataset, DatasetDict

    if path == "json" and files:
        places = {one: folder / str(file).partition("datasets/")[2] for one, file in files.items()}
    else:
        place = folder / path / (name or "")
        places = {file.stem: file for file in sorted(place.glob("*.jsonl"))}
        if not places:
            raise Refused(f"{place}: there is no SPLIT.jsonl of the data set {path}{f' ({name})' if name else ''}")
    found = DatasetDict()
    for one, file in places.items():
        try:
            if file.stat().st_size > _LARGEST:
                raise Refused(f"{file}: longer than {_LARGEST:,} bytes")
            # Lines end with \n alone: texts may hold other ends of lines.
            rows = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
            if not rows or not all(row.keys() == rows[0].keys() for row in rows):  # a hole would become a null
                raise ValueError("each line must have the columns of the first" if rows else "there is no line")
            found[one] = Dataset.from_list(rows)
        except Refused:
            raise
        except OSError as error:
            raise Refused(f"{file}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Refused(f"{file}: not JSON lines of one shape ({error})") from None
    return found[split] if split else found


@contextlib.contextmanager
def _same_chance() -> Iterator[None]:
    """What a task draws is the same each time, and the caller's random numbers stay as they are."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
