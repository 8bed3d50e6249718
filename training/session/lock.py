"""The lock of a run folder: one job at a time writes to it, and the lock dies with its owner.

It is taken before anything in the folder is read, because the job that holds it removes what it needs no more. A folder
that does not exist yet is not made for it: that waits until nothing can be refused any more. Linux and macOS only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import checkpoint


class FolderLock:
    """The right to write to a run folder, for as long as this process lives or until `release`."""

    def __init__(self, out_dir: str | Path) -> None:
        self.out_dir = Path(out_dir)
        self._handle = -1

    def take_if_used(self) -> str:
        """`take` where there is something of a run; returns why it is not to be had, or nothing."""
        path = self.out_dir / ".lock"
        return self.take() if path.exists() or checkpoint.folder(self.out_dir).exists() else ""

    def take(self) -> str:
        """Take the lock unless it is held already; returns why it is not to be had, or nothing."""
        if self._handle >= 0:
            return ""
        handle = -1
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.out_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            with tempfile.TemporaryFile(dir=self.out_dir):
                pass  # an old lock may be writable in a folder that is not
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            return f"out_dir {self.out_dir}: cannot be written to ({error.strerror})"
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return f"out_dir {self.out_dir}: another job is running in it"
        except OSError:
            pass  # a file system without locks: as it was before there was one
        self._handle = handle
        return ""

    def renew(self) -> str:
        """After somebody removed the folder: hold the lock of the new one; returns why that is not to be had."""
        old = self._handle
        if old < 0 or (self.out_dir / ".lock").exists() and os.fstat(old).st_nlink:
            return ""
        self._handle = -1
        if problem := self.take():
            self._handle = old
            return problem
        os.close(old)
        return ""

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@contextlib.contextmanager
def lock_for_serving(source: str | Path) -> Iterator[None]:
    """The right to serve the models of a folder or file: one process at a time. It dies with its owner.

    Nothing is written, and a run goes on training beside it. Raises Refused.
    """
    try:
        handle = os.open(source, os.O_RDONLY)
    except OSError:  # the name of a release, or what cannot be read: others say so
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Refused(f"{source}: another process serves it already") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)
