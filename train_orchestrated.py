"""Train a model while a schedule changes the run: `python train_orchestrated.py --help` (tools/train.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrate.tools import main as tools

if __name__ == "__main__":
    tools.script("train", sys.argv[1:])  # listens for signals before it imports what takes seconds

from orchestrate.tools.train import configuration, main, parse

__all__ = ["configuration", "main", "parse", "run"]


def run(arguments: Sequence[str]) -> int:
    """main, with refusals as messages on standard error and exit code 2."""
    return tools.run("train", arguments)
