"""Checkpoints of a run: when one is written, by whom, in the background or not, and the one after an exception."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate.training.run import out_of_memory
from orchestrate.training.run.out_of_memory import is_out_of_memory
from orchestrate.training.settings.errors import Stopped
from orchestrate.training.store import checkpoint

if TYPE_CHECKING:
    from orchestrate.training.session.session import Session


class BackgroundSave:
    """A checkpoint that a thread is writing."""

    def __init__(self, write: Callable[..., Path], why: str) -> None:
        self.why, self.seconds = why, 0.0
        self._write = write
        self._path: Path | None = None
        self._error: Exception | None = None
        # A daemon: after an exception on one rank a sharded save may never end, and the process must.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            self._path = self._write()
        except Exception as error:  # told when the save is waited for
            self._error = error
        self.seconds = time.perf_counter() - started

    def wait(self) -> tuple[Path | None, Exception | None]:
        """The checkpoint's folder, or why there is none."""
        self._thread.join()
        return self._path, self._error


class Saver:
    """Writes the checkpoints of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._saved: tuple[Any, ...] = ()
        self._background: BackgroundSave | None = None

    def save(self, why: str, required: bool = True, mark: str = "") -> str:
        """Save a checkpoint (rank 0, or every rank its shards) and return its name, which ends in `mark`.

        Where it could not be written, every rank raises Stopped; or, when it is not `required`, the run says so
        and goes on with the checkpoint before, which is not touched until a new one is whole.
        """
        run, name, error = self.session.run, "", None
        assert not run.diagnosis.pending, "what is saved must be known to be healthy: settle first"
        self.session.tick()
        with run.stopwatch.part("checkpoint"):
            self.finish()
            writes = run.ranks.is_first or run.ranks.sharded
            if self.session.config.async_save and not required:
                if writes:
                    self._background = BackgroundSave(self._snapshot(copied=True), why)
                return ""
            if writes:
                try:
                    name = self._write(why, mark=mark)
                except OSError as caught:
                    error = f"checkpoint at iteration {run.progress.iter} could not be written: {caught}"
            name, error = run.ranks.broadcast((name, error))
        if error and required:
            raise Stopped(error)
        if error:
            self.session.event("error", message=error, action="go on")
            self.session.reporter.say(f"warning: {error}; the run goes on with the checkpoint before")
            return ""
        self._saved = self._moment()
        return name

    def save_unless_saved(self, why: str, required: bool = True) -> None:
        """Save unless this very state of the run is on the disk."""
        if self._saved != self._moment():
            self.session.save(why, required)

    def _moment(self) -> tuple[Any, ...]:
        """What tells two states of the run apart: the iteration, the evaluation made, the entries fired."""
        p, position = self.session.run.progress, self.session.orchestrator.position
        queues = [(queue.fired, queue.open) for queue in position.queues.values()]
        return p.iter, p.last_eval_iter, queues, position.round_iter

    def finish(self) -> None:
        """Wait for a save in the background and record how it ended; a rank that writes nothing need not know."""
        if self._background is None:
            return
        save, self._background = self._background, None
        path, error = save.wait()
        if path is not None:
            self._record(path, "checkpoint", save.why, save.seconds)
        else:
            self.session.event("error", message=f"a checkpoint could not be written: {error}", action="go on")
            self.session.reporter.say(f"warning: a checkpoint could not be written: {error}")

    def _snapshot(self, copied: bool) -> Callable[..., Path]:
        """Writes this very state when called; with `copied` it may be called while the run goes on."""
        run, config = self.session.run, self.session.config
        model = {name: p.detach() for name, p in run.model.named_parameters()}
        optimizer = run.optimizer.state_by_name()
        if copied:
            model = {name: p.to("cpu", copy=True) for name, p in model.items()}
            optimizer = {n: {k: v.to("cpu", copy=True) for k, v in parts.items()} for n, parts in optimizer.items()}
        return partial(
            checkpoint.save,
            config.out_dir,
            self.session.state(),
            model,
            optimizer,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_every=config.keep_every,
            pinned=self.session.orchestrator.pinned,
            group=run.ranks.saving if run.ranks.sharded else None,
        )

    def _write(self, why: str, kind: str = "checkpoint", mark: str = "") -> str:
        started = time.perf_counter()
        path = self._snapshot(copied=False)(mark=mark)
        self._record(path, kind, why, time.perf_counter() - started)
        return path.name

    def _record(self, path: Path, kind: str, why: str, seconds: float) -> None:
        name = str(path.relative_to(Path(self.session.config.out_dir)))
        self.session.event(kind, path=name, reason=why, seconds=seconds)

    def emergency(self, error: BaseException) -> None:
        """After an exception: save what there is, on rank 0 alone and without talking to the other ranks.

        Where parameters are sharded that cannot be, unless every rank raised the same (`Stopped`).
        """
        run = self.session.run
        if is_out_of_memory(error):
            out_of_memory.note(self.session.config.out_dir, run.settings.batch_size)
        together = run.ranks.sharded and isinstance(error, Stopped)
        if not run.ranks.is_first and not together:
            return
        if run.ranks.sharded and not together:
            # A save under way is not waited for: it needs the other ranks, and one of them may hang.
            self._background = None
            self.session.event("error", message=f"{type(error).__name__}: {error}")
            self.session.event("emergency", saved=False, reason="the other ranks hold parts of the weights")
            return
        self.finish()
        self.session.event("error", message=f"{type(error).__name__}: {error}")
        if not run.consistent:
            self.session.event("emergency", saved=False, reason="the error came while parameters were being written")
            return
        run.diagnosis.take_back()
        if self._saved == self._moment():
            self.session.event("emergency", saved=False, reason="this state is saved already")
            return
        try:
            self._write(f"{type(error).__name__}: {error}", kind="emergency")
            self.session.reporter.say(f"emergency checkpoint at iteration {run.progress.iter}")
        except Exception as second:
            self.session.event("emergency", saved=False, reason=f"{type(second).__name__}: {second}")
