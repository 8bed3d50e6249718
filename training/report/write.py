"""Writing reports: RUN/report.html, pages of several runs, pictures; at the end of a run, and while one trains.

At the end of a run nothing that goes wrong here may harm it: it is told in one line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrate.training.report.data import Story, read_story
from orchestrate.training.report.page import page, picture_height
from orchestrate.training.schedule.file import Schedule
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store.run_folder import METRICS, write_whole

REPORT = "report.html"
LONGEST_AT_THE_END = 2**28
"""Bytes of metrics.jsonl: of more, a report is made when somebody asks, and not while machines wait."""
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge"
WIDTH, SCALE = 1200, 2
"""Of a picture, in CSS pixels, and how many pixels each is."""
_SECONDS = 120


def write(stories: Sequence[Story], path: Path, reload_seconds: int = 0) -> None:
    """Write a page, whole or not at all. Raises Refused."""
    text = page(stories, reload_seconds=reload_seconds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise Refused(f"{path}: cannot be written ({error.strerror})") from None


def at_the_end(folder: str | Path, schedule: Schedule, say: Callable[[str], None]) -> None:
    """RUN/report.html of a run that ends; says where it is or why there is none. Raises nothing."""
    path = Path(folder) / REPORT
    try:
        if (Path(folder) / METRICS).stat().st_size > LONGEST_AT_THE_END:
            say(f"no {REPORT}: {METRICS} is long; `orchestrate report {folder}` makes one")
            return
        write([read_story(folder, schedule)], path)
    except Exception as error:
        told = error.problems[0] if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        say(f"no {REPORT}: {told}")
    else:
        say(f"report: {path}")


def follow(
    read: Callable[[], list[Story]],
    path: Path,
    every: float,
    stopped: Callable[[], int],
    say: Callable[[str], None],
) -> int:
    """Write a page again and again until all its runs have ended; returns the signal that stopped it, or 0.

    Args:
        read: the runs as they are now.
        every: seconds between two pages; more where making one takes long. The page loads itself as often.
    """
    while True:
        begun = time.monotonic()
        stories = read()
        ended = all(story.ended for story in stories) or stopped()
        write(stories, path, 0 if ended else max(1, round(every)))
        if ended:
            return stopped()
        took = time.monotonic() - begun
        say(f"{path}: " + ", ".join(f"{s.name} at iteration {s.facts['iterations']}" for s in stories))
        until = time.monotonic() + max(every, 5 * took)
        while time.monotonic() < until and not stopped():
            time.sleep(0.1)


def picture(stories: Sequence[Story], path: Path) -> None:
    """A PNG of the losses and what changed, drawn by a browser without a window. Raises Refused."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise Refused(
            f"--png {path}: a picture is drawn by Chromium or Chrome, and none of {', '.join(BROWSERS)} is found; "
            "the button with the camera in report.html saves one too"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "page.html", Path(folder) / "page.png"
        source.write_bytes(page(stories, picture=True).encode("utf-8", "replace"))
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={folder}/profile",
            f"--force-device-scale-factor={SCALE}",
            f"--window-size={WIDTH},{picture_height(stories)}",
            "--virtual-time-budget=10000",
            f"--screenshot={made}",
            source.as_uri(),
        ]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # it refuses to start without, and the page loads nothing
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise Refused(f"--png {path}: {browser} did not end within {_SECONDS} s") from None
        if done.returncode or not made.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Refused(f"--png {path}: {browser} drew nothing: {last}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, made.read_bytes())
        except OSError as error:
            raise Refused(f"--png {path}: cannot be written ({error.strerror})") from None
