"""How a run stands right now: facts for somebody who looks on while it trains, or after it died.

Reads the run folder and nothing else: no lock is touched and no process is asked, so it is the same from another
machine. Whether a run is alive cannot be read there; how long ago it wrote can. Nothing here draws.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrate.training.report.data import Series, Story, duration, read_story
from orchestrate.training.schedule.dry import DryRun
from orchestrate.training.schedule.file import Entry, parse_schedule
from orchestrate.training.schedule.orchestrator import Orchestrator
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import VAL_LOSS, numbers
from orchestrate.training.settings.records import Progress, Settings
from orchestrate.training.settings.values import read_at_most
from orchestrate.training.store import checkpoint, manifest
from orchestrate.training.store.run_folder import (
    EVENT_KINDS,
    EVENTS,
    METRICS,
    SCHEDULE,
    read_config,
    read_lines,
    valid_lines,
)
from orchestrate.training.store.state import State

LOOKED_BACK = 20
"""Lines of metrics whose pace says what is to be expected."""
QUIET_SECONDS, QUIET_LINES = 60.0, 20
"""A run is quiet after so long without a line, and after so many times as long as a line takes."""
RECENT = 8
"""Events that are shown."""


@dataclass(frozen=True)
class Head:
    """The next step of a track of the schedule."""

    title: str
    """Its number and round, and its track where there are several."""
    what: str
    near: tuple[str, ...]
    """How near each of its triggers is; one is enough."""


@dataclass(frozen=True)
class Live:
    """One run at one moment."""

    folder: Path
    name: str
    state: str
    """not begun | under way | quiet | ended | died, with its details."""
    facts: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[Head, ...] = ()
    losses: tuple[Series, ...] = ()
    """Of training and validation, as far as they count; over iterations."""
    events: tuple[str, ...] = ()
    """The last ones, oldest first."""
    health: tuple[str, ...] = ()
    """What is wrong; nothing where all is well."""


class Watcher:
    """Reads one run folder again and again; what has not changed is not read twice."""

    def __init__(self, folder: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock = Path(folder), clock
        self._seen: tuple[Any, ...] | None = None
        self._story: Story | None = None
        self._none = ""
        self._heads: tuple[tuple[Head, ...], list[str]] = ((), [])
        self._state: tuple[str, State] | None = None

    def look(self) -> Live:
        """How the run stands. Raises nothing for what a run folder may hold."""
        name = self.folder.resolve().name
        if not self.folder.is_dir():
            return Live(self.folder, name, "not begun: there is no such folder")
        seen = tuple(_stat(self.folder / file) for file in (METRICS, EVENTS, SCHEDULE))
        damage = self._damage()
        if seen != self._seen:
            self._seen = seen
            self._read()
        if self._story is None:
            return Live(self.folder, name, f"not begun: {self._none}", health=tuple(damage))
        age = max(0.0, self._clock() - max((one[0] for one in seen[:2] if one), default=0.0))
        missing = [f"{file} is missing" for file, one in zip((METRICS, EVENTS), seen, strict=False) if not one]
        heads, problems = self._heads
        story = self._story
        return Live(
            folder=self.folder,
            name=name,
            state=_state(story, age),
            facts=_facts(story, read_config(self.folder) or {}, age),
            heads=() if story.ended else heads,
            losses=tuple(series for name in ("loss", VAL_LOSS) if (series := story.of(name)) is not None),
            events=tuple(_recent(story)),
            health=(*missing, *damage, *story.notes, *problems),
        )

    def _read(self) -> None:
        self._story, self._heads = None, ((), [])
        try:
            self._story = read_story(self.folder)
        except Refused as error:
            self._none = error.problems[0].removeprefix(f"{self.folder}: ")
            return
        try:
            self._heads = tuple(self._outlook()), []
        except (Refused, ValueError, KeyError, TypeError, OSError, ArithmeticError) as error:
            told = error.problems[0] if isinstance(error, Refused) else str(error)
            self._heads = (), [f"what comes next is not known: {told}"]

    def _damage(self) -> list[str]:
        """What is wrong with the checkpoints; tensors are not read, only their sizes."""
        found = []
        with contextlib.suppress(OSError):
            for path, saved in manifest.survey(self.folder):
                try:
                    if isinstance(saved, Refused):
                        raise saved
                    manifest.check_files(path, saved, whole=False)
                except Refused as error:
                    if path.exists():  # a run removes what it needs no more
                        found += error.problems
            found += [f"{path.name} was set aside" for path in manifest.folder(self.folder).glob("damaged_*")]
        return found

    def _saved(self) -> State | None:
        """The state of the newest checkpoint that can be read."""
        for path, saved in manifest.survey(self.folder):
            if isinstance(saved, Refused):
                continue
            mark = f"{path.name} {saved.files.get(checkpoint.STATE)}"
            if self._state is None or self._state[0] != mark:
                with contextlib.suppress(Refused):
                    self._state = mark, checkpoint.load(path, whole=False).state
            if self._state is not None and self._state[0] == mark:
                return self._state[1]
        return None

    def _outlook(self) -> list[Head]:
        """The heads of the queues: from the last checkpoint on, brought up to date by what is recorded behind it."""
        try:
            text = read_at_most(self.folder / SCHEDULE, 2**20).decode("utf-8")
        except FileNotFoundError:
            return []
        schedule = parse_schedule(text, str(self.folder / SCHEDULE))
        state = self._saved()
        if state is None:  # all that is recorded is behind the start
            begins = [line for _, line in read_lines(self.folder / EVENTS, {"start": EVENT_KINDS["start"]}) if line]
            if not begins:
                return []
            settings = Settings.from_json(begins[-1]["settings"])
            dry = DryRun(settings, Progress.start(settings))
        else:
            dry = DryRun(state.present, replace(state.progress))
        orchestrator = Orchestrator(schedule, dry, dry)
        if state is not None:
            orchestrator.load_state({**state.orchestrator, "ramps": []})
        latest: dict[str, float] = {}
        for line in valid_lines(self.folder, state.log_sizes if state else None):
            p = dry.progress
            if "tokens" in line:
                p.iter, p.tokens, p.seconds = line["iter"], line["tokens"], line["seconds"]
                values = numbers(line) if "why" not in line else {}
                latest |= values
                orchestrator.observe({name: value for name, value in values.items() if name != VAL_LOSS})
                if VAL_LOSS in values:
                    for queue in orchestrator.position.queues.values():
                        queue.history[VAL_LOSS] = (*queue.history.get(VAL_LOSS, ()), values[VAL_LOSS])
            elif _done_with(line):
                p.iter = line["iter"]
                orchestrator.follow(line)
        assert self._story is not None
        latest = {s.name: float(s.values[-1]) for s in self._story.series if not s.void} | latest
        return [
            Head(_titled(entry, len(schedule.tracks) > 1), str(entry), tuple(near))
            for entry, near in orchestrator.outlook(dry.progress.seconds, latest)
        ]


def _done_with(event: Mapping[str, Any]) -> bool:
    """Whether a queue has gone on behind what an event is about."""
    if event["kind"] == "decision":
        return str(event["reason"]).startswith("the repetition ends")
    kinds = event["kind"] == "operation" or (event["kind"] == "error" and event.get("on_error") == "skip")
    return kinds and event.get("entry") is not None


def _titled(entry: Entry, of_several: bool) -> str:
    return f"[{entry.title}]" + (f" track {entry.track}" if of_several and entry.track else "")


def _stat(path: Path) -> tuple[float, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime, found.st_size


def _pace(story: Story) -> tuple[float, float] | None:
    """(seconds an iteration, seconds a line) of the last lines, evaluations and saves included."""
    series = story.of("loss") or story.of(VAL_LOSS)
    if series is None or len(series.values) < 2:
        return None
    iters, seconds = (series.at[axis][-LOOKED_BACK:] for axis in ("iter", "seconds"))
    done, took = float(iters[-1] - iters[0]), float(seconds[-1] - seconds[0])
    return (took / done, took / (len(iters) - 1)) if done > 0 and took > 0 else None


def _state(story: Story, age: float) -> str:
    if story.ended:
        return story.state
    pace = _pace(story)
    if age > max(QUIET_SECONDS, QUIET_LINES * pace[1] if pace else 0.0):
        return f"quiet: nothing was written for {duration(age)}; killed, or busy with something long"
    return "under way"


def _facts(story: Story, config: Mapping[str, Any], age: float) -> dict[str, str]:
    facts = {"last line": f"{duration(age)} ago"}
    last = story.of("loss") or story.of(VAL_LOSS)
    whole = config.get("max_iters")
    if last is not None:
        iteration = float(last.at["iter"][-1])
        facts["iteration"] = f"{iteration:,.0f}"
        if isinstance(whole, int) and not isinstance(whole, bool) and 0 < whole < 2**53:
            facts["iteration"] += f" of {whole:,} ({min(100.0, 100 * iteration / whole):.0f} %)"
            pace = _pace(story)
            if pace and not story.ended:
                facts["to go"] = f"about {duration(max(0.0, whole - iteration) * pace[0])} at this pace"
    facts |= {
        name: story.facts[name] for name in ("tokens", "time", "best val loss", "last val loss") if name in story.facts
    }
    for name, label, unit in (
        ("loss", "loss", 0), ("lr", "learning rate", 0), ("tokens_per_second", "tokens/s", 0),
        ("machine.host_memory", "host memory", 2**30), ("machine.device_memory", "device memory", 2**30),
        ("machine.device_memory_peak", "device memory peak", 2**30),
    ):  # fmt: skip
        if (series := story.of(name)) is not None and math.isfinite(value := float(series.values[-1])):
            big = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            facts[label] = f"{value / unit:.2f} GiB" if unit else big
    operations = [row for row in story.operations if not row.void]
    if operations:
        row = operations[-1]
        words = f"{row.what}{f' ({row.desc})' if row.desc else ''}"
        facts["stage"] = f"since iteration {row.at['iter']:,.0f}: {words}"
    else:
        facts["stage"] = "the start"
    facts |= {
        name: story.facts[name] for name in ("model", "parameters", "machine", "checkpoints") if name in story.facts
    }
    return facts


def _recent(story: Story) -> list[str]:
    return [
        f"{marker.at['iter']:,.0f}  {marker.title}" + (" (taken back)" if marker.void else "")
        for marker in story.markers[-RECENT:]
    ]
