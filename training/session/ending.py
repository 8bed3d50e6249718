"""How a start ends: why, where, what never fired, where it is saved, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Stopped
from orchestrate.training.settings.records import Progress
from orchestrate.training.store import checkpoint

if TYPE_CHECKING:
    from orchestrate.training.session.session import Session


def by_signal(session: Session, number: int) -> None:
    """Record and tell the end by a signal; the state is saved."""
    best = session.run.progress.best_val_loss
    session.event("end", reason=f"signal {number}", best_val_loss=best, not_fired=_not_fired(session))
    tell(session, signal.Signals(number).name)


def by_error(session: Session, error: Exception) -> None:
    """Tell the end by an exception; what could be saved is."""
    why = str(error) if isinstance(error, Stopped) else f"an error ({type(error).__name__})"
    tell(session, why)


def finished(config: TrainConfig, progress: Progress) -> str:
    """That a run which is gone on with has come to its end, and what to change; nothing where it has not."""
    patience, seen = config.early_stopping_patience, progress.evals_without_gain
    if progress.iter >= config.max_iters:
        return (
            f"the run has finished: it is at iteration {progress.iter}, and max_iters is {config.max_iters}; "
            f"--max_iters=N (N above {progress.iter}) goes on"
        )
    if 0 < patience <= seen:
        return (
            f"the run was stopped early, after {seen} values of {progress.stopping_metric} without a gain, and will be "
            f"at the next one; --early_stopping_patience=N (N above {seen}; 0: never stop early) goes on"
        )
    return ""


def by_itself(session: Session, reason: str) -> None:
    """Record and tell the end of a run, for a reason of `Session.why_end`; the state is saved."""
    p, limit = session.run.progress, session.config.max_iters
    session.event("end", reason=reason, best_val_loss=p.best_val_loss, not_fired=_not_fired(session))
    more = ""
    if reason == "max_iters":
        reason, more = f"max_iters {limit} is reached", f"--max_iters=N (N above {p.iter})"
        if p.iter == session.began_at > 0:
            reason = f"nothing was left to train, because max_iters {limit} was reached before"
    elif reason.startswith("early stop"):
        more = "--early_stopping_patience=N (0: never stop early)"
    tell(session, reason, more)


def tell(session: Session, why: str, more: str = "") -> None:
    """Two lines for a person. `more`: the keys without which a resume would soon end again."""
    if not session.run.ranks.is_first:
        return
    p, say = session.run.progress, session.reporter.say
    facts = [f"ended at iteration {p.iter}: {why}"]
    if p.best_val_loss is not None:
        facts.append(f"best validation loss {p.best_val_loss:.4f} at iteration {p.best_iter}")
    if missed := _not_fired(session):
        facts.append(f"{'entry' if len(missed) == 1 else 'entries'} {ranges(missed)} never fired")
    facts += session.orchestrator.kept_waiting()
    say("; ".join(facts))
    saved = checkpoint.find(session.config.out_dir)
    say(f"saved: {saved[0]}; to go on: {command(session)} {more}".rstrip() if saved else "nothing is saved")


def _not_fired(session: Session) -> list[int]:
    """Numbers of the entries that never fired, or not in each of their rounds."""
    return sorted({entry.number for entry in session.orchestrator.missed()})


def ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def command(session: Session) -> str:
    """What a person types to resume this run, in the way in which it was started."""
    is_script, ranks = Path(sys.argv[0]).name == "train_orchestrated.py", session.run.ranks
    if ranks.world_size > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world_size))
        alone = "--standalone " if here == str(ranks.world_size) else "... "  # on several machines: as it was given
        start = f"torchrun {alone}--nproc_per_node={here} {sys.argv[0] if is_script else '-m orchestrate train'}"
    else:
        start = f"python {sys.argv[0]}" if is_script else "orchestrate train"
    own = "".join(f" --operations {shlex.quote(str(file.path))}" for file in session.operations)
    return f"{start} --init_from=resume --out_dir={shlex.quote(session.config.out_dir)}{own}"
