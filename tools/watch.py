"""Look on while runs train, in the terminal; or at what a run that died has left.

    orchestrate watch RUN [RUN ...] [--once] [--every SECONDS] [--operations FILE.py]

Reads the run folders only, so it works over ssh and disturbs nothing. Needs the extra `watch` (textual); --once prints
the view as plain text and needs nothing. Keys: up and down choose a run, q ends.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrate.tools.chat import visible
from orchestrate.tools.main import Alone, called
from orchestrate.training.report.data import Series
from orchestrate.training.report.live import Live, Watcher
from orchestrate.training.schedule.own import registered
from orchestrate.training.session.stopping import SignalWatch
from orchestrate.training.settings.errors import Refused

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a braille character, by row and column."""
PLOT_ROWS = 8


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises Refused."""
    parser = argparse.ArgumentParser(
        prog=called("watch"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; one may not be there yet")
    parser.add_argument("--once", action="store_true", help="print how the runs stand, and end")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between two looks (default 2)")
    parser.add_argument(
        "--operations", metavar="FILE.py", action="append", default=[], help="that the schedule needs; it is executed"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.every < math.inf:
        raise Refused(f"--every {options.every}: must be more than 0")
    if files := [run for run in options.runs if Path(run).is_file()]:
        raise Refused([f"{run}: is a file; a run folder is wanted" for run in files])
    return options


# ---------------------------------------------------------------------------------------------- as text


def one_line(text: str) -> str:
    """A text on one line that drives no terminal."""
    return visible(text).replace("\n", " ").replace("\t", " ")


def plot(losses: Sequence[Series], width: int, rows: int = PLOT_ROWS) -> list[str]:
    """Losses over iterations, of braille dots; the scale stands to the left."""
    curves = [(s.at["iter"], s.values) for s in losses if len(s.values)]
    if not curves:
        return []
    ys = np.concatenate([values for _, values in curves])
    low, high = float(ys.min()), float(ys.max())
    marks = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(map(len, marks)) + 1
    columns = max(8, width - margin)
    cells = np.zeros((rows, columns), dtype=int)
    # Few points are joined by lines.
    dense = [np.linspace(at[0], at[-1], 2 * columns) if 1 < len(at) < columns else at for at, _ in curves]
    xs = np.concatenate(dense)
    ys = np.concatenate([np.interp(more, at, values) for more, (at, values) in zip(dense, curves, strict=True)])
    spread = float(xs.max() - xs.min())
    right = np.round((xs - xs.min()) / (spread or 1.0) * (2 * columns - 1)).astype(int)
    down = np.round((high - ys) / ((high - low) or 1.0) * (4 * rows - 1)).astype(int)
    for x, y in zip(right, down, strict=True):
        cells[y // 4, x // 2] |= _DOTS[y % 4][x % 2]
    labels = [marks[0], *[""] * (rows - 2), marks[1]]
    lines = [
        (f"{label:>{margin - 1}} " + "".join(chr(0x2800 + cell) for cell in row).rstrip("\u2800")).rstrip()
        for label, row in zip(labels, cells, strict=True)
    ]
    ends = f"{xs.min():,.0f}", f"{xs.max():,.0f}"
    return [*lines, " " * margin + ends[0] + ends[1].rjust(columns - len(ends[0]))]


def summary(live: Live) -> str:
    """A run on one line."""
    facts = [live.facts[name] for name in ("iteration", "last val loss", "to go") if name in live.facts]
    return one_line(f"{live.name}: {', '.join([live.state.partition(':')[0], *facts])}")


def view(live: Live, width: int = 100) -> str:
    """A run as plain text, no line wider than this."""
    lines = [f"{live.name}: {live.state}"]
    names = [name for name in live.facts if name != "stage"]
    if "stage" in live.facts:
        lines += ["", f"stage: {live.facts['stage']}"]
    for head in live.heads:
        lines.append(f"next: {head.title} {head.what}")
        lines += [f"      {'or ' if number else ''}{near}" for number, near in enumerate(head.near)]
    drawn = plot(live.losses, width)
    if drawn:
        lines += ["", "losses (training and validation)", *drawn]
    lines += ["", *_table([f"{name}: {live.facts[name]}" for name in names], width)] if names else []
    if live.events:
        lines += ["", "recent events", *(f"  {event}" for event in live.events)]
    if live.facts or live.health:
        lines += ["", "health" if live.health else "health: nothing is wrong", *(f"  {one}" for one in live.health)]
    return "\n".join(
        piece for line in lines for piece in textwrap.wrap(one_line(line), width, subsequent_indent="        ",
                                                           drop_whitespace=False, replace_whitespace=False) or [""]
    )  # fmt: skip


def _table(cells: Sequence[str], width: int) -> list[str]:
    """In two columns where they fit."""
    cells = [one_line(cell) for cell in cells]
    half = (len(cells) + 1) // 2
    left = max(map(len, cells[:half])) + 3
    if left + max(map(len, cells[half:]), default=0) > width:
        return cells
    return [
        cells[row].ljust(left if row + half < len(cells) else 0)
        + (cells[row + half] if row + half < len(cells) else "")
        for row in range(half)
    ]


# ---------------------------------------------------------------------------------------------- on a terminal


def application(watchers: Sequence[Watcher], every: float, signals: SignalWatch | None = None) -> Any:
    """The view that renews itself, a textual App. Raises ImportError where textual is missing."""
    from rich.text import Text
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.containers import VerticalScroll
    from textual.widgets import Footer, Static

    class Watch(App[int]):
        TITLE = "orchestrate watch"
        ENABLE_COMMAND_PALETTE = False
        CSS = "#runs { height: auto; max-height: 40%; background: $panel; } #run { height: auto; }"
        BINDINGS = [
            Binding("q,ctrl+c", "end", "end"),
            Binding("up,k", "choose(-1)", "run above", show=len(watchers) > 1),
            Binding("down,j", "choose(1)", "run below", show=len(watchers) > 1),
        ]
        chosen = 0

        def __init__(self) -> None:
            super().__init__()
            self.lives: list[Live] = []

        def compose(self) -> ComposeResult:
            # Static shows a Text as it is: nothing in it is markup.
            if len(watchers) > 1:
                yield Static(Text("reading ..."), id="runs")
            with VerticalScroll(can_focus=False):
                yield Static(Text("reading ..."), id="run")
            yield Footer()

        def on_mount(self) -> None:
            self.run_worker(self.read, thread=True)
            self.set_interval(0.2, self.heed)

        def heed(self) -> None:
            if signals is not None and signals.received:
                self.exit(128 + signals.received)

        def read(self) -> None:
            """Reads off the thread that draws; a folder that takes long is looked at less often."""
            while self.is_running:
                begun = time.monotonic()
                lives = [watcher.look() for watcher in watchers]
                with contextlib.suppress(RuntimeError):  # it has just ended
                    self.call_from_thread(self.show_all, lives)
                wake = time.monotonic() + max(every, 5 * (time.monotonic() - begun))
                while self.is_running and time.monotonic() < wake:
                    time.sleep(0.05)

        def show_all(self, lives: list[Live]) -> None:
            self.lives = lives
            self.draw()

        def on_resize(self) -> None:
            self.draw()

        def draw(self) -> None:
            if not self.lives:
                return
            if len(watchers) > 1:
                lines = [f"{'>' if n == self.chosen else ' '} {summary(live)}" for n, live in enumerate(self.lives)]
                self.query_one("#runs", Static).update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))
            text = view(self.lives[self.chosen], max(40, self.size.width - 3))
            self.query_one("#run", Static).update(Text(text))

        def action_choose(self, by: int) -> None:
            self.chosen = (self.chosen + by) % len(watchers)
            self.draw()

        def action_end(self) -> None:
            self.exit(0)

    return Watch()


def main(arguments: Sequence[str], watch: SignalWatch | None = None) -> int:
    """Show the runs until somebody ends it; returns the exit code. Raises Refused."""
    options = parse(arguments)
    watchers = [Watcher(run) for run in options.runs]
    with contextlib.ExitStack() as stack:
        stack.enter_context(registered(options.operations))
        if options.once:
            width = shutil.get_terminal_size((100, 24)).columns
            print("\n\n".join(view(watcher.look(), max(40, width)) for watcher in watchers))
            return 0
        try:
            app = application(watchers, options.every, watch)
        except ModuleNotFoundError as error:
            raise Refused(
                f"watch: {error.name} is missing: pip install 'training-orchestrator[watch]', or give --once"
            ) from None
        if watch is not None:
            watch.begin(Alone())
        code = app.run()
    return code or 0
