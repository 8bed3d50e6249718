"""Check a configuration and its schedule, print the stages of the run, train nothing.

    orchestrate plan [CONFIG.py ...] --schedule FILE [--json | --wide] [--against RUN] [--KEY=VALUE]
    orchestrate plan --init FOLDER [--KEY=VALUE]          # a configuration and a schedule to start from

The same as train_orchestrated.py with --plan, or with --plan=json.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrate.tools import train
from orchestrate.training.session.stopping import SignalWatch


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Print the plan; returns the exit code. Raises Refused with every problem of the configuration and schedule."""
    if {"-h", "--help"} & set(arguments):
        train.parse(["--help"], "plan", __doc__)
    form = "json" if "--json" in arguments else "table"
    return train.main([*(given for given in arguments if given != "--json"), f"--plan={form}"], watch)
