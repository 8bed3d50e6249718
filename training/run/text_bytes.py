"""How many bytes of text an evaluation's targets stand for, so that losses of different tokenizers compare.

Bits per byte are the loss of all targets in bits over the bytes of their text (UTF-8; control tokens add none). The
windows of an evaluation are fixed, so their bytes are a number of the data set, which each rank finds by itself.
"""

from __future__ import annotations

import math

import numpy as np

from orchestrate.data.keeping import at_hand
from orchestrate.data.stream import DataSet, TokenFile, eval_windows
from orchestrate.data.tokenizer import byte_counts

_WINDOWS = 256
"""Windows that are looked at together."""


def bytes_per_target(tokens: TokenFile, counts: np.ndarray, windows: int, block_size: int) -> float:
    """The mean over the targets that count, in the windows that `evaluation.validation_loss` looks at.

    Args:
        counts: bytes of each id as it is in the file.
    """
    starts = eval_windows(tokens, windows, block_size)
    known = np.append(counts, 0)  # an id beyond them has no text
    total = targets = 0
    for first in range(0, len(starts), _WINDOWS):
        places = starts[first : first + _WINDOWS, None] + np.arange(1, block_size + 1)
        found = known[np.minimum(tokens.tokens[places].astype(np.int64), len(counts))]
        mask = np.ones(found.shape, bool) if tokens.mask is None else tokens.mask[places].astype(bool)
        total, targets = total + int(found[mask].sum()), targets + int(mask.sum())
    return total / targets if targets else 0.0


class TextBytes:
    """Of the data sets of a run. What has been found is kept.

    Attributes:
        missing: data set -> why there are no bits per byte of it.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._means: dict[tuple[str, int, int], float] = {}

    def bits_per_byte(self, data: DataSet, loss: float, windows: int, block_size: int) -> float | None:
        """Of a validation loss in nats per target; None where nobody can tell.

        Args:
            data: as it was opened, whatever vocabulary map is in force now.
        """
        if data.name not in self._counts and data.name not in self.missing:
            try:
                self._counts[data.name] = byte_counts(at_hand(data))
            except ValueError as error:
                self.missing[data.name] = str(error)
        if data.name in self.missing:
            return None
        key = data.name, windows, block_size
        if key not in self._means:
            self._means[key] = bytes_per_target(data.val, self._counts[data.name], windows, block_size)
        mean = self._means[key]
        return loss / math.log(2) / mean if mean else None
