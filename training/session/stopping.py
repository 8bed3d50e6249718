"""Ends that are asked for from outside: signals.

Before a run's first boundary there is nothing to save, so the first signal ends the process at once. After it a signal
sets a flag, and the ranks agree on it at a step boundary. This file imports nothing heavy: a command listens before it
imports the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches torchrun and its workers, and torchrun passes it on: within this time it is the same one.
SAME_PRESS_SECONDS = 2.0


class Exchange(Protocol):
    """What a signal needs of the ranks (training/run/distributed.py)."""

    def exchange_later(self, flag: int) -> int: ...


class SignalWatch:
    """Ends a start at the first signal; later remembers the first one and agrees with the other ranks on it.

    A second SIGINT, pressed later than torchrun's echo of the first, quits at once without saving.
    """

    _ranks: Exchange | None = None
    """Set by `begin`: from then on a signal is remembered."""

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._agreed = 0
        self._quitting = threading.Lock()

    @contextlib.contextmanager
    def installed(self) -> Iterator[SignalWatch]:
        """Handle SIGTERM, SIGINT and SIGUSR1 inside this block."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler between two steps of the main thread. A start may wait long inside one (for other
        # processes, for a file system); so a thread hears of the signal too.
        listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        heard_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        listener.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(heard_before)
            os.write(writer, b"\0")  # ends the listener
            listener.join()
            os.close(writer)
            os.close(reader)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Inside this block signals do what they do in any Python program: SIGINT raises KeyboardInterrupt."""
        heard = signal.set_wakeup_fd(-1)
        handled = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(heard, warn_on_full_buffer=False)

    def begin(self, ranks: Exchange) -> None:
        """From now on a signal is remembered and acted on at a boundary."""
        self._ranks = ranks

    @property
    def received(self) -> int:
        """The first signal that this process remembers, or 0."""
        return self._received

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1)[0]:
            if number in SIGNALS and self._ranks is None:
                self._quit(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ranks is None:
            self._quit(number)
        now = time.monotonic()
        if self._received and number == signal.SIGINT and now - self._received_at > SAME_PRESS_SECONDS:
            os._exit(128 + number)
        if not self._received:
            self._received, self._received_at = number, now

    def _quit(self, number: int) -> None:
        """End the process here and now. No exception: the code that it would pass through may be anybody's."""
        if not self._quitting.acquire(blocking=False):
            return  # the other of handler and listener is at it
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        told = f"{rank}ended by {signal.Signals(number).name} before there was anything to save\n"
        with contextlib.suppress(OSError):
            os.write(2, told.encode())
        os._exit(128 + number)

    def poll(self) -> int:
        """The signal that all ranks agree to end on, or 0. Every rank must poll equally often."""
        if not self._agreed and self._ranks is not None:
            self._agreed = self._ranks.exchange_later(int(self._received))
        return self._agreed

    @property
    def agreed(self) -> int:
        """What the last poll said, without another exchange."""
        return self._agreed


class NoSignals:
    """Stands in where signals are not watched, e.g. when a library user calls the loop."""

    agreed = 0

    def poll(self) -> int:
        return 0
