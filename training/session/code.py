"""Which version of the project runs: the git commit of its checkout, and whether files were changed since."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 5


@cache
def code_version() -> dict[str, Any] | None:
    """commit and clean, as the start event has them (run_folder.py); None where this is no checkout or git is missing.

    Asked once in a process: the code that runs is what was imported. Where the disk is slow the commit alone is told.
    """
    if not (ROOT / ".git").exists():
        return None  # installed: a repository around it would be somebody else's
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "clean": None if changed is None else not changed.strip()}


def _git(*arguments: str) -> str | None:
    """What git prints, None where it fails or does not answer soon. It takes no locks: other git commands may run."""
    command = ["git", "-C", str(ROOT), *arguments]
    # Variables that a git hook sets would lead to another repository.
    clear = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = {**clear, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
