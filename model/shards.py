"""The tensors of a folder of safetensors files: what they are called and their shapes at once, values one by one.

Nothing is kept of a value after it was read, and a file is open only while one is: a model of any size is read in the
memory of its parameters and one tensor. Files that could run something when they are read (pickles) never are.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = ("F32", "BF16", "F16")
_FEW = 5
"""How many names one message gives."""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


class Shards:
    """The tensors of one file, or of all those of a folder. Raises ValueError, one message for each kind of damage.

    Attributes:
        shapes: of each tensor, by name.
    """

    def __init__(self, source: str | Path) -> None:
        source = Path(source)
        self.shapes: dict[str, torch.Size] = {}
        self._file: dict[str, Path] = {}
        listed = {} if source.is_file() or (source / WHOLE).is_file() else _index(source)
        files = sorted({source / file for file in listed.values()}) or [source / WHOLE if source.is_dir() else source]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{source}: {INDEX} names {_some(missing)}, and there is no such file")
        for file in files:
            self._look_into(file)
        if lost := [name for name, file in listed.items() if self._file.get(name) != source / file]:
            raise ValueError(f"{source}: tensors are not in the files that {INDEX} names: {_some(lost)}")

    def _look_into(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 (it is no mapping)
                    part = content.get_slice(name)
                    if part.get_dtype() not in _TYPES:
                        raise ValueError(
                            f"{file}: {name} holds numbers of type {part.get_dtype()}; allowed are {', '.join(_TYPES)}"
                        )
                    if name in self._file:
                        raise ValueError(f"{file}: {name} is also in {self._file[name].name}")
                    self.shapes[name], self._file[name] = torch.Size(part.get_shape()), file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or cut short ({error})") from None

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored; its memory is the file's, and goes with the last reference to it."""
        file = self._file[name]
        try:
            with safe_open(file, framework="pt") as content:
                return content.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: {name} cannot be read ({error})") from None


def _index(folder: Path) -> dict[str, str]:
    """Name of a tensor -> its file, as the index of a folder of several files says."""
    if not (folder / INDEX).is_file():
        if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
            raise ValueError(
                f"{folder}: {pickles[0]} is a pickle, which could run anything and is never read; where you trust it, "
                'convert it: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
            )
        raise ValueError(f"{folder}: there are no weights; looked for {WHOLE} and {INDEX}")
    try:
        listed = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        if not listed or not all(Path(file).name == file for file in listed.values()):
            raise ValueError("weight_map gives each tensor the name of a file in this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: not an index of safetensors files ({error})") from None
    return listed
