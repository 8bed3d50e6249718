"""Operations and triggers of the user's own, from files that a person names on the command line.

Nothing in a schedule, a configuration or a checkpoint may name code. A run remembers its files by name and SHA-256, so
that a resume can ask for them; it never holds where they are or what is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrate.training.operations import OPERATIONS
from orchestrate.training.schedule.file import RESERVED
from orchestrate.training.schedule.triggers import TRIGGERS
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store.state import UserFile


@dataclass(frozen=True)
class OwnFile:
    """A file of operations in use."""

    path: Path
    sha256: str

    def to_json(self) -> dict[str, str]:
        """What a run remembers of it: its name without folders, and its content's hash."""
        return {"file": self.path.name, "sha256": self.sha256}


@contextlib.contextmanager
def registered(paths: Sequence[str]) -> Iterator[list[OwnFile]]:
    """Execute the files; what they register is known inside this block. Raises Refused with file and line."""
    known = [(registry, dict(registry)) for registry in (OPERATIONS, TRIGGERS)]
    modules: list[str] = []
    files: list[OwnFile] = []
    try:
        for path in map(Path, paths):
            if path.name in [file.path.name for file in files]:
                raise Refused(f"--operations {path}: a file called {path.name} is given already")
            modules.append(f"own_operations.{path.stem}")
            files.append(OwnFile(path, _execute(path, modules[-1])))
        yield files
    finally:
        for registry, before in known:
            registry.clear()
            registry.update(before)  # type: ignore[arg-type]
        for name in modules:
            sys.modules.pop(name, None)


def _execute(path: Path, name: str) -> str:
    """Execute a file as a module of this name; returns the SHA-256 of what was executed."""
    count = len(OPERATIONS) + len(TRIGGERS)
    fields = set(TRIGGERS)
    try:
        source = path.read_bytes()
        code = compile(source, str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise Refused(f"--operations {path}: cannot be read ({error.strerror})") from None
    except SyntaxError as error:
        raise Refused(f"{path}:{error.lineno or 1}: not Python ({error.msg})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"{path}: not Python ({error})") from None
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where pydantic and inspect look names up
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise Refused(f"{path}:{lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from None
    for field in set(TRIGGERS) - fields:
        if field in RESERVED:
            line = inspect.getsourcelines(TRIGGERS[field])[1]
            raise Refused(f"{path}:{line}: {field} is a field that every entry has: no trigger can be called so")
    if len(OPERATIONS) + len(TRIGGERS) == count:
        raise Refused(f"--operations {path}: registers no operation and no trigger")
    return hashlib.sha256(source).hexdigest()


def compare(recorded: Sequence[UserFile], given: Sequence[OwnFile]) -> list[dict[str, Any]]:
    """The overrides of a resume with these files. Raises Refused for each file that the run had and that is missing."""
    before = {record.file: record.sha256 for record in recorded}
    now = {file.path.name: file.sha256 for file in given}
    if missing := before.keys() - now.keys():
        raise Refused(
            f"the run was made with operations of {name} (SHA-256 {before[name][:12]}...): give --operations {name}"
            for name in sorted(missing)
        )
    reasons = {name: "the file's content has changed" if name in before else "--operations" for name in now}
    return [
        {"key": f"operations {name}", "before": before.get(name), "after": now[name], "applied": True, "reason": reason}
        for name, reason in reasons.items()
        if before.get(name) != now[name]
    ]
