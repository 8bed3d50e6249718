"""Models scored by tasks of lm-eval, each task once: what has been scored stands in files and is read from there.

A result is known by all that it depends on: the bits of the weights, the tokenizer, the number type, the task and its
version, the examples before a question, how many documents, and the files of local data. It is written as soon as its
task is done, whole or not at all; so what was interrupted goes on with the next task. Runs keep theirs in
RUN/evaluations, models from elsewhere in ~/.cache/orchestrate/evaluations. A task that cannot be done is named with the
reason and has no score, and a suite that it belongs to has none either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrate.data.tokenizer import RemappedTokenizer, Tokenizer
from orchestrate.model.gpt import GPT
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.session.resume import newest_whole
from orchestrate.training.session.sampling import open_foreign, open_run_folder
from orchestrate.training.session.start import is_run_folder
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint, manifest
from orchestrate.training.tasks.adapter import Adapter, NotFinite
from orchestrate.training.tasks.base import TASKS
from orchestrate.training.tasks.harness import Loaded, Result, every_name, require, version_of
from orchestrate.training.tasks.suites import Member, Number, Suite, summed_up

FORMAT = 1
"""Of the files of results."""
NO_PLOTLY = "--plot needs the extra report: pip install 'training-orchestrator[report]'"


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        name: of the run folder, or of the model.
        checkpoint, iter: of a run only.
        kept: where its results are.
        passed_over: what is wrong with newer checkpoints.
    """

    name: str
    checkpoint: str
    iter: int | None
    kept: Path
    passed_over: tuple[str, ...] = field(default=(), compare=False)


@dataclass
class Scored:
    """What came of a subject: results by the names of the tasks, or of the suite's members; why others have none."""

    subject: Subject
    fingerprint: str
    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For a person."""
        name = Path(self.subject.name).name or self.subject.name
        return f"{name}/{self.subject.checkpoint}" if self.subject.checkpoint else name

    def sums(self, suite: Suite | None) -> dict[str, Number]:
        """Those of the suite; nothing where a task of it has no result."""
        return {} if suite is None or self.failed else summed_up(suite, self.results)

    def to_json(self, suite: Suite | None) -> dict[str, Any]:
        return {
            "run": self.subject.name,
            "checkpoint": self.subject.checkpoint,
            "iter": self.subject.iter,
            "fingerprint": self.fingerprint,
            "results": {name: result.to_json() for name, result in self.results.items()},
            "failed": self.failed,
            "suite": {name: {"value": n.value, "stderr": n.error} for name, n in self.sums(suite).items()},
        }


def subjects(source: str, which: str) -> list[Subject]:
    """The models that a person names. Raises Refused.

    Args:
        source: a run folder, a Hugging Face or PEFT folder, a name of GPT-2's, or a nanoGPT ckpt.pt.
        which: of a run: latest, best, a checkpoint's name or its path, or all.
    """
    if not is_run_folder(source):
        if which not in ("latest", "best"):
            raise Refused(f"--checkpoint {which}: {source} is no run folder and has none")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return [Subject(source.rstrip("/"), "", None, cache / "orchestrate" / "evaluations")]
    folder = checkpoint.folder(source)
    there = checkpoint.find(source)
    given = Path(which)
    if len(given.parts) > 1 and given.resolve().parent == folder.resolve():
        which = given.name
    problems: tuple[str, ...] = ()
    if which == "latest" and there:
        newest = newest_whole(source)
        names, problems = [newest.path.name], tuple(newest.problems)
    else:
        names = [path.name for path in there] if which == "all" else [(folder / which).resolve().name]
    if not names or not all(re.fullmatch(manifest.NAME, name) and (folder / name).is_dir() for name in names):
        known = ", ".join(path.name for path in there) or "none"
        raise Refused(f"{source}: there is no checkpoint {which!r}; there are {known}")
    found = sorted((int(name.split("_")[1]), name) for name in names)
    kept = Path(source) / "evaluations"
    return [Subject(source.rstrip("/"), name, iteration, kept, problems) for iteration, name in found]


def opened(subject: Subject, dataset: str = "") -> tuple[GPT, Tokenizer]:
    """Its model and tokenizer, or a data set's. Raises ValueError."""
    if not subject.checkpoint:
        return open_foreign(subject.name, dataset)
    return open_run_folder(subject.name, subject.checkpoint, dataset)[:2]


def members_of(tasks: Sequence[str], few_shot: int | None) -> list[Member]:
    """The tasks that a person names. Raises Refused for those that lm-eval has not."""
    require()
    known, problems = set(every_name()), []
    from orchestrate.training.settings.values import nearest, shown

    for name in tasks:
        if name in TASKS:
            problems.append(f"--tasks: {name} is a task of eval_tasks, which scores a run while it trains")
        elif name not in known:
            problems.append(f"--tasks: there is no task {shown(name)} in lm-eval{nearest(name, sorted(known))}")
        elif list(tasks).count(name) > 1:
            problems.append(f"--tasks: {name} is there twice")
    if problems:
        raise Refused(list(dict.fromkeys(problems)))
    return [Member(name, name, "", few_shot, 0.0, "") for name in tasks]


def weights_fingerprint(model: GPT) -> str:
    """A SHA-256 over the configuration and the bits of all weights."""
    digest = hashlib.sha256(repr((model.config, model.fading)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).data)
    return digest.hexdigest()


def _tokenizer_print(tokenizer: Tokenizer) -> str:
    """What tells a tokenizer from others, also those with the same tokens (its fingerprint does not cover all)."""
    inner, remap = tokenizer, []
    if isinstance(tokenizer, RemappedTokenizer):
        inner, remap = tokenizer.inner, tokenizer.remap.tolist()
    facts = inner.fingerprint, remap, tokenizer.end_of_text, tokenizer.start_of_text, tokenizer.encode("")
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _data_print(data: Path | None) -> str:
    """What tells local data from other local data: names, sizes and times of its files."""
    if data is None:
        return ""
    facts = sorted((str(path.relative_to(data)), path.stat().st_size, path.stat().st_mtime_ns)
                   for path in data.rglob("*") if path.is_file())  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def evaluate(
    subject: Subject,
    members: Sequence[Member],
    adapter: Adapter,
    *,
    dtype: str,
    limit: int | None = None,
    data: Path | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Scored:
    """Score a model by tasks, those that are known already from their files. All ranks of the adapter together.

    Args:
        dtype: the number type of the computation.
        limit: documents of each task, or of each of a group, at most.
        again: whether known results are made anew.
        say: is told of each result as it comes.
    """
    ranks: Ranks | None = adapter.ranks
    print_ = weights_fingerprint(adapter.model)
    scored, local, tokenizer = Scored(subject, print_), _data_print(data), _tokenizer_print(adapter.tokenizer)
    for member in members:
        facts = {
            "format": FORMAT, "weights": print_, "tokenizer": tokenizer, "dtype": dtype,
            "task": member.task, "version": version_of(member.task), "few_shot": member.few_shot, "limit": limit,
            "data": local,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        path = subject.kept / f"{key}.json"
        known = None if again else _read(path, facts)
        known = ranks.broadcast(known) if ranks else known
        result: Result | None = Result.from_json(known) if known else None
        if result is None:
            try:
                result = Loaded(member.task, data, member.few_shot).score(adapter, limit)
            except (Refused, NotFinite) as error:
                scored.failed[member.name] = "; ".join(error.problems) if isinstance(error, Refused) else str(error)
                say(f"{member.name}: failed: {scored.failed[member.name]}")
                continue
            if ranks is None or ranks.is_first:
                _write(path, {"facts": facts, "result": result.to_json()})
        if member.metric and member.metric not in result.scores:
            scored.failed[member.name] = f"{member.task} has no {member.metric}: {', '.join(result.scores)}"
            say(f"{member.name}: failed: {scored.failed[member.name]}")
            continue
        scored.results[member.name] = result
        say(f"{member.name}: {told(member, result)}{' (known)' if known else ''}")
    return scored


def metric_of(member: Member, result: Result) -> str:
    """The metric of a task that is shown: the suite's, else the first."""
    return member.metric or next(iter(result.scores))


def told(member: Member, result: Result) -> str:
    """A result for a person."""
    metric = metric_of(member, result)
    value, error = result.scores[metric]
    return f"{metric} {value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _read(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """A result that is known; nothing where there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["facts"] != facts:
            return None
        return Result.from_json(values["result"]).to_json()
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Raises Refused where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise Refused(f"{path}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------- shown


def table(scored: Sequence[Scored], members: Sequence[Member], suite: Suite | None) -> str:
    """Tasks down, models across; for a person."""
    heads = [one.label for one in scored]
    rows: list[list[str]] = []
    for member in members:
        cells = [told(member, one.results[member.name]) if member.name in one.results else "failed" for one in scored]
        rows.append([member.name, *cells])
    sums = [one.sums(suite) for one in scored]
    for name in suite.sums if suite else ():
        rows.append([name.upper(), *(_percent(found[name]) if name in found else "none" for found in sums)])
    lines = [["task", *heads], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def _percent(number: Number) -> str:
    return f"{100 * number.value:.2f} %" + (f" ± {100 * number.error:.2f}" if number.error is not None else "")


def plot(scored: Sequence[Scored], members: Sequence[Member], suite: Suite | None, target: Path) -> None:
    """A page with a picture for each task, and for the suite's sums: over iterations, a line for each run.

    It needs no other file and no network. Raises Refused.
    """
    try:
        from plotly.graph_objects import Figure, Scatter
        from plotly.subplots import make_subplots
    except ImportError:
        raise Refused(NO_PLOTLY) from None
    series: dict[str, dict[str, list[tuple[float, Number]]]] = {}

    def add(title: str, one: Scored, number: Number) -> None:
        line = series.setdefault(title, {}).setdefault(one.subject.name, [])
        line.append((float(one.subject.iter if one.subject.iter is not None else 0), number))

    for one in scored:
        for name, number in reversed(one.sums(suite).items()):
            add(f"{name} (rescaled)", one, number)
    for member in members:
        for one in scored:
            if member.name in one.results:
                result = one.results[member.name]
                metric = metric_of(member, result)
                add(f"{member.name} ({metric})", one, Number(*result.scores[metric]))
    if not series:
        raise Refused("--plot: there is no score to show")
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure: Figure = make_subplots(lines, columns, subplot_titles=list(series))
    colours = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00"]
    runs = list(dict.fromkeys(one.subject.name for one in scored))
    for place, lines_of in enumerate(series.values()):
        for name, points in lines_of.items():
            points.sort(key=lambda point: point[0])
            figure.add_trace(
                Scatter(
                    x=[x for x, _ in points],
                    y=[number.value for _, number in points],
                    error_y={"type": "data", "array": [number.error or 0.0 for _, number in points]},
                    mode="lines+markers",
                    name=name,
                    legendgroup=name,
                    showlegend=place == 0,
                    line={"color": colours[runs.index(name) % len(colours)]},
                ),
                row=place // columns + 1,
                col=place % columns + 1,
            )
    figure.update_layout(
        title="Evaluations<br><sub>bars: one standard error; rescaled: 0 is guessing, 1 no mistake</sub>",
        height=120 + 260 * lines,
        template="plotly_white",
    )
    figure.update_xaxes(title_text="iteration")
    try:
        figure.write_html(target, include_plotlyjs=True, full_html=True)
    except OSError as error:
        raise Refused(f"--plot {target}: cannot be written ({error.strerror})") from None
