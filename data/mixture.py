"""The data sets that a run reads: one, or several with a share of the samples each. They speak one tokenizer.

Each source has an order of its own, keyed by the seed and its name, and a place of its own, which the cursor holds
(stream.py). Which source a sample is of follows from the weights alone (proportions.py). Nothing here knows torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from orchestrate.data.curriculum import Curriculum
from orchestrate.data.keeping import end_of_text_of, kept_with_data, named
from orchestrate.data.stream import Cursor, DataSet, Meta, Stream, windows_per_pass
from orchestrate.data.tokenizer import begins_with, tells_apart, tokenizer_of


class Sources(dict[str, DataSet]):
    """Opened data sets by name; the first is the one that a run's configuration names first."""

    @property
    def first(self) -> DataSet:
        return next(iter(self.values()))

    @property
    def speaks(self) -> DataSet:
        """The one whose tokenizer knows the tokens of all: of those with the largest vocabulary the first."""
        return max(self.values(), key=lambda data: data.meta.tokens)

    @property
    def meta(self) -> Meta:
        return self.speaks.meta

    def agreed(self) -> Sources:
        """The same. Raises ValueError for one that is written in tokens of another tokenizer than the others."""
        widest = self.speaks
        for name, data in self.items():
            if data is widest:
                continue
            wide, meta = widest.meta, data.meta
            same = not tells_apart(meta, wide) and meta.vocab_size == wide.vocab_size
            if not same and not extends(widest, meta):
                sizes = f"vocabularies of {meta.vocab_size} and {wide.vocab_size}"
                raise ValueError(
                    f"dataset {name} ({data.folder}) is written in tokens of {named(meta)}, and {widest.name} in those "
                    f"of {named(wide)} ({sizes}): the sources of a mixture share one tokenizer; prepare both with "
                    "--tokenizer of one of them"
                )
        return self

    def remapped(self, new_ids: np.ndarray | None) -> Sources:
        """The same files read through another map, from the ids that they are read as now to new ones."""
        return Sources((name, data.remapped(new_ids)) for name, data in self.items())

    @cached_property
    def _end_of_text(self) -> int:
        """The id that ends a document in the files of all. Raises ValueError."""
        ends = {name: end_of_text_of(data.meta, kept_with_data(data.folder)) for name, data in self.items()}
        for name, end in ends.items():
            if end is None:
                raise ValueError(
                    f"dataset {name} has no end-of-text token ({named(self[name].meta)}), so nothing says where a "
                    "document ends"
                )
        if len({*ends.values()}) > 1:
            told = ", ".join(f"{name} with token {end}" for name, end in ends.items())
            raise ValueError(f"the data sets end their documents differently: {told}")
        return next(iter(ends.values()))

    def document_end(self, vocabulary_map: Sequence[int] = ()) -> int:
        """The id that ends a document in all of them, read through a map of their ids.

        Raises ValueError where one has no such token, or another one, or where the map gives other tokens the same id.
        """
        end = self._end_of_text
        if not vocabulary_map:
            return end
        if end >= len(vocabulary_map) or vocabulary_map.count(vocabulary_map[end]) > 1:
            raise ValueError(
                f"the vocabulary map gives the end-of-text token {end} no id of its own, so nothing says where a "
                "document ends"
            )
        return vocabulary_map[end]

    def fingerprint(self) -> dict[str, str]:
        """Of each token file: train and val of the first, NAME/train and NAME/val of the others."""
        return {
            split if data is self.first else f"{name}/{split}": text
            for name, data in self.items()
            for split, text in data.fingerprint().items()
        }

    def stream(self, seed: int, alpha: float = 0.0) -> Stream | Mixture:
        """The order of the training samples, from rare tokens more often where alpha is above 0."""
        streams = {}
        for name, data in self.items():
            key = seed if data is self.first else _seed_of(seed, name)
            streams[name] = Curriculum(data.train, key, alpha) if alpha else Stream(data.train, key)
        return Mixture(streams) if len(streams) > 1 else next(iter(streams.values()))


def extends(data: DataSet, meta: Meta) -> bool:
    """Whether a data set's tokenizer is the one that a meta names with tokens added behind its last."""
    if not 0 < meta.tokens < data.meta.tokens:
        return False
    return begins_with(tokenizer_of(data.meta, kept_with_data(data.folder)), meta)


def _seed_of(seed: int, name: str) -> int:
    """A source's own seed: data sets of one length, in one order, would be read side by side."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Mixture:
    """The training samples of several data sets, taking turns. Holds no position, as `Stream` does not."""

    streams: Mapping[str, Stream]

    @property
    def masks(self) -> bool:
        """Whether targets of any source may be -1, which do not count."""
        return any(stream.masks for stream in self.streams.values())

    def batch(self, cursor: Cursor, count: int, vocab_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` samples from a place on, as `Stream.batch` gives them.

        Raises ValueError for a source that is not open.
        """
        if not cursor.sources:
            return next(iter(self.streams.values())).batch(cursor, count, vocab_size)
        turns = cursor.turns(count)
        x, y = np.empty((2, count, cursor.length), dtype=np.int64)
        for number, source in enumerate(cursor.sources):
            places = np.flatnonzero(turns == number)
            if len(places) and source.name not in self.streams:
                raise ValueError(f"data set {source.name} is not open; there are {', '.join(self.streams)}")
            if len(places):
                own = replace(cursor, sample=source.sample, sources=())
                x[places], y[places] = self.streams[source.name].batch(own, len(places), vocab_size)
        return x, y

    def own(self, name: str, cursor: Cursor) -> Cursor:
        """The place in one source: of samples that never were a mixture all are of the first."""
        if not cursor.sources and name == next(iter(self.streams)):
            return cursor
        sample = next((source.sample for source in cursor.sources if source.name == name), 0)
        return replace(cursor, sample=sample, sources=())

    def passes(self, cursor: Cursor) -> float:
        """How often all the data sets together have been seen, by their windows."""
        return self._share(
            cursor, {name: stream.passes(self.own(name, cursor)) for name, stream in self.streams.items()}
        )

    def coverage(self, cursor: Cursor) -> float:
        """The share of the windows of all data sets together seen at least once."""
        return self._share(
            cursor, {name: stream.coverage(self.own(name, cursor)) for name, stream in self.streams.items()}
        )

    def _share(self, cursor: Cursor, of_each: Mapping[str, float]) -> float:
        windows = {
            name: windows_per_pass(len(stream.tokens), cursor.block_size) for name, stream in self.streams.items()
        }
        return sum(of_each[name] * windows[name] for name in windows) / sum(windows.values())
