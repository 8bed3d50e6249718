"""Ends that are asked for from outside: signals. A signal sets a flag; the ranks agree on it at a step boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from orchestrate.training.run.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches torchrun and its workers, and torchrun passes it on: within this time it is the same one.
SAME_PRESS_SECONDS = 2.0


class SignalWatch:
    """Remembers the first signal of this process and agrees with the other ranks on it.

    It listens from the start on, before there are ranks: a signal that comes while a run is being set up is acted on
    at its first boundary. A second SIGINT, pressed later than torchrun's echo of the first, quits at once without
    saving.

    Attributes:
        ranks: to be set before the first poll.
    """

    ranks: Ranks

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._agreed = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[SignalWatch]:
        """Handle SIGTERM, SIGINT and SIGUSR1 inside this block."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received and number == signal.SIGINT and now - self._received_at > SAME_PRESS_SECONDS:
            os._exit(128 + number)
        if not self._received:
            self._received, self._received_at = number, now

    def poll(self) -> int:
        """The signal that all ranks agree to end on, or 0. Every rank must poll equally often."""
        if not self._agreed:
            self._agreed = self.ranks.exchange_later(int(self._received))
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
