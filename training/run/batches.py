"""Batches of the training stream on the device, read ahead: nothing waits for a disk that is fast enough on average.

While a batch is computed on, a thread reads the next one from the files; on a GPU it is then copied there too. A batch
is a function of its place alone, so what was read ahead is what would have been read, or it is not used.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrate.data.mixture import Mixture, Sources
from orchestrate.data.stream import Cursor, Stream
from orchestrate.training.settings.errors import RefusedHere
from orchestrate.training.settings.records import Settings

_Asked = tuple[Stream | Mixture, Cursor, int, int | None]
_Read = tuple[np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """Samples on the device: token ids and the token that follows each, both (sequences, length) int64."""

    x: Tensor
    y: Tensor
    targets: int
    """How many of y count, known without asking the device."""


class Batches:
    """Reads samples of one or several data sets in the order of a seed.

    Attributes:
        opened: the data sets as they were opened.
        data: what is read: the same, through the vocabulary map in force.
        stream: the order of the training samples.
    """

    def __init__(self, opened: Sources, seed: int, device: torch.device, settings: Settings) -> None:
        self.opened, self.seed, self.device = opened, seed, device
        new_ids = settings.vocabulary_map
        self.data = opened.remapped(np.array(new_ids, dtype=np.int64) if new_ids else None)
        self.stream = self.data.stream(seed, settings.curriculum_alpha)
        self._prefetched: tuple[_Asked, Batch] | None = None
        self._ahead: tuple[_Asked, Future[_Read]] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")

    def following(self, settings: Settings) -> Batches:
        """The same data, read as these settings say: through their map, and as far by the rarity of tokens."""
        return Batches(self.opened, self.seed, self.device, settings)

    def read(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> Batch:
        """The next `count` samples from a place on, for a model of so many tokens. Raises RefusedHere for others."""
        if self._prefetched is not None and self._prefetched[0] == self._asked(cursor, count, vocab_size):
            batch, self._prefetched = self._prefetched[1], None
            return batch
        return self.load(cursor, count, vocab_size)

    def read_ahead(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> None:
        """Let the thread read a batch, for `read` or `prefetch` to take; one at a time."""
        asked = self._asked(cursor, count, vocab_size)
        self._ahead = asked, self._reader.submit(self.stream.batch, cursor, count, vocab_size)

    def prefetch(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> None:
        """Copy a batch to the GPU while it computes; a change of settings simply makes it unused."""
        self._prefetched = self._asked(cursor, count, vocab_size), self.load(cursor, count, vocab_size)

    def load(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> Batch:
        try:
            x, y = (torch.from_numpy(a) for a in self._read(cursor, count, vocab_size))
        except ValueError as error:
            raise RefusedHere(f"the data does not fit the model: {error}") from None
        targets = int((y != -1).sum()) if self.stream.masks else y.numel()
        if self.device.type == "cuda":
            x, y = (tensor.pin_memory().to(self.device, non_blocking=True) for tensor in (x, y))
        return Batch(x.to(self.device), y.to(self.device), targets)

    def _asked(self, cursor: Cursor, count: int, vocab_size: int | None) -> _Asked:
        return self.stream, cursor, count, vocab_size

    def _read(self, cursor: Cursor, count: int, vocab_size: int | None) -> _Read:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == self._asked(cursor, count, vocab_size):
            return ahead[1].result()
        return self.stream.batch(cursor, count, vocab_size)
