"""The tensors of checkpoints, and their state: the only file that writes tensors.

What a checkpoint's folder is, and that it is complete or absent, is manifest.py's. Tensors are safetensors (whole ones
from rank 0, or each rank's shards by torch.distributed.checkpoint; either is read by any run), everything else is JSON:
nothing is unpickled. The previous checkpoint is not touched before the new one is whole.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Set
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrate.model.lineage import State as Moments
from orchestrate.training.settings.errors import Refused
from orchestrate.training.store import manifest
from orchestrate.training.store.manifest import FORMAT, NAME, STATE, find, folder, remove_after, set_aside
from orchestrate.training.store.state import State

if TYPE_CHECKING:
    from orchestrate.training.run.distributed import SaveGroup

__all__ = [
    "FORMAT",
    "NAME",
    "Checkpoint",
    "by_parameter",
    "find",
    "folder",
    "load",
    "remove_after",
    "save",
    "set_aside",
]
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""Of weights; moments are float32."""

# Where torch.distributed.checkpoint notes, in a shard's safetensors header, which part of a tensor it is.
_SHARDS, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class Checkpoint:
    """A verified checkpoint folder; tensors are read when they are asked for.

    Attributes:
        state: all but the tensors that is needed to go on exactly.
        shapes: of every tensor; a moment is called "PARAMETER|exp_avg" and so on.
        dtypes: likewise.
    """

    def __init__(self, path: Path, state: State, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype]) -> None:
        self.path, self.state, self.shapes, self.dtypes = path, state, shapes, dtypes

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """Every parameter by name, whole, on the CPU; the optimizer's state is not read."""
        return self._whole(_MODEL, [name for name in self.shapes if "|" not in name])

    @cached_property
    def optimizer(self) -> Moments:
        """The optimizer's state by parameter name, whole, on the CPU."""
        return by_parameter(self._whole(_OPTIMIZER, [name for name in self.shapes if "|" in name]))

    def _whole(self, file: str, names: Iterable[str]) -> dict[str, Tensor]:
        if (self.path / _MODEL).exists():
            return load_file(self.path / file)
        tensors = {name: torch.zeros(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        self.read_into(tensors)
        return tensors

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors, whole or sharded, in place; each rank reads its own parts, and none waits for another."""
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(self.path)), no_dist=True)


def by_parameter(moments: dict[str, Tensor]) -> Moments:
    """{"PARAMETER|exp_avg": ...} as {"PARAMETER": {"exp_avg": ...}}."""
    state: Moments = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("|")
        state.setdefault(name, {})[part] = value
    return state


def _flat(optimizer: Moments) -> dict[str, Tensor]:
    return {f"{name}|{key}": value for name, parts in optimizer.items() for key, value in parts.items()}


def save(
    out_dir: str | Path,
    state: State,
    model: dict[str, Tensor],
    optimizer: Moments,
    *,
    keep_last: int,
    keep_best: int,
    keep_every: int = 0,
    mark: str = "",
    pinned: Set[str] = frozenset(),
    group: SaveGroup | None = None,
) -> Path:
    """Write a checkpoint of this state and remove what need not be kept. Returns its folder.

    A second save at the same iteration with the same mark replaces the first. Raises OSError.

    Args:
        mark: ends the folder's name, for a state that comes before others of the same iteration.
        pinned: names of checkpoints that are kept in any case.
        group: with sharded tensors every rank calls this, and writes what it holds.
    """
    begin = partial(manifest.begin, out_dir, f"{manifest.PREFIX}{state.progress.iter:09d}{mark}")

    def finish() -> Path:
        path = manifest.commit(writing, state.text(), state.progress.iter, state.val_loss, torch.__version__)
        manifest.prune(path, keep_last, keep_best, pinned, keep_every)
        return path

    if group is None:
        writing = begin()
        try:
            save_file(_detached(model), writing / _MODEL)
            save_file(_detached(_flat(optimizer)), writing / _OPTIMIZER)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        return finish()

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
    return group.on_first(finish)


def load(path: str | Path, *, whole: bool = True) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises manifest.Damaged with what is not as it was written, Refused for what this version did not write.

    Args:
        whole: verify the checksums of the tensor files too; another rank may have done that.
    """
    path = Path(path)
    if not path.is_dir():
        raise Refused(f"checkpoint {path}: there is no such folder")
    found = manifest.read(path)
    manifest.check_files(path, found, whole=whole)
    try:
        shapes, dtypes = _described(path, found.files)
    except (ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        manifest.check_files(path, found, whole=True)  # it may be damage that the sizes do not show
        raise Refused(f"checkpoint {path}: not readable ({type(error).__name__}: {error})") from None
    try:
        state = State.from_json(json.loads((path / STATE).read_text("utf-8")))
    except (ValueError, RecursionError) as error:
        raise Refused([f"checkpoint {path}: {STATE}: {line}" for line in str(error).splitlines()]) from None
    if (found.iter, found.val_loss) != (state.progress.iter, state.val_loss):  # formats 1 and 2 have no other guard
        said = f"iter {found.iter}, val_loss {found.val_loss}"
        raise manifest.Damaged(f"checkpoint {path}: {manifest.MANIFEST} is damaged ({said}: {STATE} says otherwise)")
    return Checkpoint(path, state, shapes, dtypes)


def _described(path: Path, files: Iterable[str]) -> tuple[dict[str, torch.Size], dict[str, torch.dtype]]:
    """Shape and type of every tensor, from the headers alone. Raises ValueError where shards do not fit together."""
    if _MODEL in files and _OPTIMIZER not in files:
        raise ValueError(f"{_OPTIMIZER} is missing")
    ends: dict[str, list[int]] = {}
    elements: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in files:
        if name == STATE:
            continue
        with safe_open(path / name, framework="pt") as file:
            shards = json.loads((file.metadata() or {}).get(_SHARDS, "{}")) if name.startswith("shard") else {}
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                part = file.get_slice(key)
                shape = part.get_shape()
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None or dtypes.setdefault(key, dtype) != dtype or ("|" in key and dtype != torch.float32):
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
    return {key: torch.Size(end) for key, end in ends.items()}, dtypes


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
