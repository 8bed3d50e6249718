"""The command `orchestrate`: a table of its subcommands, and what all of them share.

A command listens for signals before it imports anything heavy, so that Ctrl-C in its first seconds ends it too. Bad
input ends with a message on standard error and exit code 2, a run that cannot go on with a message and exit code 1.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from orchestrate.training.session.stopping import SIGNALS, SignalWatch
from orchestrate.training.settings.errors import Refused, RefusedHere, Stopped

# Each is a module of tools/ with main(arguments, watch) -> exit code.
COMMANDS = {
    "train": "train a model while a schedule changes the run",
    "plan": "check a configuration and its schedule, print the stages, train nothing",
    "sample": "generate text from a run folder, a Hugging Face model or a nanoGPT ckpt.pt",
    "evaluate": "score models by the tasks of lm-eval",
    "chat": "talk to a model in the terminal",
    "serve": "OpenAI's API and a page to chat on, with the checkpoints of a run",
    "watch": "how runs stand, in the terminal, while they train",
    "export": "a model for programs that read Hugging Face folders, for peft, or for nanoGPT",
    "report": "how a run went, or how several compare, as one HTML file",
}


class Alone:
    """A process that has no ranks to agree with."""

    def exchange_later(self, flag: int) -> int:
        return flag


def called(name: str) -> str:
    """How a person calls a subcommand: by the script in the checkout, or by the installed command."""
    script = Path(sys.argv[0]).name
    return script if script in ("train_orchestrated.py", "sample.py") else f"orchestrate {name}"


def script(name: str, arguments: Sequence[str]) -> NoReturn:
    """Run a subcommand and end the process with its exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a model may write what the terminal's encoding does not have
    code = run(name, arguments)
    # torchrun ends the other ranks as soon as one has ended, while they may be about to: their exit code is decided.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def command() -> int:
    """What the installed command and `python -m orchestrate` call."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        script(name, rest)
    if name in ("-h", "--help"):
        print("usage: orchestrate COMMAND ... (each has --help)\n")
        print("\n".join(f"  {name:<8} {line}" for name, line in COMMANDS.items()))
        return 0
    from orchestrate.training.settings.values import nearest

    print(f"error: unknown command {name}{nearest(name, COMMANDS)}", file=sys.stderr)
    return 2


def run(name: str, arguments: Sequence[str]) -> int:
    """A subcommand, with its errors as messages; returns the exit code."""
    if os.name != "posix":
        print(f"error: {sys.platform} is not supported: Linux and macOS are (on Windows: inside WSL)", file=sys.stderr)
        return 2
    watch = SignalWatch()
    with watch.installed():
        try:
            return importlib.import_module(f"orchestrate.tools.{name}").main(arguments, watch)
        except (Refused, Stopped) as error:
            if int(os.environ.get("RANK", 0)) == 0 or isinstance(error, RefusedHere):
                for problem in error.problems if isinstance(error, Refused) else [error]:
                    print(f"error: {problem}", file=sys.stderr)
            return 2 if isinstance(error, Refused) else 1
