"""Whole documents packed into rows of equal length: best fit decreasing, within a buffer.

Among some millions of tokens the longest document is placed first, each in the fullest row that has room for it (best
fit decreasing, Johnson 1973; for documents Ding et al. 2024). A document that fits a row is never torn. A longer one is
cut into full rows, and its end is placed like a document. What is left of a row is filled with padding.
The loss leaves out padding and the first token behind each seam: no document predicts another.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np

BUFFER = 2**22
"""Tokens."""


class Packer:
    """Takes documents and gives rows.

    Args:
        length: of a row in tokens.
        padding: the id that fills a row.
    """

    def __init__(self, length: int, padding: int) -> None:
        self.length, self.padding = length, padding
        self.rows = self.padded = 0
        self._open: list[tuple[np.ndarray, np.ndarray]] = []
        self._open_size = self._buffered = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def push(self, ids: np.ndarray, counts: np.ndarray, ends: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A document, or a piece of one that does not end here; yields rows that are full, as (ids, counts)."""
        self._open.append((ids, counts))
        self._open_size += len(ids)
        if not ends and self._open_size < self.length:
            return
        ids, counts = (np.concatenate(parts) for parts in zip(*self._open, strict=True))
        cut = len(ids) - len(ids) % self.length
        for start in range(0, cut, self.length):
            yield self._row([(ids[start : start + self.length], counts[start : start + self.length])])
        rest = (ids[cut:], counts[cut:])
        self._open, self._open_size = ([], 0) if ends else ([rest], len(rest[0]))
        if ends and len(rest[0]):
            self._waiting.append(rest)
            self._buffered += len(rest[0])
            if self._buffered >= BUFFER:
                yield from self.flush()

    def flush(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of all documents that wait."""
        rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
        room: list[tuple[int, int]] = []  # what is left of a row, and its number; sorted
        for item in sorted(self._waiting, key=lambda item: -len(item[0])):
            size = len(item[0])
            place = bisect.bisect_left(room, (size, 0))
            if place == len(room):
                rows.append([])
                left, number = self.length, len(rows) - 1
            else:
                left, number = room.pop(place)
            rows[number].append(item)
            if left > size:
                bisect.insort(room, (left - size, number))
        self._waiting, self._buffered = [], 0
        for row in rows:
            yield self._row(row)

    def _row(self, items: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(self.length, self.padding, dtype=items[0][0].dtype)
        counts = np.zeros(self.length, dtype=bool)
        at = 0
        for some, counted in items:
            ids[at : at + len(some)], counts[at : at + len(some)] = some, counted
            counts[at] = False
            at += len(some)
        self.rows += 1
        self.padded += self.length - at
        return ids, counts
