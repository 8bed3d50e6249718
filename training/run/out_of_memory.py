"""Memory that runs out: how it is recognised, and what a start leaves for the next one where it could not help itself.

A rank that runs out of memory while the ranks exchange gradients or weights cannot be joined any more: the job ends.
So that the next start does not end in the same way, the micro-batch that was too large is noted in the run folder.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

_NOTE = "out_of_memory.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "alloc" in text and "memory" in text  # the CPU allocator's own words


def note(out_dir: str | Path, batch_size: int) -> None:
    """Leave word that a micro-batch of so many sequences did not fit; any rank may."""
    with contextlib.suppress(OSError):
        (Path(out_dir) / _NOTE).write_text(json.dumps({"batch_size": batch_size}), "utf-8")


def noted(out_dir: str | Path) -> int | None:
    """The micro-batch that did not fit, or None."""
    try:
        return int(json.loads((Path(out_dir) / _NOTE).read_text("utf-8"))["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def forget(out_dir: str | Path) -> None:
    (Path(out_dir) / _NOTE).unlink(missing_ok=True)
