"""The run folder's logs: what each line of metrics.jsonl and events.jsonl says, its one writer and its one reader.

A line is one JSON object, written in one piece, so a crash leaves it whole or absent. Numbers are finite or null. What
a crash or going back made void is cut or marked `"void": true`. `read_run` reads a whole run folder; it changes
nothing, may read while a run writes, and counts what it cannot make out. Nothing here knows torch.
"""

# Without `from __future__ import annotations`: a TypedDict could not tell which of its keys are required.

import contextlib
import errno
import heapq
import json
import math
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.metrics import is_metric
from orchestrate.training.store import manifest

METRICS, EVENTS, CONFIG, SCHEDULE = "metrics.jsonl", "events.jsonl", "config.json", "schedule.yaml"
LONGEST_LINE = 2**24
"""Bytes. A longer line is none of ours."""
MOST_LINES = 10**6
"""Of one file; a reader that wants more says so."""

_Count = Annotated[int, Field(ge=0)]
_Real = Annotated[float, Field(allow_inf_nan=False)]
_Number = _Real | None
"""Finite; null where it was not, or where it could not be had."""


# ---------------------------------------------------------------------------------------------- metrics


class _Metrics(TypedDict):
    """What every line of metrics.jsonl has. More numbers may stand beside these under names of their own."""

    iter: _Count
    """Optimizer steps done."""
    tokens: _Count
    """Tokens trained on, over all ranks and starts."""
    seconds: _Real
    """Wall-clock seconds spent in this run, over all its starts."""
    lr: NotRequired[_Real]
    """The learning rate that the next step will use."""
    batch_size: NotRequired[int]
    """Sequences in one micro-step on one rank."""
    grad_accum: NotRequired[int]
    """Micro-steps in one iteration, over all ranks."""
    sequence_length: NotRequired[int]
    """Tokens in one training sequence."""
    passes: NotRequired[_Real]
    """How often the training data has been seen."""
    coverage: NotRequired[_Real]
    """The share of the training data's windows seen at least once, 0 to 1."""
    void: NotRequired[bool]
    """True: the run went back to before this line."""


class Train(_Metrics):
    """One training step, every log_interval iterations."""

    kind: Literal["train"]
    loss: _Number
    """Mean loss of the step's tokens in nats, over all ranks."""
    grad_norm: NotRequired[_Number]
    """Norm of all gradients together, before clipping."""
    step_lr: NotRequired[_Real]
    """The learning rate that the step used."""
    tokens_per_second: NotRequired[_Number]
    """Since the line before, over the time spent in steps."""
    seconds_by_part: NotRequired[dict[str, _Real]]
    """Seconds since the line before in data, forward_backward, optimizer, eval, operation, checkpoint."""
    machine: NotRequired[dict[str, _Number]]
    """Rank 0: host_memory, device_memory and device_memory_peak in bytes; host_memory_percent, cpu_percent,
    gpu_percent."""


class Eval(_Metrics):
    """One evaluation."""

    kind: Literal["eval"]
    val_loss: _Number
    """Mean loss of the validation windows in nats per token."""
    val_bpb: NotRequired[_Number]
    """The same loss in bits per byte of the text, where the tokenizer of the data is at hand."""
    best_val_loss: NotRequired[_Number]
    """The lowest so far."""
    # Scores of eval_tasks stand beside these under their own names, such as eval/adder_accuracy; and rank/attn,
    # rank/mlp and embedding/... of an analysis.
    attention_entropy: NotRequired[_Number]
    """Of an analysis (analyze_interval), as what follows to grad_noise_ratio: docs/analysis.md."""
    drift: NotRequired[_Number]
    """How far the weights moved since the last analysis, as a share of their norm then."""
    update_ratio: NotRequired[_Number]
    """The norm of the last step's update of matrices, as a share of theirs."""
    grad_norm_by_layer: NotRequired[dict[str, _Number]]
    """Of the last step, before clipping: leaf layer -> norm of the gradients of its matrices."""
    update_ratio_by_layer: NotRequired[dict[str, _Number]]
    """Leaf layer -> update_ratio of its matrices."""
    grad_noise_scale: NotRequired[_Number]
    """In tokens."""
    grad_noise_ratio: NotRequired[_Number]
    """The same, divided by tokens of an iteration."""
    why: NotRequired[str]
    """Of an extra evaluation around an operation, which does not count as best: its reason."""


# ---------------------------------------------------------------------------------------------- events


class _Cast(TypedDict):
    """Frozen weights that changed their number type."""

    rounded: int
    """How many were rounded to bfloat16."""
    error: _Real
    """Root mean square of what that changed, as a share of that of the weights."""
    widened: int
    """How many are float32 again, with the values that they had."""


class _Event(TypedDict):
    """What every line of events.jsonl has."""

    iter: _Count
    """Optimizer steps done."""
    time: _Real
    """Seconds since 1970, UTC."""
    void: NotRequired[bool]
    """True: the run went back to before this decision, operation, these samples or rollback."""


class _Code(TypedDict):
    """The checkout that ran."""

    commit: str
    """Of git, in hexadecimal digits."""
    clean: bool | None
    """Whether no file that git follows was changed; null where that could not be told soon."""


class _OfEntry(_Event):
    """Beside an entry's number: which of its rounds, where."""

    track: NotRequired[str]
    """Where the schedule has several: the name of its track."""
    round: NotRequired[int]
    """Where it is repeated: which time this is, from 1."""
    rounds: NotRequired[int]
    """Where it is repeated: how often at most."""
    step: NotRequired[int]
    """Its place in its track, every round counted, from 1; absent where that is its number."""


class _Begins(_Event):
    config: dict[str, Any]
    """The resolved configuration."""
    settings: dict[str, Any]
    """What the run is now: every field of Settings."""
    world_size: int
    """Processes."""
    device: str
    """Of the first rank."""
    dtype: str
    """Of the forward pass; weights that train and moments are float32."""
    torch: str
    """Its version."""
    python: str
    """Its version."""
    parameters_total: int
    """Of the model, shared ones once."""
    parameters_trainable: int
    """Those of them that train."""
    tokens_per_iter: int
    """In one iteration, over all ranks."""
    cast: NotRequired[_Cast]
    """Where weights changed their number type at the start."""
    code: NotRequired[_Code | None]
    """The project's version; null where it does not run from a git checkout."""
    operations: NotRequired[list[dict[str, str]]]
    """Files of the user's own operations: "file", its name, and "sha256"."""


class Start(_Begins):
    """A run begins."""

    kind: Literal["start"]
    parent: NotRequired[dict[str, Any]]
    """Of a run that begins with the weights of another: run, its folder; checkpoint; iter, tokens, val_loss of that."""


class Resume(_Begins):
    """A run goes on from a checkpoint."""

    kind: Literal["resume"]
    checkpoint: str
    """Path of its folder."""
    problems: list[str]
    """What is wrong with checkpoints that were passed over."""
    set_aside: list[str]
    """Where these lie now."""


class Override(_Event):
    """A key given at a resume that differs from what the run was started with, or from what is in force."""

    kind: Literal["override"]
    key: str
    """Of the configuration; schedule; or operations with a file's name."""
    before: Any
    """What was in force."""
    after: Any
    """What is."""
    applied: bool
    """Whether it took effect."""
    reason: str
    """Where it was given, or why it was not applied."""


class Decision(_OfEntry):
    """The schedule decides: an entry fires, a repetition or a guard ends, a ramp arrives or is taken over.

    At the end of a guard also METRIC_before and METRIC, numbers of the metric that it watches, val_loss by default:
    before its entry, and now.
    """

    kind: Literal["decision"]
    entry: int
    """Number of the entry in the schedule, from 1."""
    name: str
    """Of its operation."""
    reason: str
    """Why it fires, or what has ended."""
    limit: NotRequired[_Number]
    """What the guard allows at most."""


class Operation(_OfEntry):
    """An operation was carried out."""

    kind: Literal["operation"]
    entry: int | None
    """Number of the entry, from 1; null where it is a recovery and no entry."""
    name: str
    """Of the operation."""
    value: Any
    """Its argument as given."""
    reason: str
    """Why it fired."""
    desc: str
    """The entry's own words."""
    over: int | None
    """Iterations over which the value moves there; null: at once."""
    settings_before: dict[str, Any]
    """Dotted field of Settings: value, of the fields that it changed."""
    settings_after: dict[str, Any]
    """Likewise, once every ramp has arrived."""
    val_loss_before: _Number
    """Where measured (reevaluate, guard), else null."""
    val_loss_after: _Number
    """Likewise."""
    seconds: _Real
    """That the operation took, without evaluations."""
    parameters_total: int
    """Of the model after it."""
    parameters_trainable: int
    """Those of them that train."""
    cast: NotRequired[_Cast]
    """Where weights changed their number type (weights_dtype)."""


class Text(TypedDict):
    """One of sample_prompts."""

    prompt: str
    """As it was given."""
    text: str
    """It and what the model makes of it."""


class Samples(_Event):
    """After an evaluation: how the model continues sample_prompts, with the same random numbers every time."""

    kind: Literal["samples"]
    texts: list[Text]
    """One for each of them."""


class Checkpoint(_Event):
    """A checkpoint was written."""

    kind: Literal["checkpoint"]
    path: str
    """Of its folder, from the run folder."""
    reason: str
    """Why it was saved."""
    seconds: _Real
    """That writing it took."""


class Emergency(_Event):
    """After an exception: a checkpoint was written, or could not be."""

    kind: Literal["emergency"]
    reason: str
    """The exception, or why there is no checkpoint."""
    path: NotRequired[str]
    """As of a checkpoint; absent where none was written."""
    seconds: NotRequired[_Real]
    """Likewise."""
    saved: NotRequired[bool]
    """False where none was written."""


class Rollback(_OfEntry):
    """The run went back to a checkpoint; `iter` is where it is now.

    After a guard also METRIC_before and METRIC: before the entry, and the number that was beyond the limit.
    """

    kind: Literal["rollback"]
    reason: str
    """What was wrong."""
    from_iter: int
    """Where it was."""
    checkpoint: str
    """Name of its folder."""
    next_sample: NotRequired[int]
    """After a sick step: index of the training sample that comes next."""
    problems: NotRequired[list[str]]
    """After a sick step: what is wrong with newer checkpoints."""
    set_aside: NotRequired[list[str]]
    """Where these lie now."""
    entry: NotRequired[int]
    """Of a guard: the entry that was taken back."""
    name: NotRequired[str]
    """Its operation."""


class Signal(_Event):
    """All ranks agreed to end on a signal."""

    kind: Literal["signal"]
    signal: int
    """Its number."""


class Error(_OfEntry):
    """Something went wrong; `action` or `on_error` say how the run went on, if it did."""

    kind: Literal["error"]
    message: str
    """What."""
    action: NotRequired[str]
    """skip, rollback or stop after a sick step; go on after a failed write."""
    samples: NotRequired[list[int]]
    """Of a sick step: first training sample, and the one after the last."""
    entry: NotRequired[int]
    """Of an operation that failed."""
    name: NotRequired[str]
    """Likewise."""
    on_error: NotRequired[str]
    """stop or skip, as the entry says."""


class End(_Event):
    """A start of the run ended as it should; `reason` says why."""

    kind: Literal["end"]
    reason: str
    """max_iters, an early stop, the schedule or a signal."""
    best_val_loss: _Number
    """The lowest so far; null where none was measured."""
    not_fired: NotRequired[list[int]]
    """Numbers of the schedule's entries that did not fire, or not in each of their rounds."""


METRICS_KINDS: Mapping[str, Any] = {"train": Train, "eval": Eval}
EVENT_KINDS: Mapping[str, Any] = {
    "start": Start, "resume": Resume, "override": Override, "decision": Decision, "operation": Operation,
    "samples": Samples, "checkpoint": Checkpoint, "emergency": Emergency, "rollback": Rollback, "signal": Signal,
    "error": Error, "end": End,
}  # fmt: skip
# Events that describe the run's course: after going back to an earlier state they did not happen. The others (signal,
# error, ...) describe what befell the process, and that stays true.
COURSE = ("decision", "operation", "samples", "rollback")


def event(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A line of events.jsonl, stamped with the time. Raises TypeError where the kind's fields are others."""
    record = {"kind": kind, **fields, "time": time.time()}
    required, optional = EVENT_KINDS[kind].__required_keys__, EVENT_KINDS[kind].__optional_keys__
    if kind in ("decision", "rollback"):
        optional = optional | {key for key in record if is_metric(key.removesuffix("_before"))}
    wrong = (required - record.keys()) | (record.keys() - required - optional)
    if wrong:
        raise TypeError(
            f"event {kind!r}: its fields are declared in run_folder.py; missing or unknown: {sorted(wrong)}"
        )
    return record


# ---------------------------------------------------------------------------------------------- writing


def clean(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class Lines:
    """A text file that grows by whole lines. Where there is no room for one, it is left out and counted.

    Args:
        when_removed: called after the file had to be made anew, because somebody removed it or the whole folder.

    Attributes:
        lost: lines that could not be written since the last one that could.
        trouble: why, or why the file had to be made anew; to be told to a person and reset.
    """

    def __init__(self, path: Path, when_removed: Callable[[], None] = lambda: None) -> None:
        self.path, self._when_removed = path, when_removed
        self.lost, self.trouble = 0, ""
        self._open()
        self._end_partial_line()

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _end_partial_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def write(self, text: str) -> None:
        line = (text + "\n").encode("utf-8")
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
        self._when_removed()

    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def sync(self) -> None:
        with contextlib.suppress(OSError):  # a line that is lost is told by `write`
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(clean(record), ensure_ascii=False)


def write_start(out_dir: Path, config: Mapping[str, Any], schedule: str) -> None:
    """config.json and schedule.yaml of the latest start, each whole or as before."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in ((CONFIG, json.dumps(config, indent=1) + "\n"), (SCHEDULE, schedule or "[]\n")):
        temporary = out_dir / f".{name}"
        temporary.write_text(text, "utf-8")
        os.replace(temporary, out_dir / name)


def rewind(out_dir: Path, sizes: Mapping[str, int], before: Callable[[], None] = lambda: None) -> None:
    """Take back what was logged after a checkpoint: its metrics are cut, its decisions and operations marked void.

    Args:
        sizes: bytes of each file when the checkpoint was made (`Reporter.sizes`).
        before: called before anything is taken back, and not where nothing is.
    """
    metrics = out_dir / METRICS
    longer = metrics.exists() and metrics.stat().st_size > sizes.get(METRICS, 0)
    if longer or _goes_back(out_dir / EVENTS, sizes.get(EVENTS, 0)):
        before()
    if longer:
        os.truncate(metrics, sizes.get(METRICS, 0))
    mark_void(out_dir / EVENTS, sizes.get(EVENTS, 0), COURSE)


def mark_void(path: Path, size: int, kinds: Container[str]) -> None:
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
        write_whole(path, kept + b"".join(lines))


def _goes_back(path: Path, size: int) -> bool:
    """Whether lines after the first `size` bytes are to be void and are not yet."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(size)
        records = [_record(line, EVENT_KINDS) for line in file]
    return any(record and record["kind"] in COURSE and not record.get("void") for record in records)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or as before after a crash."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint whose manifest can be read; its files are not looked at."""

    name: str
    """Of its folder under checkpoints/."""
    iter: int
    val_loss: float | None
    """Of this very iteration, in nats per token; None where it was not measured."""
    latest: bool
    best: bool
    """Whether the link of this name points to it."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of its run."""

    folder: Path
    config: Mapping[str, Any] | None
    """config.json as it is; None where there is none that can be read."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl in their order: `Train` and `Eval`. The void ones have "void": True."""
    events: list[dict[str, Any]]
    """Lines of events.jsonl in their order, each of a kind in EVENT_KINDS; likewise."""
    checkpoints: list[SavedCheckpoint]
    """Newest first."""
    foreign: Mapping[str, int]
    """File name: how many of its lines are none of ours. A last line that is still being written does not count."""

    @property
    def valid(self) -> "RunRecord":
        """The same without void lines: each iteration once."""
        metrics, events = ([line for line in lines if not line.get("void")] for lines in (self.metrics, self.events))
        return replace(self, metrics=metrics, events=events)

    @property
    def began_with(self) -> Mapping[str, Any]:
        """The configuration of the run's start; empty where none is told. Starts before it left no checkpoint."""
        return next((event["config"] for event in reversed(self.events) if event["kind"] == "start"), {})


def read_run(
    folder: str | Path, most_lines: int = MOST_LINES, metrics: Callable[[dict[str, Any]], None] | None = None
) -> RunRecord:
    """Read a run folder, of a run under way too.

    Raises Refused for no folder, for a file that cannot be read, or for more lines than wanted.

    Args:
        metrics: takes each line of metrics in the place of `RunRecord.metrics`, which stays empty: for long runs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refused(f"run folder {folder}: there is no such folder")
    found: dict[str, list[dict[str, Any]]] = {METRICS: [], EVENTS: []}
    foreign = dict.fromkeys(found, 0)
    for name, kinds in ((METRICS, METRICS_KINDS), (EVENTS, EVENT_KINDS)):
        take = metrics if metrics is not None and name == METRICS else found[name].append
        try:
            for number, record in read_lines(folder / name, kinds):
                if number > most_lines:
                    raise Refused(f"{folder / name}: more than {most_lines} lines")
                if record is None:
                    foreign[name] += 1
                else:
                    take(record)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused(f"{folder / name}: cannot be read ({error.strerror})") from None
    return RunRecord(folder, read_config(folder), found[METRICS], found[EVENTS], _checkpoints(folder), foreign)


def valid_lines(folder: Path, sizes: Mapping[str, int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of both files that count, by iteration; those of metrics first.

    Args:
        sizes: bytes of each file that are passed over.
    """

    def of(name: str, kinds: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = read_lines(folder / name, kinds, (sizes or {}).get(name, 0))
            yield from (line for _, line in lines if line and not line.get("void"))

    return heapq.merge(of(METRICS, METRICS_KINDS), of(EVENTS, EVENT_KINDS), key=lambda line: line["iter"])


def read_lines(path: Path, kinds: Mapping[str, Any], skip: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, record) of each line; None for what is no line of these kinds. Raises OSError.

    A last line without an end is passed over unless it is a record: a run may be writing it.

    Args:
        skip: bytes at the beginning that are passed over.
    """
    with open(path, "rb") as file:
        file.seek(skip)
        number = 0
        while line := file.readline(LONGEST_LINE):
            number, whole = number + 1, line.endswith(b"\n")
            record = _record(line, kinds)
            if not whole and len(line) == LONGEST_LINE:
                record = None
                while not whole and (rest := file.readline(LONGEST_LINE)):
                    whole = rest.endswith(b"\n")
            if whole or record is not None:
                yield number, record


def _record(line: bytes, kinds: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=_no_constant)
        _adapter(kinds[record["kind"]]).validate_python(record, strict=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json; None where there is none that can be read."""
    try:
        with open(folder / CONFIG, "rb") as file:
            config = json.loads(file.read(LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _checkpoints(folder: Path) -> list[SavedCheckpoint]:
    pointed = {}
    for link in ("latest", "best"):
        with contextlib.suppress(OSError):
            pointed[link] = os.readlink(manifest.folder(folder) / link)
    return [
        SavedCheckpoint(
            path.name, saved.iter, saved.val_loss, *(pointed.get(link) == path.name for link in ("latest", "best"))
        )
        for path, saved in manifest.survey(folder)
        if isinstance(saved, manifest.Manifest)
    ]
