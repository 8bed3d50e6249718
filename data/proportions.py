"""Whose turn it is: the sources of a mixture take turns so that each has its share of any stretch of samples.

Tijdeman's rule (1980, "The chairman assignment problem"): of the sources that may be drawn without running too far
ahead, the next is the one that would fall too far behind the soonest. After any number n of samples a source of weight
w has been drawn within 1 - 1/(2K - 2) of n w times, K being the sources with a weight; no rule does better. So any
stretch of samples, wherever it begins, has each of two sources within one of its share, and each of more within two.

Everything is counted in whole numbers, so the turns are the same on every machine. They are a pure function of weights
and debts. Knows no files.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

UNITS = 2**32
"""What the weights of a mixture add up to: a sample is so many units."""


def in_units(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers that add up to UNITS, by largest remainders. Raises ValueError where there are none."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    if total <= 0 or min(exact) < 0:
        raise ValueError("the weights of a mixture are numbers of at least 0, and one of them is above it")
    shares = [weight * UNITS / total for weight in exact]
    units = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: units[i] - shares[i])[: UNITS - sum(units)]:
        units[i] += 1
    return tuple(units)


def turns(units: tuple[int, ...], debts: tuple[int, ...], count: int) -> np.ndarray:
    """Which source each of the next `count` samples is of, (count,) int64.

    Args:
        units: of each source, as `in_units` gives them; one of 0 has no turn.
        debts: how far each is behind, in units: what it was due less UNITS for each sample drawn.
    """
    active = [i for i, unit in enumerate(units) if unit]
    if len(active) == 1:
        return np.full(count, active[0], dtype=np.int64)
    return _sequence(units, debts).first(count)


class _Sequence:
    """The turns from one place on, as far as anybody has asked."""

    def __init__(self, units: tuple[int, ...], debts: tuple[int, ...]) -> None:
        self._units = {i: unit for i, unit in enumerate(units) if unit}
        self._debts = {i: debts[i] for i in self._units}
        self._turns: list[int] = []
        self._lock = threading.Lock()  # batches may be read ahead by a thread

    def first(self, count: int) -> np.ndarray:
        with self._lock:
            while len(self._turns) < count:
                self._turns.append(self._next())
            return np.array(self._turns[:count], dtype=np.int64)

    def _next(self) -> int:
        units, debts = self._units, self._debts
        scale = 2 * len(units) - 2
        for i, unit in units.items():
            debts[i] += unit
        # Nobody may be ahead by more than 1 - 1/scale. After a change of weights it can be that all would.
        may = [i for i in units if scale * debts[i] >= UNITS] or list(units)
        chosen = min(may, key=lambda i: -((scale * debts[i] - (scale - 1) * UNITS) // (scale * units[i])))
        debts[chosen] -= UNITS
        return chosen


_sequence = functools.lru_cache(maxsize=16)(_Sequence)
