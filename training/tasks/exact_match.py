"""Exact-match accuracy of sums and products: every held-back problem of a data set, continued without chance.

An answer is right where its tokens are those of the data set, its end of line with them; whatever else comes is wrong.
Tokens are compared, not numbers, so nothing that reads like the answer passes for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from orchestrate.data.stream import Meta, TokenFile, find_folder, read_file, read_meta
from orchestrate.data.tokenizer import tells_apart
from orchestrate.model.generate import Choice, Continuation, evaluating
from orchestrate.training.run.run import Run
from orchestrate.training.run.sharding import reshard
from orchestrate.training.tasks.base import Task, task

_LONGEST_META = 4 * 2**20
_MOST_TOKENS = 10**7
_LIKELIEST = Choice(temperature=0)


class Problem(NamedTuple):
    """A line: what is given, up to `=`, and what is asked, the end of the line included."""

    length: int
    """Digits of the larger operand."""
    given: np.ndarray
    asked: np.ndarray


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The confidence interval of a share (Wilson 1927), of 95 % for the default z: (low, high)."""
    share, n = right / count, count
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact where all or none are right, whatever rounding makes of it.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


class ExactMatch(Task):
    """The share of the held-back problems of a data set of data/arithmetic.py that a model answers exactly.

    `eval/NAME_accuracy` is that of the lengths that the data set has, with `_low` and `_high`, the ends of its 95 %
    confidence interval, and `eval/NAME_accuracy/LENGTH` that of one length. Longer ones have a number of their own too
    and count in no other.
    """

    def __init__(self, source: str) -> None:
        folder = find_folder(source)
        if not (folder / "meta.json").is_file():
            raise ValueError(f"{folder}: no data set; make it with: python data/{self.name}/prepare.py")
        self.meta = read_meta(folder)
        facts = json.loads(read_file(folder / "meta.json", _LONGEST_META)).get("arithmetic")
        if not isinstance(facts, dict) or facts.get("kind") != self.name or self.meta.tokenizer != "char":
            raise ValueError(f"{folder}: meta.json names no problems of {self.name}")
        self._place = folder
        self.problems = self._read(source)
        self.lengths = sorted({problem.length for problem in self.problems})
        """Those that the data set has."""
        longer = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
        for length in (length for length in longer if length > self.lengths[-1]):
            self.problems += self._read(f"{folder / str(length)}")

    def _read(self, source: str) -> list[Problem]:
        folder = find_folder(source)
        meta, path = read_meta(folder), folder / "val.bin"
        if meta.itos != self.meta.itos:
            raise ValueError(f"{folder}: its characters are not those of {self._place}")
        file = TokenFile(path, meta.dtype)
        if len(file) > _MOST_TOKENS:
            raise ValueError(f"{path}: {len(file)} tokens are more than a test has (at most {_MOST_TOKENS})")
        ids = np.asarray(file.tokens[:])
        if ids.max() >= len(meta.itos) or any(len(text) != 1 for text in meta.itos):
            raise ValueError(f"{path}: damaged: its tokens are not characters of meta.json")
        text = "".join(meta.itos[i] for i in ids.tolist())
        found, end = [], 0
        for line in re.finditer(r"(\d{1,18})[+*](\d{1,18})=\d{1,36}\n", text, re.ASCII):
            if line.start() != end:
                break
            end, equals = line.end(), text.index("=", line.start()) + 1
            length = len(str(max(int(line[1]), int(line[2]))))
            found.append(Problem(length, ids[line.start() : equals], ids[equals:end]))
        if end != len(text) or not found:
            raise ValueError(f"{path}: damaged: character {end} begins no line like 12+34=64")
        return found

    @property
    def metrics(self) -> Sequence[str]:
        whole = [self.metric(f"accuracy{which}") for which in ("", "_low", "_high")]
        lengths = sorted({problem.length for problem in self.problems})
        return [*whole, *(self.metric(f"accuracy/{length}") for length in lengths)]

    def check(self, meta: Meta, block_size: int) -> str:
        longest = max(len(one.given) + len(one.asked) for one in self.problems) - 1
        if longest > block_size:
            return f"a problem of {self._place} takes {longest} tokens, more than block_size {block_size}"
        if meta.itos and meta.itos[: len(self.meta.itos)] == self.meta.itos:
            return ""
        if not meta.fingerprint or tells_apart(meta, self.meta):
            return f"{self._place} is written in other tokens than the model's"
        return ""

    def score(self, run: Run, poll: Callable[[], int]) -> dict[str, float] | None:
        ranks, problems = run.ranks, self.problems
        size = max(1, run.eval_batch_size * run.settings.model.block_size // 16)
        chunks = [range(first, min(first + size, len(problems))) for first in range(0, len(problems), size)]
        right = np.zeros(len(problems))
        try:
            with run.stopwatch.part("eval"):
                for mine, counts in ranks.turns(len(chunks)):
                    if poll():
                        return None
                    if mine is not None:
                        chunk = chunks[mine]
                        found = self._answered(run, [problems[number] for number in chunk])
                    if counts:
                        right[chunk] = found
                right = ranks.sum(right)
        finally:
            if ranks.sharded:
                reshard(run.model)
        return self._told(right)

    def _answered(self, run: Run, problems: Sequence[Problem]) -> list[bool]:
        """Whether each is answered exactly. As many passes through the model for any problems."""
        mapped = run.data.val.mapped
        given = [mapped(problem.given).tolist() for problem in problems]
        asked = [mapped(problem.asked).tolist() for problem in problems]
        steps = max(len(problem.asked) for problem in self.problems)
        said: list[list[int]] = [[] for _ in problems]
        with evaluating(run.model):
            rows = Continuation(run.model, len(given), max(map(len, given)) + steps)
            for prompt in given:
                rows.add(prompt, _LIKELIEST)
            for _ in range(steps):
                with run.autocast():
                    for row, token in rows.step().items():
                        said[row].append(token)
        return [mine[: len(right)] == right for mine, right in zip(said, asked, strict=True)]

    def _told(self, right: np.ndarray) -> dict[str, float]:
        lengths = np.array([problem.length for problem in self.problems])
        own = right[lengths <= self.lengths[-1]]
        low, high = wilson(int(own.sum()), len(own))
        found = [float(own.mean()), low, high, *(float(right[lengths == n].mean()) for n in np.unique(lengths))]
        return dict(zip(self.metrics, found, strict=True))


@task("adder")
class Adder(ExactMatch):
    """Sums: data/adder."""

    name: ClassVar[str]


@task("multiplier")
class Multiplier(ExactMatch):
    """Products: data/multiplier."""

    name: ClassVar[str]
