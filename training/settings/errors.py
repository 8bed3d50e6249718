"""The one exception that means "refused": bad input, told to a person, exit code 2, nothing lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator


class Refused(ValueError):
    """Input that is not accepted. Carries every problem found, one clear sentence each.

    Each problem names the place, what was given and what is allowed. The entry scripts print them on standard
    error without a traceback and exit with code 2.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RefusedHere(Refused):
    """Input that one rank alone has met, in the middle of a run: this rank tells it, whichever it is."""


class ScheduleError(Refused):
    """An operation that cannot be applied to the settings it meets (raised by `Operation.plan`)."""


class OperationFailed(RuntimeError):
    """An operation failed on at least one rank; the run is as it was before. Raised on every rank."""


class RanksDisagree(RuntimeError):
    """The ranks' states differ after an operation. Never recoverable by going on."""


class Stopped(RuntimeError):
    """The run cannot or shall not go on. Raised on every rank at the same place, so they can still save together."""


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Tell a person of input that data/ or model/ did not accept (ValueError) as of any other refusal."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        raise Refused(str(error)) from error
