"""Token files and their loss masks on disk: memory-mapped, several of them read as one sequence.

A mask is one bit a token, the lowest bit of a byte first: whether the loss of predicting that token counts. Nothing is
read before it is asked for, and nothing is copied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MASK = ".mask.bin"
"""train.mask.bin is the mask of train.bin."""
MOST_FILES = 2**16
"""Of train, or of val."""


class Bits:
    """A mask of so many tokens. Raises ValueError for a file that is missing or of another length."""

    dtype = np.dtype(bool)

    def __init__(self, path: str | Path, length: int) -> None:
        self._length = length
        try:
            size = Path(path).stat().st_size
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if size != -(-length // 8):
            raise ValueError(f"{path}: {size} bytes are no mask of {length} tokens ({-(-length // 8)} bytes)")
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        if length % 8 and int(self.bytes[-1]) >> length % 8:
            raise ValueError(f"{path}: damaged: bits are set behind the last of {length} tokens")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            where = np.arange(*where.indices(self._length))
        return (self.bytes[where >> 3] >> (where & 7).astype(np.uint8) & 1).astype(bool)


class Joined:
    """Arrays or masks one behind the other, read as one; of their own type, read by slices and arrays of indices."""

    def __init__(self, parts: Sequence[np.ndarray | Bits]) -> None:
        self.parts = tuple(parts)
        self.dtype = parts[0].dtype
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            where = np.arange(*where.indices(len(self)))
        if where.size and not 0 <= where.min() <= where.max() < len(self):
            raise IndexError(f"there are {len(self)} tokens")
        found = np.empty(where.shape, dtype=self.dtype)
        belongs = np.searchsorted(self.starts, where, side="right") - 1
        for number in np.unique(belongs):
            here = belongs == number
            found[here] = self.parts[number][where[here] - self.starts[number]]
        return found


def mask_of(path: Path) -> Path:
    """Where the mask of a token file lies."""
    return path.with_suffix(MASK)


def packed(counts: np.ndarray) -> bytes:
    """A mask as it lies in its file."""
    return np.packbits(counts.astype(bool), bitorder="little").tobytes()
