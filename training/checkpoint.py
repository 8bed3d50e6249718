"""Checkpoints: the only file that writes tensors.

A checkpoint is a folder under checkpoints/, complete or absent: it is written under a temporary name, its manifest
(sizes and SHA-256 of every file) last, flushed to the disk and then renamed. Tensors are safetensors, everything else
is JSON: nothing is unpickled. `latest` and `best` are links that are replaced in one step. The previous checkpoint is
not touched before the new one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.errors import Refused
from training.optimizer import State

FORMAT = 1
_PREFIX, _TEMPORARY = "iter_", ".writing_"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a checkpoint holds. `state` is plain JSON; see `training.session.Session.state`."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: State
    path: Path


def folder(out_dir: str | Path) -> Path:
    return Path(out_dir) / "checkpoints"


def save(
    out_dir: str | Path,
    state: dict[str, Any],
    model: dict[str, Tensor],
    optimizer: State,
    *,
    keep_last: int,
    keep_best: int,
    pinned: Set[str] = frozenset(),
) -> Path:
    """Write a checkpoint of state["progress"]["iter"] and remove what need not be kept. Returns its folder.

    A second save at the same iteration replaces the first.

    Args:
        pinned: names of checkpoints that are kept in any case.
    """
    root = folder(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    name = f"{_PREFIX}{state['progress']['iter']:09d}"
    writing = root / f"{_TEMPORARY}{name}"
    writing.mkdir()
    moments = {f"{name}|{key}": value for name, parts in optimizer.items() for key, value in parts.items()}
    try:
        save_file(_detached(model), writing / "model.safetensors")
        save_file(_detached(moments), writing / "optimizer.safetensors")
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    (writing / "state.json").write_text(json.dumps(state, allow_nan=False), "utf-8")
    val_loss = state["progress"]["last_val_loss"]
    is_fresh = state["progress"]["last_eval_iter"] == state["progress"]["iter"]
    manifest = {
        "format": FORMAT,
        "iter": state["progress"]["iter"],
        "val_loss": val_loss if is_fresh else None,
        "torch": torch.__version__,
        "files": {file: _facts(writing / file) for file in FILES},
    }
    with open(writing / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(writing)

    final, aside = root / name, root / f"{_TEMPORARY}old_{name}"
    if final.exists():
        os.replace(final, aside)
    os.replace(writing, final)
    _sync_folder(root)
    shutil.rmtree(aside, ignore_errors=True)
    _link(root, "latest", name)
    ranked = _link_best(root)
    _prune({*ranked[:keep_best], *find(out_dir)[:keep_last], *(root / name for name in pinned)}, find(out_dir))
    return final


def remove_after(out_dir: str | Path, iteration: int) -> None:
    """Remove checkpoints of later iterations: the run has gone back and they are not on its way any more."""
    root = folder(out_dir)
    _prune(set(), [path for path, at, _ in _listing(root) if at > iteration])
    left = find(out_dir)
    if left:
        _link(root, "latest", left[0].name)
    _link_best(root)


def find(out_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders, newest first."""
    return [path for path, _, _ in sorted(_listing(folder(out_dir)), key=lambda item: -item[1])]


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises Refused with what is wrong with it."""
    path = Path(path)
    manifest = _manifest(path)
    if manifest is None:
        raise Refused(f"checkpoint {path}: no readable manifest.json: it was never completed")
    if manifest["format"] != FORMAT:
        raise Refused(f"checkpoint {path}: format {manifest['format']!r}, this version reads {FORMAT}")
    problems = []
    for name in FILES:
        facts = manifest["files"].get(name)
        if not (path / name).is_file():
            problems.append(f"checkpoint {path}: {name} is missing")
        elif facts != _facts(path / name):
            problems.append(f"checkpoint {path}: {name} is damaged (its size or checksum is not the manifest's)")
    if problems:
        raise Refused(problems)
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        model, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (ValueError, SafetensorError, RecursionError) as error:
        raise Refused(f"checkpoint {path}: not readable ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise Refused(f"checkpoint {path}: state.json holds no mapping")
    optimizer: State = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("|")
        optimizer.setdefault(name, {})[part] = value
    return Checkpoint(state, model, optimizer, path)


def set_aside(path: str | Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one again; what is in it stays for whoever looks."""
    path = Path(path)
    aside = path.with_name(f"damaged_{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(path, aside)
    return aside


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is no readable one of ours."""
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        if isinstance(manifest["iter"], int) and isinstance(manifest["files"], dict):
            return {"val_loss": None, **manifest, "format": manifest["format"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _listing(root: Path) -> Iterable[tuple[Path, int, float | None]]:
    """(folder, iteration, validation loss) of every complete checkpoint."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if path.name.startswith(_PREFIX) and not path.is_symlink() and (manifest := _manifest(path)):
            yield path, manifest["iter"], manifest["val_loss"]


def _link_best(root: Path) -> list[Path]:
    """Point `best` at the lowest validation loss; all that have one, best first."""
    ranked = sorted((loss, -iteration, path) for path, iteration, loss in _listing(root) if loss is not None)
    if ranked:
        _link(root, "best", ranked[0][2].name)
    return [path for _, _, path in ranked]


def _prune(kept: Set[Path], among: Iterable[Path]) -> None:
    for path in among:
        if path not in kept:
            # Without its manifest it is no checkpoint any more, so a crash while deleting leaves no half of one.
            (path / "manifest.json").unlink()
            shutil.rmtree(path)


def _clear_leftovers(root: Path) -> None:
    """What an interrupted save or removal left behind."""
    for path in root.iterdir():
        broken = path.name.startswith(_PREFIX) and not path.is_symlink() and not (path / "manifest.json").exists()
        if path.name.startswith(_TEMPORARY) or broken:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _link(root: Path, name: str, target: str) -> None:
    temporary = root / f"{_TEMPORARY}{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, root / name)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
