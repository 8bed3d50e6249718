"""Checkpoints: the only file that writes tensors.

A checkpoint is a folder under checkpoints/, complete or absent: it is written under a temporary name, its manifest
(sizes and SHA-256 of every file) last, flushed to the disk and then renamed. Tensors are safetensors (whole ones from
rank 0, or each rank's shards by torch.distributed.checkpoint; either is read by any run), everything else is JSON:
nothing is unpickled. `latest` and `best` are links that are replaced in one step. The previous checkpoint is
not touched before the new one is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Set
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrate.model.lineage import State
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.values import shown

if TYPE_CHECKING:
    from orchestrate.training.run.distributed import SaveGroup

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had no shards and is otherwise the same."""
_PREFIX, _TEMPORARY = "iter_", ".writing_"
_STATE, _MODEL, _OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
NAME = r"^iter_\d{9}(_before_entry_\d+)?$"
"""Of a checkpoint's folder."""
_FILE_NAME = re.compile(r"(?:model|optimizer|shard-\d{5}-model-\d{5}-of-\d{5})\.safetensors|state\.json")


# Where torch.distributed.checkpoint notes, in a shard's safetensors header, which part of a tensor it is.
_SHARDS, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class Checkpoint:
    """A verified checkpoint folder; tensors are read when they are asked for.

    Attributes:
        state: plain JSON; see `orchestrate.training.session.session.Session.state`.
        shapes: of every tensor; a moment is called "PARAMETER|exp_avg" and so on.
    """

    def __init__(self, path: Path, state: dict[str, Any], shapes: dict[str, torch.Size]) -> None:
        self.path, self.state, self.shapes = path, state, shapes

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """Every parameter by name, whole, on the CPU."""
        return {name: value for name, value in self._whole.items() if "|" not in name}

    @cached_property
    def optimizer(self) -> State:
        """The optimizer's state by parameter name, whole, on the CPU."""
        return by_parameter({key: value for key, value in self._whole.items() if "|" in key})

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        if (self.path / _MODEL).exists():
            return {**load_file(self.path / _MODEL), **load_file(self.path / _OPTIMIZER)}
        tensors = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        self.read_into(tensors)
        return tensors

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors, whole or sharded, in place; each rank reads its own parts, and none waits for another."""
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(self.path)), no_dist=True)


def by_parameter(moments: dict[str, Tensor]) -> State:
    """{"PARAMETER|exp_avg": ...} as {"PARAMETER": {"exp_avg": ...}}."""
    state: State = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("|")
        state.setdefault(name, {})[part] = value
    return state


def _flat(optimizer: State) -> dict[str, Tensor]:
    return {f"{name}|{key}": value for name, parts in optimizer.items() for key, value in parts.items()}


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
    mark: str = "",
    pinned: Set[str] = frozenset(),
    group: SaveGroup | None = None,
) -> Path:
    """Write a checkpoint of state["progress"]["iter"] and remove what need not be kept. Returns its folder.

    A second save at the same iteration with the same mark replaces the first. Raises OSError.

    Args:
        mark: ends the folder's name, for a state that comes before others of the same iteration.
        pinned: names of checkpoints that are kept in any case.
        group: with sharded tensors every rank calls this, and writes what it holds.
    """
    begin = partial(_begin, Path(out_dir), state, mark)
    if group is None:
        writing = begin()
        try:
            save_file(_detached(model), writing / _MODEL)
            save_file(_detached(_flat(optimizer)), writing / _OPTIMIZER)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        return _finish(Path(out_dir), state, writing, keep_last, keep_best, pinned)

    import torch.distributed.checkpoint as dcp

    writing = group.on_first(begin)
    tensors = {**model, **_flat(optimizer)}
    files = {name: 2 if "|" in name else 1 for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(str(writing), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group.process_group)
    except dcp.CheckpointException as error:  # every rank gets it, whoever it was that could not write
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise OSError(causes) from error
    return group.on_first(lambda: _finish(Path(out_dir), state, writing, keep_last, keep_best, pinned))


def _begin(out_dir: Path, state: dict[str, Any], mark: str) -> Path:
    """An empty folder under a temporary name."""
    root = folder(out_dir)
    root.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    writing = root / f"{_TEMPORARY}{_PREFIX}{state['progress']['iter']:09d}{mark}"
    writing.mkdir()
    return writing


def _finish(
    out_dir: Path, state: dict[str, Any], writing: Path, keep_last: int, keep_best: int, pinned: Set[str]
) -> Path:
    """Make a checkpoint of a folder in which the tensors are, and remove what need not be kept."""
    (writing / _STATE).write_text(json.dumps(state, allow_nan=False), "utf-8")
    val_loss = state["progress"]["last_val_loss"]
    is_fresh = state["progress"]["last_eval_iter"] == state["progress"]["iter"]
    manifest = {
        "format": FORMAT,
        "iter": state["progress"]["iter"],
        "val_loss": val_loss if is_fresh else None,
        "torch": torch.__version__,
        "files": {path.name: _facts(path) for path in sorted(writing.iterdir()) if _FILE_NAME.fullmatch(path.name)},
    }
    with open(writing / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(writing)

    root, name = folder(out_dir), writing.name.removeprefix(_TEMPORARY)
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
    # Of one iteration the one without a mark is the newest.
    return [path for path, _, _ in sorted(_listing(folder(out_dir)), key=lambda item: (-item[1], item[0].name))]


def load(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises Refused with what is wrong with it."""
    path = Path(path)
    manifest = _manifest(path)
    if manifest is None:
        raise Refused(f"checkpoint {path}: no readable manifest.json: it was never completed")
    if manifest["format"] not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise Refused(f"checkpoint {path}: format {manifest['format']!r}, this version reads {readable}")
    problems = []
    listed = manifest["files"]
    for name in sorted({_STATE, *listed}):
        if name not in listed or not _FILE_NAME.fullmatch(name):
            problems.append(f"checkpoint {path}: the manifest {'lacks' if name == _STATE else 'names'} {shown(name)}")
        elif not (path / name).is_file():
            problems.append(f"checkpoint {path}: {name} is missing")
        elif listed[name] != _facts(path / name):
            problems.append(f"checkpoint {path}: {name} is damaged (its size or checksum is not the manifest's)")
    for file in path.glob("*.safetensors"):  # all of them would be read
        if file.name not in listed:
            problems.append(f"checkpoint {path}: {file.name} is not in the manifest")
    if problems:
        raise Refused(problems)
    try:
        state = json.loads((path / _STATE).read_text("utf-8"))
        shapes = _shapes(path, listed)
    except (ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise Refused(f"checkpoint {path}: not readable ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise Refused(f"checkpoint {path}: state.json holds no mapping")
    return Checkpoint(path, state, shapes)


def _shapes(path: Path, files: Iterable[str]) -> dict[str, torch.Size]:
    """The shape of every tensor, from the headers alone. Raises ValueError where shards leave holes."""
    if _MODEL in files and _OPTIMIZER not in files:
        raise ValueError(f"{_OPTIMIZER} is missing")
    ends: dict[str, list[int]] = {}
    elements: dict[str, int] = {}
    for name in files:
        if name == _STATE:
            continue
        with safe_open(path / name, framework="pt") as file:
            shards = json.loads((file.metadata() or {}).get(_SHARDS, "{}")) if name.startswith("shard") else {}
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                part = file.get_slice(key)
                shape = part.get_shape()
                if part.get_dtype() != "F32":
                    raise ValueError(f"{name}: {key} is {part.get_dtype()}, not float32")
                starts = shards[key][_OFFSETS] if shards else [0] * len(shape)
                if len(starts) != len(shape) or any(type(start) is not int or start < 0 for start in starts):
                    raise ValueError(f"{name}: {key} starts at {starts}")
                last = [start + size for start, size in zip(starts, shape, strict=True)]
                ends[key] = [max(pair) for pair in zip(last, ends.get(key, last), strict=True)]
                elements[key] = elements.get(key, 0) + math.prod(shape)
    for key, count in elements.items():
        if count != math.prod(ends[key]):
            raise ValueError(f"the shards of {key} do not make up a tensor of shape {tuple(ends[key])}")
    return {key: torch.Size(end) for key, end in ends.items()}


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
