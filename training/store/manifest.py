"""Checkpoint folders: their names, their manifests, what is damaged, what is kept. The only file that removes one.

A checkpoint is a folder under checkpoints/, complete or absent: it is written under a temporary name, its manifest
last, and then renamed; it is renamed back before it is removed. So a folder with the name of a checkpoint was complete
once: where its manifest cannot be read it is damaged, and nothing here removes or overwrites a damaged one.
The manifest holds the size and SHA-256 of every file, and a SHA-256 of itself. This file knows no tensor.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.values import shown

FORMAT = 3
READABLE = (1, 2, 3)
"""Format 1 had no shards; 1 and 2 had no checksum of the manifest itself. Otherwise they are the same."""
PREFIX, TEMPORARY, DAMAGED = "iter_", ".writing_", "damaged_"
MANIFEST, STATE = "manifest.json", "state.json"
NAME = r"^iter_\d{9}(_before_entry_\d+(_\d+)?)?$"
"""Of a checkpoint's folder."""
FILE_NAME = re.compile(r"(?:model|optimizer|shard-\d{5}-model-\d{5}-of-\d{5})\.safetensors|state\.json")


class Damaged(Refused):
    """A checkpoint that is not what was written: another one is used instead, and this one is set aside."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest.json says."""

    format: int
    iter: int
    """Optimizer steps done."""
    val_loss: float | None
    """Validation loss of these very weights in nats per token; None where it was not measured, or is not finite."""
    torch: str
    """Version that wrote it."""
    files: Mapping[str, Any]
    """File name: {"bytes": size, "sha256": hexadecimal}."""

    def text(self) -> str:
        facts = asdict(self)
        return json.dumps({**facts, "sha256": checksum(facts)}, indent=1)


def checksum(facts: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum: of its JSON with sorted keys and no blanks."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()


def folder(out_dir: str | Path) -> Path:
    return Path(out_dir) / "checkpoints"


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Manifest:
    """A checkpoint's manifest. Raises Damaged; or Refused where another version wrote it or it may not be read."""
    place = f"checkpoint {path}: {MANIFEST}"
    if (path / MANIFEST).is_symlink():
        raise Refused(f"{place} is a link: a checkpoint is read from its own folder only")
    try:
        facts = json.loads((path / MANIFEST).read_text("utf-8"))
        recorded = facts.pop("sha256", None)
        same = recorded == checksum(facts)
    except PermissionError as error:
        raise Refused(f"{place} cannot be read ({error.strerror})") from None
    except FileNotFoundError:
        raise Damaged(f"{place} is missing") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{place} is damaged ({type(error).__name__}: {error})") from None
    given = facts.get("format")
    if type(given) is int and given > FORMAT:
        readable = f"{', '.join(map(str, READABLE[:-1]))} and {FORMAT}"
        raise Refused(f"checkpoint {path}: format {given}, this version reads {readable}: a newer version wrote it")
    if type(given) is not int or given not in READABLE:
        raise Damaged(f"{place} is damaged (format {shown(given)})")
    if not same and (given == FORMAT or recorded is not None):
        raise Damaged(f"{place} is damaged (its checksum is not that of what it says)")
    try:
        manifest = Manifest(**facts)
    except TypeError as error:
        raise Damaged(f"{place} is damaged ({error})") from None
    loss, named = manifest.val_loss, _iteration(path.name) if re.fullmatch(NAME, path.name) else manifest.iter
    if type(manifest.iter) is not int or manifest.iter < 0 or manifest.iter != named:
        raise Damaged(f"{place} is damaged (iter {shown(manifest.iter)})")
    if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss)):
        raise Damaged(f"{place} is damaged (val_loss {shown(loss)})")
    if not isinstance(manifest.files, dict):
        raise Damaged(f"{place} is damaged (files {shown(manifest.files)})")
    return manifest


def check_files(path: Path, manifest: Manifest, *, whole: bool) -> None:
    """Compare a checkpoint's files with its manifest. Raises Damaged, or Refused for what nobody could have saved.

    Args:
        whole: read all of every file; otherwise of the tensor files the sizes only.
    """
    damage, refused = [], []
    place, listed = f"checkpoint {path}", manifest.files
    for name in sorted({STATE, *listed}):
        if name not in listed or not FILE_NAME.fullmatch(name):
            refused.append(f"{place}: the manifest {'lacks' if name == STATE else 'names'} {shown(name)}")
        elif (path / name).is_symlink():
            refused.append(f"{place}: {name} is a link: a checkpoint is read from its own folder only")
        elif not (path / name).is_file():
            damage.append(f"{place}: {name} is missing")
        else:
            try:
                same = _is_as_recorded(path / name, listed[name], whole or name == STATE)
            except PermissionError as error:
                refused.append(f"{place}: {name} cannot be read ({error.strerror})")
            except OSError as error:
                damage.append(f"{place}: {name} is damaged ({error.strerror})")
            else:
                if not same:
                    damage.append(f"{place}: {name} is damaged (its size or checksum is not the manifest's)")
    for file in path.glob("*.safetensors"):  # all of them would be read
        if file.name not in listed:
            refused.append(f"{place}: {file.name} is not in the manifest")
    if refused:
        raise Refused([*damage, *refused])
    if damage:
        raise Damaged(damage)


def survey(out_dir: str | Path) -> list[tuple[Path, Manifest | Refused]]:
    """Every folder with a checkpoint's name, newest first, with its manifest or with why that cannot be read."""
    found: list[tuple[int, str, Path, Manifest | Refused]] = []
    root = folder(out_dir)
    for path in root.iterdir() if root.is_dir() else ():
        if not path.name.startswith(PREFIX) or path.is_symlink():
            continue
        try:
            manifest = read(path)
        except Refused as error:
            if path.exists():  # a run beside this reader removes what it needs no more
                found.append((_iteration(path.name), path.name, path, error))
        else:
            found.append((manifest.iter, path.name, path, manifest))
    # Of one iteration the one without a mark is the newest.
    return [(path, result) for _, _, path, result in sorted(found, key=lambda item: (-item[0], item[1]))]


def find(out_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders whose manifests can be read, newest first."""
    return [path for path, _ in _readable(out_dir)]


def held(out_dir: str | Path) -> list[str]:
    """Names of all that is, or was before it was damaged, a checkpoint, newest last."""
    root = folder(out_dir)
    return sorted(p.name for p in (root.iterdir() if root.is_dir() else ()) if p.name.startswith((PREFIX, DAMAGED)))


def refuse_to_overwrite(out_dir: str | Path) -> None:
    """A new run never starts over checkpoints, those that cannot be read included. Raises Refused."""
    names = held(out_dir)
    if find(out_dir):
        raise Refused(
            f"out_dir {out_dir} holds the checkpoints of a run: go on with it (--init_from=resume), "
            "or give another --out_dir, or remove the folder"
        )
    if names:
        raise Refused(
            f"out_dir {out_dir} holds checkpoints that cannot be read, and a new run does not start over them: "
            f"{', '.join(names)}; give another --out_dir, or move that folder away"
        )


def _iteration(name: str) -> int:
    """What a folder's name says, or -1."""
    digits = re.match(rf"{PREFIX}(\d{{1,18}})", name)
    return int(digits[1]) if digits else -1


def _is_as_recorded(path: Path, recorded: Any, whole: bool) -> bool:
    if not isinstance(recorded, dict) or path.stat().st_size != recorded.get("bytes"):
        return False
    return not whole or _digest(path) == recorded.get("sha256")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- writing


def begin(out_dir: str | Path, name: str) -> Path:
    """An empty folder under a temporary name, in which a checkpoint is written; leftovers of others are removed."""
    root = folder(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        if path.name.startswith(TEMPORARY):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    writing = root / f"{TEMPORARY}{name}"
    writing.mkdir()
    return writing


def commit(writing: Path, state: str, iteration: int, val_loss: float | None, torch: str) -> Path:
    """Make a checkpoint of a temporary folder in which the tensors are. Returns its folder.

    Args:
        state: the text of state.json.
        torch: version of torch.
    """
    (writing / STATE).write_text(state, "utf-8")
    names = sorted(path.name for path in writing.iterdir() if FILE_NAME.fullmatch(path.name))
    mode = (writing / STATE).stat().st_mode & 0o777
    for name in names:
        (writing / name).chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask
    facts = {name: _sealed(writing / name) for name in names}
    with open(writing / MANIFEST, "w", encoding="utf-8") as file:
        file.write(Manifest(FORMAT, iteration, val_loss, torch, facts).text())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(writing)

    root, name = writing.parent, writing.name.removeprefix(TEMPORARY)
    final, aside = root / name, root / f"{TEMPORARY}old_{name}"
    if os.path.lexists(final):
        try:
            read(final)
        except Refused:
            set_aside(final)
        else:
            os.replace(final, aside)
    os.replace(writing, final)
    _sync_folder(root)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def _sealed(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is now on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def prune(saved: Path, keep_last: int, keep_best: int, pinned: Set[str], keep_every: int = 0) -> None:
    """After a save, remove what need not be kept beside it. A damaged one is let be.

    Args:
        keep_every: the first checkpoint at or after each multiple of so many iterations is kept for good; 0: none is.
        pinned: names of checkpoints that are kept in any case.
    """
    found = _readable(saved.parents[1])
    best = [path for _, _, path in _ranked(found)[:keep_best]]
    # Where the run has gone back, later ones are there still; what was saved now is the latest in any case.
    names = {saved.name, *pinned, *(path.name for path in (*best, *[path for path, _ in found][:keep_last]))}
    if keep_every:
        # Oldest first, so that of each span the first one stays; those before an entry belong to its guard.
        plain = [(m.iter // keep_every, path.name) for path, m in reversed(found) if "_before_" not in path.name]
        names |= set({span: name for span, name in reversed(plain) if span}.values())
    _keep(found, [path for path, _ in found if path.name in names], saved)


def remove_after(out_dir: str | Path, iteration: int) -> None:
    """Remove checkpoints of later iterations: the run has gone back and they are not on its way any more."""
    found = _readable(out_dir)
    left = [path for path, manifest in found if manifest.iter <= iteration]
    if left:
        _keep(found, left, left[0])


def _keep(found: list[tuple[Path, Manifest]], kept: list[Path], latest: Path) -> None:
    """Point `latest` and `best` at what is kept, and only then remove the others."""
    root = latest.parent
    _link(root, "latest", latest.name)
    if ranked := _ranked([(path, manifest) for path, manifest in found if path in kept]):
        _link(root, "best", ranked[0][2].name)
    else:
        (root / "best").unlink(missing_ok=True)
    _remove(root, [path for path, _ in found if path not in kept])


def set_aside(path: str | Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one again; what is in it stays for whoever looks."""
    path = Path(path)
    first = path.with_name(f"{DAMAGED}{path.name}")
    others = (first.with_name(f"{first.name}_{n}") for n in itertools.count(2))
    aside = next(name for name in itertools.chain([first], others) if not os.path.lexists(name))
    os.replace(path, aside)
    return aside


def _remove(root: Path, paths: Iterable[Path]) -> None:
    """Rename first: a crash while deleting leaves litter, which is no checkpoint and is told from a damaged one."""
    going = [path.with_name(f"{TEMPORARY}old_{path.name}") for path in paths]
    for path, litter in zip(paths, going, strict=True):
        shutil.rmtree(litter, ignore_errors=True)
        os.replace(path, litter)
    if going:
        _sync_folder(root)
    for litter in going:
        shutil.rmtree(litter)


def _readable(out_dir: str | Path) -> list[tuple[Path, Manifest]]:
    """Checkpoints whose manifests can be read, newest first."""
    return [(path, result) for path, result in survey(out_dir) if isinstance(result, Manifest)]


def _ranked(found: list[tuple[Path, Manifest]]) -> list[tuple[float, int, Path]]:
    """Those with a validation loss, best first, and of equal ones the newest."""
    return sorted((m.val_loss, -m.iter, path) for path, m in found if m.val_loss is not None)


def _link(root: Path, name: str, target: str) -> None:
    temporary = root / f"{TEMPORARY}{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, root / name)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
