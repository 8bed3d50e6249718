"""Show how a run went, or how several compare: one HTML file that opens without a network.

    orchestrate report RUN [RUN2 ...] [--out FILE.html] [--png FILE.png] [--follow] [--operations FILE.py]

Writes RUN/report.html, of several runs report.html here. It is drawn by plotly (the extra `report`); a picture by
Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrate.tools.main import Alone, called, script
from orchestrate.training.report.data import Story, read_story
from orchestrate.training.report.write import REPORT, follow, picture, write
from orchestrate.training.schedule.own import registered
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("report"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="FILE.html", default="", help="where to write the page")
    parser.add_argument("--png", metavar="FILE.png", default="", help="draw a picture too, for a paper or a README")
    parser.add_argument("--follow", action="store_true", help="write it again while a run trains, until it ends")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=10.0, help="with --follow (default 10)")
    parser.add_argument(
        "--operations", metavar="FILE.py", action="append", default=[], help="that the schedule needs; it is executed"
    )
    options = parser.parse_args(arguments)
    folders = [Path(run).resolve() for run in options.runs]
    if twice := next((run for run, folder in zip(options.runs, folders, strict=True) if folders.count(folder) > 1), ""):
        raise Refused(f"{twice} is given twice")
    if not options.every > 0:
        raise Refused(f"--every {options.every}: must be more than 0")
    return options


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Write the report and say where; returns the exit code. Raises Refused."""
    options = parse(arguments)
    path = Path(options.out) if options.out else Path(options.runs[0] if len(options.runs) == 1 else ".") / REPORT

    def read() -> list[Story]:
        return [read_story(run) for run in options.runs]

    with contextlib.ExitStack() as stack:
        stack.enter_context(registered(options.operations))
        if options.follow:
            watch = watch or stack.enter_context(SignalWatch().installed())
            watch.begin(Alone())
            number = follow(read, path, options.every, lambda: watch.received, print)
            if number:
                return 128 + number
        else:
            write(read(), path)
        if options.png:
            picture(read(), Path(options.png))
            print(f"picture: {options.png}")
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    script("report", sys.argv[1:])
