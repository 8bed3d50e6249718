"""Trackers: W&B, TensorBoard and trackio as observers of the run folder's records. They get what the files get.

A tracker's curve is the run's valid one. None of them can take back what it was given, so where a run goes back, the
tracker begins another run of its own (a branch), says there what was left, and gets every valid line of the folder
again. trackers.json says which branch the folder's lines are in; it is changed before a line is taken back, so a death
in between costs nothing. What fails during a run is told once and dropped: nothing here may end one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import is_of_task, numbers
from orchestrate.training.settings.values import brief
from orchestrate.training.store.run_folder import (
    CONFIG,
    EVENTS,
    METRICS,
    METRICS_KINDS,
    SCHEDULE,
    clean,
    valid_lines,
    write_whole,
)

BRANCH = "trackers.json"
PLAN = "plan.txt"
"""As --plan prints it, beside the files of the run folder."""
MARKED = ("operation", "rollback", "resume", "checkpoint", "emergency", "error")
"""Events that a tracker gets as markers: at their iteration, how many of the kind there have been."""
COLUMNS = (
    "iter", "entry", "name", "value", "reason", "desc", "changes", "val_loss_before", "val_loss_after", "seconds",
    "parameters_total", "parameters_trainable",
)  # fmt: skip
"""Of the table of operations."""
MOST_ROWS = 1000
"""Of it: the last ones."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of the run."""

    out_dir: Path
    project: str
    name: str
    """Of the run."""
    config: Mapping[str, Any]
    plan: str
    """As --plan prints it; empty where there is none."""

    @classmethod
    def of(cls, out_dir: str, project: str, name: str, config: Mapping[str, Any], plan: str) -> About:
        """Project and name that are not given follow from the run folder: the folder that it lies in, and its own."""
        folder = Path(out_dir).resolve()
        return cls(Path(out_dir), project or _plain(folder.parent.name), name or _plain(folder.name), config, plan)


def _plain(name: str) -> str:
    """A name that every tracker takes."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:100].strip("-") or "orchestrate"


# ---------------------------------------------------------------------------------------------- branches


@dataclass(frozen=True)
class Branch:
    """Which run of a tracker's own the folder's lines are in."""

    id: str
    number: int = 1
    left_at: int | None = None
    """The iteration after which the branch before is void."""
    begun: tuple[str, ...] = ()
    """Trackers that are being given the valid lines, or have been."""
    whole: tuple[str, ...] = ()
    """Those that have been given all of them."""

    @property
    def name(self) -> str:
        return self.id if self.number == 1 else f"{self.id}-{self.number}"

    @property
    def left(self) -> str:
        """What is to be said of the branch before; nothing of the first."""
        if self.left_at is None:
            return ""
        before = self.id if self.number == 2 else f"{self.id}-{self.number - 1}"
        return f"the run went back to iteration {self.left_at}: what {before} has after it is void"


def read_branch(out_dir: Path) -> Branch | None:
    """What trackers.json says; None where there is none that can be read."""
    try:
        found = json.loads((out_dir / BRANCH).read_text("utf-8"))
        branch = Branch(
            str(found["id"]), int(found["number"]), found["left_at"], tuple(found["begun"]), tuple(found["whole"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", branch.id) and isinstance(branch.left_at, int | None)
    return branch if plain else None


def _write(out_dir: Path, branch: Branch) -> None:
    values = {**branch.__dict__, "begun": list(branch.begun), "whole": list(branch.whole)}
    write_whole(out_dir / BRANCH, json.dumps(values).encode("utf-8"))


def leave(out_dir: Path, iteration: int, earlier: str | None = None) -> None:
    """To be called before lines are taken back: from here on a tracker begins another branch.

    Args:
        earlier: id of the W&B run of a folder without trackers.json, as earlier versions kept it.
    """
    branch = read_branch(out_dir) or (Branch(earlier) if earlier else None)
    if branch:
        _write(out_dir, Branch(branch.id, branch.number + 1, iteration))


# ---------------------------------------------------------------------------------------------- the set of them


class Trackers:
    """The trackers of a run (rank 0).

    Args:
        names: keys of TRACKERS.
        earlier: id of the W&B run of a folder that has no trackers.json, as earlier versions kept it.
    """

    def __init__(self, names: tuple[str, ...], about: About, earlier: str | None = None) -> None:
        self.about = about
        self.trouble: Callable[[str], None] = lambda told: None
        """Tells that a tracker was dropped."""
        self._live: dict[str, Tracker] = {}
        self._names = names
        if names and not read_branch(about.out_dir):
            _write(about.out_dir, Branch(earlier, begun=("wandb",), whole=("wandb",)) if earlier else Branch(_new_id()))

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run that the lines are in."""
        return self._live["wandb"].branch.name if "wandb" in self._live else None

    def open(self) -> None:
        """Begin or go on with every tracker, each with all the valid lines that it has not. Raises Refused."""
        for name in self._names:
            try:
                self._open(name)
            except Exception as error:
                self.close(1)
                place = "wandb_log" if name == "wandb" and self.about.config.get("wandb_log") else f"tracker={name}"
                hint = " (or set WANDB_MODE=offline)" if name == "wandb" else ""
                raise Refused(f"{place}: {error}{hint}") from error

    def _open(self, name: str) -> None:
        out_dir = self.about.out_dir
        branch = read_branch(out_dir) or Branch(_new_id())
        if name in branch.begun and name not in branch.whole:  # a death while it was given them: some are there twice
            branch = Branch(branch.id, branch.number + 1, 0)
        goes_on = name in branch.begun
        branch = Branch(branch.id, branch.number, branch.left_at, tuple({*branch.begun, name}), branch.whole)
        _write(out_dir, branch)
        tracker = self._live[name] = TRACKERS[name](self.about, branch, goes_on)
        tracker.take_all(valid_lines(out_dir), given=goes_on)
        _write(out_dir, Branch(branch.id, branch.number, branch.left_at, branch.begun, tuple({*branch.whole, name})))

    def take(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl or events.jsonl."""
        for name in list(self._live):
            self._guarded(name, lambda tracker: tracker.take(record))

    def went_back(self) -> None:
        """The folder's lines after some iteration are void now, and `leave` was called before they were."""
        for name in list(self._live):
            branch = read_branch(self.about.out_dir)
            left_at = branch.left_at if branch and branch.left_at is not None else 0
            self._guarded(name, lambda tracker, at=left_at: tracker.leave(at))
            if name in self._live:
                self._guarded(name, lambda tracker: self._open(tracker.name))

    def close(self, exit_code: int) -> None:
        for name in list(self._live):
            self._guarded(name, lambda tracker: tracker.close(exit_code))
        self._live = {}

    def _guarded(self, name: str, do: Callable[[Tracker], None]) -> None:
        try:
            do(self._live[name])
        except Exception as error:
            del self._live[name]
            self.trouble(f"tracker {name} failed and gets nothing more ({type(error).__name__}: {error})")


def check(names: tuple[str, ...]) -> str:
    """Why these cannot be used, or nothing; imports them. W&B asks for a key where there is a terminal."""
    for name in names:
        try:
            importlib.import_module(TRACKERS[name].module)
        except ImportError as error:
            extra = "wandb" if name == "wandb" else "'training-orchestrator[trackers]'"
            return f"tracker={name}: {error.name or name} is missing: pip install {extra}"
    return ""


def check_wandb(place: str) -> str:
    """Why W&B cannot be logged to, or nothing.

    Args:
        place: the key that asks for it.
    """
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return ""
    try:
        wandb.login()
    except wandb.Error as error:
        return f"{place}: {error} (or set WANDB_MODE=offline)"
    return ""


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


# ---------------------------------------------------------------------------------------------- one tracker


class Tracker:
    """Turns records into what a tracker shows: numbers, markers, a table of operations, texts, alerts.

    Args:
        goes_on: whether the branch has been begun by an earlier start.
    """

    name: str
    module: str

    def __init__(self, about: About, branch: Branch, goes_on: bool) -> None:
        self.about, self.branch = about, branch
        self._count: Counter[str] = Counter()
        self._rows: list[list[Any]] = []
        self.begin(goes_on)

    # what each of them does

    def begin(self, goes_on: bool) -> None:
        raise NotImplementedError

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def table(self, iteration: int, name: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
        """Show a table; a later one of the name stands for it."""
        raise NotImplementedError

    def alert(self, iteration: int, title: str, text: str) -> None: ...

    def leave(self, iteration: int) -> None:
        """End this branch: what it has after the iteration is void."""
        self.close(0)

    def close(self, exit_code: int) -> None:
        raise NotImplementedError

    # what they share

    def take_all(self, records: Iterator[Mapping[str, Any]], given: bool) -> None:
        """The lines so far; where they were given by an earlier start, only what is counted over all is kept."""
        last = 0
        for record in records:
            values, last = self._values(record), record["iter"]
            if not given:
                if values:
                    self.log(record["iter"], values)
                self._texts(record)
        if self._rows and not given:
            self.table(last, "operations", COLUMNS, self._rows)

    def take(self, record: Mapping[str, Any]) -> None:
        record = clean(record)
        if values := self._values(record):
            self.log(record["iter"], values)
        self._texts(record)
        if record["kind"] == "operation":
            self.table(record["iter"], "operations", COLUMNS, self._rows)
        elif record["kind"] == "emergency":
            self.alert(record["iter"], f"emergency at iteration {record['iter']}", record["reason"])

    def _texts(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "samples":
            rows = [[record["iter"], sample["prompt"], sample["text"]] for sample in record["texts"]]
            self.table(record["iter"], "samples", ("iter", "prompt", "text"), rows)

    def _values(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a record by the names that a tracker shows them under."""
        kind = record["kind"]
        if kind in METRICS_KINDS:
            named = {name if is_of_task(name) else f"{kind}/{name}": v for name, v in numbers(record).items()}
            return {name: value for name, value in named.items() if name != f"{kind}/iter"}
        if kind not in MARKED:
            return {}
        self._count[kind] += 1
        values: dict[str, float] = {f"marker/{kind}": self._count[kind]}
        if kind == "operation":
            values |= {f"operation/{name}": value for name, value in numbers(record["settings_after"]).items()}
            after = record["settings_after"]
            changes = ", ".join(
                f"{name} {brief(old)} -> {brief(after.get(name))}" for name, old in record["settings_before"].items()
            )
            told = {**record, "value": json.dumps(record["value"], ensure_ascii=False), "changes": changes}
            self._rows = [*self._rows, [told[column] for column in COLUMNS]][-MOST_ROWS:]
        return values

    @property
    def files(self) -> list[Path]:
        """Configuration, schedule and plan; what is not there is left out."""
        if self.about.plan:
            write_whole(self.about.out_dir / PLAN, (self.about.plan + "\n").encode("utf-8"))
        paths = [self.about.out_dir / name for name in (CONFIG, SCHEDULE, PLAN)]
        return [path for path in paths if path.exists()]


class Wandb(Tracker):
    """A W&B run for each branch, all of one group.

    A row's step is the number of lines before it in the folder, which grows over every resume; charts have `iter`, the
    iteration, as their axis.
    """

    name, module = "wandb", "wandb"

    def begin(self, goes_on: bool) -> None:
        import wandb

        number = self.branch.number
        self._run = wandb.init(
            project=self.about.project,
            name=self.about.name + (f"-{number}" if number > 1 else ""),
            id=self.branch.name,
            group=self.about.name,
            notes=self.branch.left or None,
            resume="allow",
            config=dict(self.about.config),
            dir=str(self.about.out_dir),
        )
        lines = sum((self.about.out_dir / name).read_bytes().count(b"\n") for name in self._logs()) if goes_on else 0
        self._step = max(lines, self._run.step)
        self._run.define_metric("iter")
        self._run.define_metric("*", step_metric="iter")
        for path in self.files:
            self._run.save(str(path.absolute()), base_path=str(self.about.out_dir.absolute()), policy="now")

    def _logs(self) -> list[str]:
        return [name for name in (METRICS, EVENTS) if (self.about.out_dir / name).exists()]

    def take(self, record: Mapping[str, Any]) -> None:
        super().take(record)
        self._step += 1

    def take_all(self, records: Iterator[Mapping[str, Any]], given: bool) -> None:
        def counted() -> Iterator[Mapping[str, Any]]:
            for record in records:
                yield record
                self._step += not given

        super().take_all(counted(), given)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iter": iteration, **values}, step=self._step)

    def table(self, iteration: int, name: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
        import wandb

        # The columns of operations hold numbers and nothing by turns.
        table = wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)
        self._run.log({"iter": iteration, name: table}, step=self._step)

    def alert(self, iteration: int, title: str, text: str) -> None:
        import wandb

        self._run.alert(title=title, text=text, level=wandb.AlertLevel.ERROR)

    def leave(self, iteration: int) -> None:
        self._run.tags = (*(self._run.tags or ()), "void")
        self._run.notes = f"the run went back to iteration {iteration}: what is here after it is void"
        self._run.summary["void_after"] = iteration
        self.close(0)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard, a folder for each branch."""

    name, module = "tensorboard", "torch.utils.tensorboard"

    def begin(self, goes_on: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = self.about.out_dir / "tensorboard" / self.branch.name
        self._writer = SummaryWriter(str(self._folder), flush_secs=10)
        if not goes_on:
            if self.branch.left:
                self._writer.add_text("went back", self.branch.left, self.branch.left_at)
            for path in self.files:
                text = path.read_text("utf-8", "replace").rstrip("\n").replace("\n", "\n    ")
                self._writer.add_text(path.name, f"    {text}", 0)  # as Markdown has code

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def table(self, iteration: int, name: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
        self._writer.add_text(name, _markdown(columns, rows), iteration)

    def alert(self, iteration: int, title: str, text: str) -> None:
        self._writer.add_text("alert", f"{title}: {text}", iteration)
        self._writer.flush()

    def leave(self, iteration: int) -> None:
        self._writer.add_text("void", f"the run went back: what is here after iteration {iteration} is void", iteration)
        self.close(0)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class Trackio(Tracker):
    """A run in trackio's database on this machine (TRACKIO_DIR), for each branch.

    Nothing leaves the machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL ask for it.
    """

    name, module = "trackio", "trackio"

    def begin(self, goes_on: bool) -> None:
        import trackio
        from trackio.run import Run

        if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            Run._get_username = lambda self: None  # it asks huggingface.co who owns the token of this machine
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=self.about.project,
                name=f"{self.about.name}-{self.branch.name}",
                group=self.about.name,
                config={key: value for key, value in self.about.config.items() if not key.startswith("_")},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        if not goes_on:
            texts = {path.name: path.read_text("utf-8", "replace") for path in self.files}
            texts |= {"went back": self.branch.left} if self.branch.left else {}
            self._run.log({name: trackio.Markdown(text) for name, text in texts.items()}, step=0)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def table(self, iteration: int, name: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
        import trackio

        self._run.log({name: trackio.Markdown(_markdown(columns, rows))}, step=iteration)

    def alert(self, iteration: int, title: str, text: str) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self._run.alert(title, text, trackio.AlertLevel.ERROR, step=iteration)

    def leave(self, iteration: int) -> None:
        import trackio

        text = f"what is here after iteration {iteration} is void"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.alert("the run went back", text, trackio.AlertLevel.WARN, step=iteration)
        self.close(0)

    def close(self, exit_code: int) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


def _markdown(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    """A table in which every cell is text, whatever it holds."""

    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", text).replace("\n", " ")

    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(map(cell, line) if number != 1 else line) + " |" for number, line in enumerate(lines)
    )


TRACKERS: dict[str, type[Tracker]] = {one.name: one for one in (Wandb, TensorBoard, Trackio)}
