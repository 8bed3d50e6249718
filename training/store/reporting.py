"""What a run tells: metrics.jsonl, events.jsonl, the console, W&B. The only file that prints or logs.

Only rank 0 reports; the other ranks hold a reporter that does nothing. A line of JSON is written in one piece, so a
crash leaves it whole or absent; after a resume `rewind` cuts or marks what the crash made void.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from tqdm import tqdm

from orchestrate.training.settings.errors import Refused

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
# Events that describe the run's course: after going back to an earlier state they did not happen. The others (signal,
# error, ...) describe what befell the process, and that stays true.
_COURSE = ("decision", "operation", "rollback")


def clean(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class JsonLines:
    """A file that grows by whole lines. Where there is no room for one, it is left out and counted.

    Attributes:
        lost: lines that could not be written since the last one that could.
        trouble: why, or why the file had to be made anew; to be told to a person and reset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost, self.trouble = 0, ""
        self._open()
        self._end_partial_line()

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _end_partial_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(clean(record), ensure_ascii=False) + "\n").encode("utf-8")
        size = None
        try:
            if os.fstat(self._handle).st_nlink == 0:
                self._reopen()
            size = self.size()
            if os.write(self._handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if size is not None:
                os.ftruncate(self._handle, size)  # no half line stays
            self.trouble = "" if self.lost else f"{self.path} cannot be written to ({error.strerror})"
            self.lost += 1
        else:
            if self.lost:
                self.trouble = f"{self.path} can be written to again; {self.lost} lines are lost"
            self.lost = 0

    def _reopen(self) -> None:
        """Somebody removed the file, or the whole folder."""
        old = self._handle
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        os.close(old)  # not before: where there is no new file, its number must not become another file's
        self.trouble = f"{self.path} was removed: a new one is begun"

    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # a line that is lost is told by `write`
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def _replace_text(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def rewind(out_dir: Path, sizes: Mapping[str, int]) -> None:
    """Take back what was logged after a checkpoint: its metrics are cut, its decisions and operations marked void.

    Args:
        sizes: bytes of each file when the checkpoint was made (`Reporter.sizes`).
    """
    metrics = out_dir / METRICS
    if metrics.exists() and metrics.stat().st_size > sizes.get(METRICS, 0):
        os.truncate(metrics, sizes.get(METRICS, 0))
    _mark_void(out_dir / EVENTS, sizes.get(EVENTS, 0), _COURSE)


def _mark_void(path: Path, size: int, kinds: Container[str]) -> None:
    """Mark the lines of these kinds that come after the first `size` bytes."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept, tail = data[:size], data[size:]
    lines = []
    for line in tail.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the piece of a line that a crash left
        if isinstance(record, dict) and record.get("kind") in kinds:
            record["void"] = True
        lines.append(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    if tail:
        _replace_text(path, kept + b"".join(lines))


class Silent:
    """The reporter of every rank but the first."""

    def event(self, kind: str, **fields: Any) -> None: ...

    def metrics(self, kind: str, **fields: Any) -> None: ...

    def say(self, text: str) -> None: ...

    def progress(self, iteration: int, **shown: Any) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}

    def void_since(self, sizes: Mapping[str, int]) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class Reporter(Silent):
    """Writes the run folder's JSON lines, the console and, when asked, W&B.

    Args:
        out_dir: the run folder, or None to write no files (eval_only).
        total_iters: length of the progress bar.
        log_file: where the console's lines go too, or None.
        wandb_run: an initialised W&B run, or None.
    """

    def __init__(
        self,
        out_dir: Path | None,
        total_iters: int,
        start_iter: int,
        log_file: Path | None,
        wandb_run: Any = None,
    ) -> None:
        self._lines = {name: JsonLines(out_dir / name) for name in (METRICS, EVENTS)} if out_dir else {}
        self._wandb = wandb_run
        self._log: TextIO | None = None
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log_file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed in close)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_iters, initial=start_iter, unit="it", dynamic_ncols=True)

    def event(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, **fields}
        record.setdefault("time", time.time())
        self._write(EVENTS, record)
        if EVENTS in self._lines:
            self._lines[EVENTS].sync()
        if self._wandb is not None and kind == "operation":
            shown = {f"operation/{name}": value for name, value in fields["settings_after"].items()}
            self._wandb.log({name: v for name, v in shown.items() if isinstance(v, int | float)}, step=fields["iter"])

    def metrics(self, kind: str, **fields: Any) -> None:
        self._write(METRICS, {"kind": kind, **fields})
        if self._wandb is not None:
            flat = {name: v for name, v in clean(fields).items() if isinstance(v, int | float)}
            self._wandb.log({f"{kind}/{name}": v for name, v in flat.items() if name != "iter"}, step=fields["iter"])

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        """A line in one of the files; what is wrong with a file is told once, and the run goes on."""
        lines = self._lines.get(name)
        if lines is None:
            return
        lines.write(record)
        if lines.trouble:
            told, lines.trouble = lines.trouble, ""
            self.say(f"warning: {told}")
            if not lines.lost:
                self.event("error", message=told, action="go on")

    def say(self, text: str) -> None:
        """One line for a person."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        if self._log is not None:
            self._log.write(text + "\n")

    def progress(self, iteration: int, **shown: Any) -> None:
        """The state of the run, on the bar of a terminal or as a plain line."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in shown.items()), refresh=False)
            self._bar.n = iteration  # set, not added to: a run can go back
            self._bar.refresh()
            if self._log is not None:
                self._log.write(_line(iteration, shown) + "\n")
        else:
            self.say(_line(iteration, shown))

    def sizes(self) -> dict[str, int]:
        for lines in self._lines.values():
            lines.sync()
        return {name: lines.size() for name, lines in self._lines.items()}

    def void_since(self, sizes: Mapping[str, int]) -> None:
        """Mark what was measured and decided after a checkpoint as void: the run has gone back to it."""
        for name, lines in list(self._lines.items()):
            lines.close()
            _mark_void(lines.path, sizes.get(name, 0), ("train", "eval") if name == METRICS else _COURSE)
            self._lines[name] = JsonLines(lines.path)

    def close(self, exit_code: int = 0) -> None:
        if self._bar is not None:
            self._bar.close()
        for lines in self._lines.values():
            lines.close()
        self._lines = {}
        if self._log is not None:
            self._log.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


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


def check_wandb() -> str:
    """Why W&B cannot be logged to, or nothing. Asks for a key where there is a terminal and none is known."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return ""
    try:
        wandb.login()
    except wandb.Error as error:
        return f"wandb_log: {error} (or set WANDB_MODE=offline)"
    return ""


def start_wandb(project: str, name: str, run_id: str | None, config: Mapping[str, Any], folder: Path) -> Any:
    """A W&B run; with the id of an earlier one, that run continued. Raises Refused."""
    import wandb

    try:
        return wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            config=dict(config),
            dir=str(folder),
        )
    except wandb.Error as error:
        raise Refused(f"wandb_log: {error} (or set WANDB_MODE=offline)") from error
