"""Sums and products as lines of text, and the data sets made of them: data/adder and data/multiplier.

A line is `012+345=7530`: operands with zeros in front, and the result with its last digit first, so that a digit needs
only carries that are known (Lee et al. 2023, arXiv:2307.03381). The loss counts the result and the end of its line.
Lines of one width are equally long; their windows need not begin with a line. The side of a pair is a pure function of
(seed, pair) whatever its order and the number of digits, so a+b and b+a are on one side in every set of that seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrate.data.files import mask_of, packed
from orchestrate.data.prepare import write_meta, write_tokens, write_whole
from orchestrate.data.stream import permute
from orchestrate.data.tokenizer import CharTokenizer

CHARACTERS = "\n*+=0123456789"
"""Those of both data sets, so that one model can learn both."""
MOST_DIGITS = 9
"""The product of two such numbers is below 2**63."""
_PAIRS = 10 ** (2 * MOST_DIGITS)
_OFTEN = 20
"""A short length has few pairs: of its training lines there are at most so many a pair."""


class Problems(NamedTuple):
    """Operands, each (count,) int64."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class Arithmetic:
    """What a problem is: `sign` and the digits that a result may have."""

    name: str
    sign: str

    def results(self, problems: Problems) -> np.ndarray:
        return problems.a + problems.b if self.sign == "+" else problems.a * problems.b

    def result_digits(self, width: int) -> int:
        return width + 1 if self.sign == "+" else 2 * width

    def lines(self, problems: Problems, width: int, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        """(characters, whether the loss counts them), each (count, characters of a line)."""
        result = _digits(self.results(problems), self.result_digits(width))
        parts = [
            _digits(problems.a, width),
            self.sign,
            _digits(problems.b, width),
            "=",
            result[:, ::-1] if reverse else result,
            "\n",
        ]
        count = len(problems.a)
        columns = [np.full((count, 1), ord(part)) if isinstance(part, str) else part for part in parts]
        lines = np.concatenate(columns, axis=1)
        counts = np.zeros(lines.shape, dtype=bool)
        counts[:, 2 * width + 2 :] = True
        return lines, counts


ADDER, MULTIPLIER = Arithmetic("adder", "+"), Arithmetic("multiplier", "*")


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """The decimal digits as characters, (count, width), the highest first."""
    return numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")


class Split:
    """Which pairs are for validation.

    Args:
        share: of the pairs. It is raised until one pair of single digits is among them.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._seed = seed
        self._edge = max(int(share * _PAIRS), int(self._places(all_pairs(1)).min()) + 1)

    def _places(self, problems: Problems) -> np.ndarray:
        low, high = np.minimum(*problems), np.maximum(*problems)
        return permute(low * 10**MOST_DIGITS + high, _PAIRS, self._seed, 0)

    def held_back(self, problems: Problems) -> np.ndarray:
        """Whether each is for validation, (count,) bool."""
        return self._places(problems) < self._edge


def all_pairs(length: int) -> Problems:
    """Every pair once whose larger number has so many digits."""
    numbers = np.arange(10**length)
    a, b = np.triu_indices(len(numbers))
    longest = b >= (10 ** (length - 1) if length > 1 else 0)
    return Problems(a[longest].astype(np.int64), b[longest].astype(np.int64))


def _drawn(length: int, count: int, rng: np.random.Generator) -> Problems:
    """At most so many problems whose larger number has `length` digits."""
    a, b = rng.integers(0, 10**length, (2, count))
    longest = np.maximum(a, b) >= (10 ** (length - 1) if length > 1 else 0)
    return Problems(a[longest], b[longest])


def training_problems(length: int, count: int, split: Split, rng: np.random.Generator) -> Problems:
    """So many problems that are not held back, some of them more than once."""
    found = [np.zeros((2, 0), dtype=np.int64)]
    while sum(part.shape[1] for part in found) < count:
        drawn = _drawn(length, 2 * count, rng)
        found.append(np.stack(drawn)[:, ~split.held_back(drawn)])
    return Problems(*np.concatenate(found, axis=1)[:, :count])


def held_back_problems(length: int, count: int, split: Split, rng: np.random.Generator) -> Problems:
    """At most so many problems that are held back, no pair twice, each in an order by chance."""
    pairs = all_pairs(length) if length <= 3 else _drawn(length, 100_000, rng)
    held = np.sort(np.stack(pairs)[:, split.held_back(pairs)], axis=0)
    unique = rng.permutation(np.unique(held, axis=1), axis=1)[:, :count]
    return Problems(*np.where(rng.integers(0, 2, unique.shape[1], dtype=bool), unique, unique[::-1]))


# ---------------------------------------------------------------------------------------------- data sets


class _Lines(NamedTuple):
    ids: np.ndarray
    counts: np.ndarray


def _write(folder: Path, name: str, lines: _Lines, vocab_size: int) -> None:
    path = folder / f"{name}.bin"
    write_whole(mask_of(path), packed(lines.counts.reshape(-1)))
    write_tokens(path, lines.ids.reshape(-1), vocab_size)


def prepare(
    kind: Arithmetic,
    out: Path,
    *,
    digits: int,
    longer: int = 1,
    reverse: bool = True,
    limit: int = 500_000,
    test: int = 1000,
    val: float = 0.1,
    seed: int = 1337,
) -> None:
    """Make the data sets of problems with 1 to `digits` digits, and of longer ones. Raises ValueError.

    `out` has problems of all lengths up to `digits`, each length twice as often as the one before, and `out`/LENGTH
    those of one length, `longer` lengths beyond `digits` too. Shorter numbers are as wide as those of `digits` digits.

    Args:
        limit: training problems of each set at most.
        test: held back problems of each length at most.
        val: the share of all pairs that is held back.
    """
    problems = [
        f"--{name} must be from {low} to {high}, got {value}"
        for name, value, low, high in (
            ("digits", digits, 1, MOST_DIGITS), ("longer", longer, 0, MOST_DIGITS - digits),
            ("limit", limit, 1000, 10**8), ("test", test, 1, 10**4), ("seed", seed, 0, 2**63 - 1),
        )
        if not low <= value <= high
    ]  # fmt: skip
    if not 0 < val < 1:
        problems.append(f"--val must be above 0 and below 1, got {val}")
    if problems:
        raise ValueError("; ".join(problems))
    tokenizer, split = CharTokenizer.of(CHARACTERS), Split(seed, val)
    ids = np.zeros(128, dtype=np.uint16)
    ids[[ord(c) for c in tokenizer.itos]] = np.arange(tokenizer.vocab_size)

    def lines(parts: Sequence[Problems], width: int, rng: np.random.Generator) -> _Lines:
        """The lines of several, mixed."""
        together = Problems(*np.concatenate([np.stack(part) for part in parts], axis=1))
        characters, counts = kind.lines(together, width, reverse)
        order = rng.permutation(len(characters))
        return _Lines(ids[characters[order]], counts[order])

    def write(folder: Path, train: _Lines, val_lines: _Lines, lengths: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.bin").unlink(missing_ok=True)  # written last: a folder that has it is whole
        counts = {"train": len(train.ids), "val": len(val_lines.ids)}
        facts = dict(kind=kind.name, lengths=list(lengths), reverse=reverse, seed=seed, share=val, problems=counts)
        write_meta(
            folder,
            tokenizer,
            masks=["train", "val"],
            row=train.ids.shape[1],
            arithmetic=facts,
            source="generated",
            licence="none needed",
        )
        for name, some in (("val", val_lines), ("train", train)):
            _write(folder, name, some, tokenizer.vocab_size)
        print(f"{folder}: {counts['train']:,} problems for training, {counts['val']:,} held back")

    held, trained = {}, {}
    for length in range(1, digits + longer + 1):
        rng, width = np.random.default_rng([seed, length]), max(length, digits)
        pairs = 10 ** (2 * length) - (10 ** (2 * length - 2) if length > 1 else 0)
        count = min(limit, _OFTEN * pairs)
        held[length] = held_back_problems(length, test, split, rng)
        trained[length] = training_problems(length, count, split, rng)
        one = ([trained[length]], width, rng), ([held[length]], width, rng)
        write(out / str(length), lines(*one[0]), lines(*one[1]), [length])
    rng, upto = np.random.default_rng([seed, 0]), range(1, digits + 1)
    parts = [Problems(*np.stack(trained[n])[:, : -(-limit * 2**n // (2 ** (digits + 1) - 2))]) for n in upto]
    write(out, lines(parts, digits, rng), lines([held[n] for n in upto], digits, rng), upto)


def main(kind: Arithmetic, description: str, default_out: Path, digits: int) -> None:
    """What prepare.py does. Raises ValueError."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=default_out, help="folder for train.bin, val.bin, meta.json")
    parser.add_argument("--digits", type=int, default=digits, help=f"of the longest operands (default {digits})")
    parser.add_argument(
        "--longer", type=int, default=1, help="so many lengths beyond, as sets of their own (default 1)"
    )
    parser.add_argument("--plain", action="store_true", help="the result's first digit first")
    parser.add_argument("--limit", type=int, default=500_000, help="problems for training (default 500000)")
    parser.add_argument("--test", type=int, default=1000, help="problems held back of each length (default 1000)")
    parser.add_argument("--val", type=float, default=0.1, help="share of all pairs that is held back (default 0.1)")
    parser.add_argument("--seed", type=int, default=1337, help="of the problems and of what is held back")
    given = vars(parser.parse_args())
    out, plain = given.pop("out"), given.pop("plain")
    prepare(kind, out, reverse=not plain, **given)
