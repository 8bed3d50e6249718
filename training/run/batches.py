"""Batches of the training stream on the device; on a GPU the next one is copied while the present one computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from orchestrate.data.stream import DataSet, Stream

Batch = tuple[Tensor, Tensor]
"""Token ids and the token that follows each, both (sequences, length) int64."""


class Batches:
    """Reads samples of a data set in the order of a seed.

    Attributes:
        opened: the data set as it was opened.
        data: what is read: the same, through the vocabulary map in force.
        stream: the order of the training samples.
    """

    def __init__(self, opened: DataSet, seed: int, device: torch.device) -> None:
        self.opened, self.seed, self.device = opened, seed, device
        self._prefetched: tuple[tuple[int, ...], Batch] | None = None
        self.map_vocabulary(())

    def map_vocabulary(self, new_ids: tuple[int, ...]) -> None:
        """Read every token of the files as its new id from here on; () reads them as they are."""
        self.data = self.opened.remapped(np.array(new_ids, dtype=np.int64) if new_ids else None)
        self.stream = Stream(self.data.train, self.seed)
        self._prefetched = None

    def read(self, first: int, count: int, block_size: int, length: int) -> Batch:
        """Samples first .. first + count - 1 of windows of block_size tokens cut into pieces of `length`."""
        key = (first, count, block_size, length)
        if self._prefetched is not None and self._prefetched[0] == key:
            batch, self._prefetched = self._prefetched[1], None
            return batch
        return self.load(*key)

    def prefetch(self, first: int, count: int, block_size: int, length: int) -> None:
        """Copy a batch to the GPU while it computes; a change of settings simply makes it unused."""
        key = (first, count, block_size, length)
        self._prefetched = (key, self.load(*key))

    def load(self, first: int, count: int, block_size: int, length: int) -> Batch:
        x, y = (torch.from_numpy(a) for a in self.stream.batch(first, count, block_size, length))
        if self.device.type == "cuda":
            return (
                x.pin_memory().to(self.device, non_blocking=True),
                y.pin_memory().to(self.device, non_blocking=True),
            )
        return x.to(self.device), y.to(self.device)
