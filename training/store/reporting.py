"""What a run tells a person: the console and its file; and the run folder's logs. The only file that prints.

Only rank 0 reports; the other ranks hold a reporter that writes nothing. What the lines of metrics.jsonl and
events.jsonl are is run_folder.py's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from orchestrate.training.store import run_folder
from orchestrate.training.store.run_folder import COURSE, EVENTS, METRICS, METRICS_KINDS, Lines, mark_void
from orchestrate.training.store.trackers import Trackers, leave

_CONSOLE = "console"


class Silent:
    """The reporter of every rank but the first.

    Attributes:
        restore: makes again what a start writes, when somebody removed the run folder; returns what is wrong.
    """

    restore: Callable[[], str] | None = None

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event. Raises TypeError, on every rank, where it is not what run_folder.py says."""
        run_folder.event(kind, fields)

    def metrics(self, kind: str, **fields: Any) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, iteration: int, **shown: Any) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}

    def void_since(self, sizes: Mapping[str, int], iteration: int) -> None: ...

    @property
    def wandb_id(self) -> str | None:
        """Of the W&B run that the lines are in, or None."""
        return None

    def close(self, exit_code: int = 0) -> None: ...


class Reporter(Silent):
    """Writes the run folder's JSON lines and the console, and hands the lines to the trackers.

    Args:
        out_dir: the run folder, or None to write no files (eval_only).
        total_iters: length of the progress bar.
        log_file: where the console's lines go too, or None.
        trackers: opened already, or None.
    """

    def __init__(
        self,
        out_dir: Path | None,
        total_iters: int,
        start_iter: int,
        log_file: Path | None,
        trackers: Trackers | None = None,
    ) -> None:
        logs = (METRICS, EVENTS) if out_dir else ()
        self._lines = {name: Lines(out_dir / name, self._restore) for name in logs}
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._lines[_CONSOLE] = Lines(log_file, self._restore)
        self._trackers = trackers
        if trackers is not None:
            trackers.trouble = self._dropped
        self._iter = start_iter
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_iters, initial=start_iter, unit="it", dynamic_ncols=True)

    def event(self, kind: str, **fields: Any) -> None:
        self._iter = fields["iter"]
        record = run_folder.event(kind, fields)
        self._write(EVENTS, record)
        if EVENTS in self._lines:
            self._lines[EVENTS].sync()
        if self._trackers is not None:
            self._trackers.take(record)

    def metrics(self, kind: str, **fields: Any) -> None:
        self._iter = fields["iter"]
        record = {"kind": kind, **fields}
        self._write(METRICS, record)
        if self._trackers is not None:
            self._trackers.take(record)

    def _dropped(self, told: str) -> None:
        self.say(f"warning: {told}")
        self.event("error", iter=self._iter, message=told, action="go on")

    @property
    def wandb_id(self) -> str | None:
        return self._trackers.wandb_id if self._trackers is not None else None

    def _write(self, name: str, record: Mapping[str, Any] | str) -> None:
        """A line in one of the files; what is wrong with a file is told once, and the run goes on."""
        lines = self._lines.get(name)
        if lines is None:
            return
        lines.write(record if isinstance(record, str) else run_folder.line(record))
        if lines.trouble:
            told, lines.trouble = lines.trouble, ""
            self.say(f"warning: {told}")
            if not lines.lost:
                self.event("error", iter=self._iter, message=told, action="go on")

    def _restore(self) -> None:
        if self.restore is not None:
            with contextlib.suppress(OSError):  # the logs say already that something is wrong
                if problem := self.restore():
                    self.say(f"warning: {problem}")

    def say(self, text: str) -> None:
        """One line for a person."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._write(_CONSOLE, text)

    def progress(self, iteration: int, **shown: Any) -> None:
        """The state of the run, on the bar of a terminal or as a plain line."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in shown.items()), refresh=False)
            self._bar.n = iteration  # set, not added to: a run can go back
            self._bar.refresh()
            self._write(_CONSOLE, _line(iteration, shown))
        else:
            self.say(_line(iteration, shown))

    def sizes(self) -> dict[str, int]:
        logs = {name: lines for name, lines in self._lines.items() if name != _CONSOLE}
        for lines in logs.values():
            lines.sync()
        return {name: lines.size() for name, lines in logs.items()}

    def void_since(self, sizes: Mapping[str, int], iteration: int) -> None:
        """Mark what was measured and decided after a checkpoint as void: the run has gone back to its iteration."""
        if self._trackers is not None:
            leave(self._trackers.about.out_dir, iteration)
        for name, kinds in ((METRICS, METRICS_KINDS), (EVENTS, COURSE)):
            if name in self._lines:
                lines = self._lines[name]
                lines.close()
                mark_void(lines.path, sizes.get(name, 0), kinds)
                self._lines[name] = Lines(lines.path, self._restore)
        if self._trackers is not None:
            self._trackers.went_back()

    def close(self, exit_code: int = 0) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close(exit_code)  # what goes wrong there is told yet
        for lines in self._lines.values():
            lines.close()
        self._lines = {}


def _line(iteration: int, shown: Mapping[str, Any]) -> str:
    return f"iter {iteration}: " + ", ".join(f"{key} {value}" for key, value in shown.items())


def machine(device: torch.device) -> dict[str, Any]:
    """Memory in bytes and use in percent of host and device; null where it cannot be read."""
    process = psutil.Process()
    facts: dict[str, Any] = {
        "host_memory": process.memory_info().rss,
        "host_memory_percent": psutil.virtual_memory().percent,
        "cpu_percent": psutil.cpu_percent(),
        "device_memory": None,
        "device_memory_peak": None,
        "gpu_percent": None,
    }
    if device.type == "cuda":
        facts["device_memory"] = torch.cuda.memory_allocated(device)
        facts["device_memory_peak"] = torch.cuda.max_memory_allocated(device)
        try:
            facts["gpu_percent"] = torch.cuda.utilization(device)
        except Exception:  # needs NVML, which torch imports only if it is there
            facts["gpu_percent"] = None
    return facts


def memory_percent(device: torch.device) -> dict[str, float]:
    """How much of the host's and of the device's memory is in use, in percent."""
    used = {"host": psutil.virtual_memory().percent}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used["device"] = 100.0 * (total - free) / total
    return used
