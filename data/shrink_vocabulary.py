"""A smaller vocabulary for a data set: the tokens that it uses most keep a place, all others share the rare token's.

    python data/shrink_vocabulary.py NAME [NAME ...] --keep 8191 --out map.npy

writes the map that `vocab_remapping_file` reads, and prints the two keys that a run needs. New ids follow the order of
the old ones, and the last stands for every token that was dropped (or `--rare ID`, a token of the data that is kept and
stands for them too). `disable_vocab_remapping` in a schedule undoes it: each kept token has its own id and row again.
Counts the tokens of the training files alone, piece by piece.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.data.mixture import Sources  # noqa: E402
from orchestrate.data.prepare import run  # noqa: E402
from orchestrate.data.stream import TokenFile, open_data  # noqa: E402

_PIECE = 2**24


def counts_of(tokens: TokenFile, size: int) -> np.ndarray:
    """How often each of `size` ids occurs, (size,) int64. Raises ValueError for an id beyond them."""
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, len(tokens), _PIECE):
        found = np.bincount(tokens.tokens[start : start + _PIECE], minlength=size)
        if len(found) > size:
            raise ValueError(f"{tokens.path}: token id {len(found) - 1} is beyond the vocabulary of {size}")
        counts += found
    return counts


def shrunken(counts: np.ndarray, keep: int, rare: int | None = None) -> np.ndarray:
    """The new id of each old one, (len(counts),) int64: of the `keep` most frequent their own, in their old order.

    Args:
        rare: a kept token that stands for those that are dropped; None gives them an id behind the kept ones.

    Of tokens that are equally frequent those of small ids are kept. Raises ValueError where nothing would be dropped.
    """
    if not 1 <= keep < len(counts):
        raise ValueError(f"--keep must be from 1 to {len(counts) - 1}, as the vocabulary has {len(counts)}, got {keep}")
    if rare is not None and not 0 <= rare < len(counts):
        raise ValueError(f"--rare must be an id below {len(counts)}, got {rare}")
    order = np.argsort(-counts, kind="stable")
    kept = order[:keep]
    if rare is not None and rare not in kept:
        kept = np.append(kept[:-1], rare)
    new_ids = np.full(len(counts), -1, dtype=np.int64)
    new_ids[np.sort(kept)] = np.arange(keep)
    new_ids[new_ids < 0] = keep if rare is None else new_ids[rare]
    return new_ids


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="+", help="names under data/ or folders; several are counted together")
    parser.add_argument("--keep", type=int, required=True, help="how many tokens keep a place of their own")
    parser.add_argument("--rare", type=int, help="a token of the data that stands for those that are dropped")
    parser.add_argument("--out", required=True, help="the file to write, .npy")
    given = parser.parse_args(arguments)
    if not given.out.endswith(".npy"):
        raise ValueError(f"--out must end in .npy, got {given.out}")
    data = Sources((name, open_data(name, 1)) for name in given.dataset).agreed()
    size = data.meta.vocab_size
    if not size:
        raise ValueError(f"dataset {given.dataset[0]}: its meta gives no vocab_size")
    counts = np.sum([counts_of(one.train, size) for one in data.values()], axis=0)
    new_ids = shrunken(counts, given.keep, given.rare)
    np.save(given.out, new_ids)
    dropped = counts[np.bincount(new_ids)[new_ids] > 1].sum()
    kept = int(new_ids.max()) + 1
    print(f"{kept} of {size} ids; {100 * dropped / counts.sum():.2f} % of the training tokens share the rare one")
    rare = "" if given.rare is None else f", value: {{rare: {given.rare}}}"
    print(f"to undo it in a schedule: {{name: disable_vocab_remapping{rare}}}")
    print(f"--shrunken_vocab_size={kept} --vocab_remapping_file={given.out}")


if __name__ == "__main__":
    run(main)
