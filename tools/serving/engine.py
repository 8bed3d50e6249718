"""The one thread that computes: rows of many requests, a token each at every step, joined and left at any step.

A row is one text that is written. Rows of a model go on together in one batch, and a row that comes takes a free slot
of it. Rows that find none wait in the order in which they came. What a row says follows from its model, its prompt and
its seed, not from the rows beside it. The thread knows nothing of HTTP: it tells what it found through `tell`.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from orchestrate.model.generate import Choice, Continuation
from orchestrate.tools.serving.models import Loaded
from orchestrate.training.session.texts import Text

End = Literal["", "stop", "length", "broken", "failed", "stopping", "dropped"]
"""Why a row ended: a stop or an end of text; its room; logits that are not finite; an error; the server's end; nobody
wants it any more. Empty: it goes on."""


class Piece(NamedTuple):
    """What is new of a row."""

    text: str
    tokens: int
    """Generated so far."""
    end: End


@dataclass(eq=False)
class Row:
    """One text that is written.

    Attributes:
        seed: of its random numbers.
        room: how many tokens it may have at most, 1 or more.
        text: what has been written; it is empty at first.
        whole: tell it in one piece, when it has ended: what is told wakes the other thread, which costs both time.
    """

    loaded: Loaded
    prompt: Sequence[int]
    choice: Choice
    seed: Sequence[int]
    room: int
    text: Text
    whole: bool = False
    tokens: int = 0
    dropped: bool = field(default=False, init=False)


Told = list[tuple[Row, Piece]]


class Engine:
    """Writes rows.

    Args:
        slots: rows of each model at once.
        tell: called on this thread with what is new after every step. A row's last piece has an `end`, and comes once.
    """

    def __init__(self, slots: int, tell: Callable[[Told], None]) -> None:
        self._slots, self._tell = slots, tell
        self._writing: dict[Loaded, dict[int, Row]] = {}
        """The rows of each model by their numbers in its continuation."""
        self._waiting: list[Row] = []
        self._condition = threading.Condition()
        self._new: list[Row] = []
        self._drops = self._ended = False
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, rows: Sequence[Row]) -> None:
        """Write these too."""
        with self._condition:
            if not self._ended:
                self._new += rows
                self._condition.notify()
                return
        self._tell([(row, Piece("", 0, "stopping")) for row in rows])

    def drop(self, rows: Sequence[Row]) -> None:
        """Nobody wants these any more. Each that has not ended ends before the next step."""
        with self._condition:
            for row in rows:
                row.dropped = self._drops = True
            self._condition.notify()

    def stop(self, seconds: float) -> None:
        """Begin no row any more, and end those that are written after so many seconds. Does not wait for it."""
        with self._condition:
            self._stop_at = time.monotonic() + seconds
            self._condition.notify()

    @property
    def alive(self) -> bool:
        """Whether rows are written."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(seconds)
        return not self.alive

    def _run(self) -> None:
        while self._round():
            pass  # a round's values are gone before the next one waits: a model may have to leave memory

    def _round(self) -> bool:
        """Wait until there is something to do, and do one step of it; False when all is over."""
        with self._condition:
            while not (self._new or self._drops or self._writing or self._waiting or self._stop_at is not None):
                self._condition.wait()
            self._waiting += self._new
            self._new, drops, self._drops = [], self._drops, False
            stop_at = self._stop_at
            if stop_at is not None and not self._writing and not self._waiting:
                self._ended = True
                return False
        told: Told = []
        if drops:
            self._end(lambda row: row.dropped, "dropped", told)
        if stop_at is not None:
            late = time.monotonic() >= stop_at
            begun = {row for rows in self._writing.values() for row in rows.values()}
            self._end(lambda row: late or row not in begun, "stopping", told)
        for row in self._waiting:
            self._writing.setdefault(row.loaded, {})
        for loaded, rows in list(self._writing.items()):
            try:
                self._step(loaded, rows, told)
            except Exception:  # what one model does wrong must not end what others are asked for
                print(traceback.format_exc(), file=sys.stderr, flush=True)
                loaded.continuation = None
                failed = [*rows.values(), *(row for row in self._waiting if row.loaded is loaded)]
                self._waiting = [row for row in self._waiting if row.loaded is not loaded]
                rows.clear()
                told += [(row, Piece("", row.tokens, "failed")) for row in failed]
            if not rows:
                del self._writing[loaded]
        if told:
            self._tell(told)
        return True

    def _end(self, which: Callable[[Row], bool], why: End, told: Told) -> None:
        """End some rows, waiting ones too."""
        ended = [row for row in self._waiting if which(row)]
        self._waiting = [row for row in self._waiting if not which(row)]
        for loaded, rows in self._writing.items():
            for number, row in list(rows.items()):
                if which(row):
                    loaded.continuation.end(number)
                    ended.append(rows.pop(number))
        told += [(row, Piece("", row.tokens, why)) for row in ended]

    def _step(self, loaded: Loaded, rows: dict[int, Row], told: Told) -> None:
        """One more token for each row of a model, those that have just found a slot included."""
        if loaded.continuation is None:
            loaded.continuation = Continuation(loaded.model, self._slots)
        going = loaded.continuation
        for row in [row for row in self._waiting if row.loaded is loaded][: self._slots - len(rows)]:
            rows[going.add(row.prompt, row.choice, row.seed)] = row
            self._waiting.remove(row)
        if not rows:  # all of them were ended
            return
        with loaded.autocast():
            drawn = going.step()
        for number, token in drawn.items():
            row = rows[number]
            row.tokens += 1
            end: End = ""
            if token < 0:
                end = "broken"
            else:
                row.text.add(token)
                if row.text.ended:
                    end = "stop"
                elif row.tokens >= row.room:
                    row.text.end()
                    end = "length"
            if end:
                going.end(number)
                del rows[number]
            new = row.text.take() if end or not row.whole else ""
            if new or end:
                told.append((row, Piece(new, row.tokens, end)))
