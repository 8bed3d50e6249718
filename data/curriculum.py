"""Sampling by the rarity of tokens: between the data as it is (alpha 0) and all tokens alike (alpha 1).

As in the orchestrator fork the aim at alpha is the distribution (1 - alpha) * natural + alpha * uniform over the tokens
that occur. A window can only be drawn whole, so the aim is approached and not met: a window weighs the mean of
aim / natural over its tokens, and windows are drawn in proportion to that.

The draw is a pure function of (seed, alpha, sample index), with no table of windows: the order of a pass is cut into
groups of GROUP windows, and a group's samples are drawn among its windows by systematic resampling (each window as
often as its share of the group says, rounded down or up). So a group costs reading its windows once more, whatever the
size of the file. At alpha near 0 every window comes once, in the order that it has without a curriculum. Above it some
come several times in a pass and some not at all, and `coverage` counts them as if they had come.

The natural distribution is that of 64 evenly spaced samples of 64 KiB, the whole of a short file; a token that is not
among them counts as seen once. Nothing here knows torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from orchestrate.data.stream import Stream, TokenFile, unit_float, window_starts, windows_per_pass

GROUP = 64
_KEY = 0x5EED_CA_4417


@functools.lru_cache(maxsize=64)
def _rarity(tokens: TokenFile) -> np.ndarray:
    """Uniform over natural, by token id as it is in the file; the last is that of all larger ids. float64."""
    counts = np.bincount(tokens.stored())
    kinds, total = np.count_nonzero(counts), counts.sum()
    return total / (kinds * np.append(np.maximum(counts, 1), 1))


@functools.lru_cache(maxsize=64)
def _group(tokens: TokenFile, seed: int, alpha: float, number: int, group: int, block_size: int) -> np.ndarray:
    """First tokens of the samples of one group of a pass, in their order, int64."""
    n = windows_per_pass(len(tokens), block_size)
    size = min(GROUP, n - group * GROUP)
    starts = window_starts(seed, number * n + group * GROUP, size, len(tokens), block_size, tokens.row)
    rarity = _rarity(tokens)
    ids = tokens.tokens[starts[:, None] + np.arange(block_size)]
    weights = (1.0 - alpha) + alpha * rarity[np.minimum(ids, len(rarity) - 1)].mean(axis=1)
    ends = np.cumsum(weights) * (size / weights.sum())
    places = np.arange(size) + unit_float(seed ^ _KEY, number * (-(-n // GROUP)) + group)
    return starts[np.minimum(np.searchsorted(ends, places, side="right"), size - 1)]


@dataclass(frozen=True)
class Curriculum(Stream):
    """The training samples of a file, those of rare tokens more often."""

    alpha: float = 0.0

    def _starts(self, first: int, count: int, block_size: int) -> np.ndarray:
        n = windows_per_pass(len(self.tokens), block_size)
        starts = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number, place = divmod(first + done, n)
            group, inside = divmod(place, GROUP)
            drawn = _group(self.tokens, self.seed, self.alpha, number, group, block_size)[inside:][: count - done]
            starts[done : done + len(drawn)] = drawn
            done += len(drawn)
        return starts
