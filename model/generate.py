"""Text from a model, one token at a time: how a token is chosen, and sequences of unequal length that go on together.

Each sequence of a batch goes on as it would alone: it has its own positions, its own window and its own random numbers.
So what it says depends on the others by no more than the rounding of larger matrix products. Knows no tokenizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrate.model.gpt import GPT, Cache
from orchestrate.model.narrow import Linear

_COLDEST, _MILDEST, _HARSHEST = 1e-20, 1e-8, 1e8
"""Where temperatures and penalties begin or end to differ no more: beyond them finite logits would become infinite."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from its logits. What is set acts in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens that the sequence has, its prompt included, are divided by it where they
            are positive and multiplied where they are negative (Keskar et al. 2019, arXiv:1909.05858, as transformers
            has it); 1: none.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: one of the k likeliest tokens is drawn, and of those that are as likely as the last of them; 0: of all.
        top_p: one of the fewest likeliest tokens whose probabilities add up to it is drawn (nucleus sampling, Holtzman
            et al. 2020, arXiv:1904.09751); 1: of all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def filtered(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits to draw from, -inf for what is not drawn; float32, (batch, vocab) as given.

        Args:
            seen: the tokens that each sequence has, (batch, vocab) bool; needed where there is a penalty.
        """
        logits = logits.float()
        if self.repetition_penalty != 1.0:
            assert seen is not None
            penalty = min(max(self.repetition_penalty, _MILDEST), _HARSHEST)
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.temperature == 0:
            return logits
        logits = logits / max(self.temperature, _COLDEST)
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < torch.topk(logits, self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1.0:
            ascending, order = torch.sort(logits)
            least = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            least[:, -1] = False
            logits = logits.masked_fill(least.scatter(1, order, least), -torch.inf)
        return logits


def draw(logits: Tensor, uniform: Sequence[float]) -> Tensor:
    """A token for each row, (batch,) int64, by the inverse of the distribution function; -1 where logits are NaN.

    Args:
        logits: (batch, vocab).
        uniform: a number from [0, 1) for each row: the first token is drawn with which the probabilities exceed it.
    """
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    up_to = logits.double().softmax(-1).cumsum(-1)
    total = up_to[:, -1:]
    # The total is 1 up to rounding, so the product stays below it.
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * total
    found = torch.searchsorted(up_to, wanted, right=True)
    return torch.where(total.isnan(), -1, found)[:, 0]


@contextlib.contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def lay_out(model: GPT) -> None:
    """Lay the matrices out in memory as products with few rows read them fastest, for a model that only generates.

    Values and shapes stay: only which numbers are neighbours changes, for float32 on a CPU. The embedding stays.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()


class Continuation:
    """Sequences that go on together, by a token each at every step; others join and leave while they do.

    The model must be in evaluation mode, and its weights must stay as they are while there is a sequence.

    Once a sequence is longer than block_size its window slides, every position changes, and no cache can help: each of
    its tokens then costs a full forward pass. So it does once it is longer than `capacity`, and once dynamic NTK
    changes the frequencies with each token (cache_length of the configuration). transformers go on with keys that were
    turned by older ones, so what they say depends on where their cache began; here it is what an uncached forward pass
    says.

    Args:
        slots: how many sequences may go on at a time.
        capacity: tokens of a sequence that the cache has room for, at most cache_length (the default). It holds keys
            and values of slots * capacity tokens, whatever comes and goes.
        use_cache: keep keys and values. The result is that of computing every position anew.

    Attributes:
        tokens: number of each sequence that goes on -> its tokens so far, its prompt included.
    """

    def __init__(self, model: GPT, slots: int, capacity: int | None = None, use_cache: bool = True) -> None:
        self.model, self.slots = model, slots
        parameter = next(model.parameters())
        self.device = parameter.device
        # FSDP2 gathers weights where they will train: they must not be tensors that autograd never sees.
        self._mode = torch.no_grad if hasattr(parameter, "full_tensor") else torch.inference_mode
        self.tokens: dict[int, list[int]] = {}
        longest = model.config.cache_length
        capacity = min(longest if capacity is None else capacity, longest)
        self._cache = Cache(model.config, slots, capacity) if use_cache else None
        self._rows: list[int] = []  # the number of the sequence in each row of the cache, from the first row on
        self._rules: dict[int, tuple[Choice, np.random.Generator]] = {}
        self._seen: dict[int, Tensor] = {}  # of those with a penalty: the tokens that they have, (vocab,) bool
        self._added = 0

    @property
    def live(self) -> list[int]:
        """The numbers of the sequences that go on, in the order in which they were added."""
        return list(self.tokens)

    @property
    def free(self) -> int:
        """How many more sequences may be added now."""
        return self.slots - len(self.tokens)

    def add(self, prompt: Sequence[int], choice: Choice, seed: Sequence[int] = ()) -> int:
        """Let a sequence join at the next step, which computes its prompt; returns its number, from 0 on.

        A sequence goes on as it would alone, whatever goes on beside it, but for the rounding of larger matrix
        products.

        Args:
            prompt: token ids, one or more; of a long one the last block_size count.
            seed: of the random numbers of the sequence.
        """
        assert prompt and self.free, "an empty prompt" if self.free else f"all {self.slots} slots are taken"
        number = self._added
        self._added += 1
        self.tokens[number] = list(prompt)
        self._rules[number] = choice, np.random.default_rng(list(seed))
        if choice.repetition_penalty != 1.0:
            self._seen[number] = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            self._seen[number][torch.tensor(prompt, device=self.device)] = True
        return number

    def end(self, number: int) -> list[int]:
        """End a sequence, which frees its slot; its tokens."""
        with self._mode():
            self._leave(number)
        del self._rules[number]
        self._seen.pop(number, None)
        return self.tokens.pop(number)

    def step(self) -> dict[int, int]:
        """One more token for each sequence that goes on: number -> token, -1 where its logits are not finite.

        A sequence goes on with token 0 there, until it is ended. After an exception nothing may be asked of them.
        """
        found: dict[int, int] = {}
        with self._mode():
            for logits, numbers in self._logits():
                found.update(self._drawn(logits, numbers))
            for number, token in found.items():
                self.tokens[number].append(max(token, 0))
                if number in self._seen:
                    self._seen[number][max(token, 0)] = True
        return found

    def _drawn(self, logits: Tensor, numbers: list[int]) -> dict[int, int]:
        """A token for each row of the logits by the rule of its sequence, -1 where they are not finite."""
        found: dict[int, int] = {}
        for choice in dict.fromkeys(self._rules[number][0] for number in numbers):
            which = [row for row, number in enumerate(numbers) if self._rules[number][0] == choice]
            own = [numbers[row] for row in which]
            scores = logits if len(which) == len(numbers) else logits[torch.tensor(which, device=self.device)]
            seen = torch.stack([self._seen[number] for number in own]) if choice.repetition_penalty != 1.0 else None
            scores = choice.filtered(scores, seen)
            if choice.temperature == 0:
                most, drawn = (part.tolist() for part in scores.max(-1))
                drawn = [token if math.isfinite(score) else -1 for score, token in zip(most, drawn, strict=True)]
            else:
                drawn = draw(scores, [self._rules[number][1].random() for number in own]).tolist()
            found.update(zip(own, drawn, strict=True))
        return found

    def _logits(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Logits of the next token, (batch, vocab), and the numbers of the sequences that they are of, by passes."""
        cache, room = self._cache, self._cache.capacity if self._cache else 0
        for number in [number for number in self._rows if len(self.tokens[number]) > room]:
            self._leave(number)
        known, others = len(self._rows), []
        for number in sorted(self.tokens.keys() - self._rows):
            (self._rows if len(self.tokens[number]) <= room else others).append(number)
        for first, numbers in ((0, self._rows[:known]), (known, self._rows[known:])):
            if numbers:
                new = [self.tokens[n][cache.lengths[row] :] for row, n in enumerate(numbers, first)]
                yield self._extend(new, cache, first), numbers
        if others:
            yield self._extend([self.tokens[n][-self.model.config.block_size :] for n in others], None), others

    def _extend(self, new: list[list[int]], cache: Cache | None, first: int = 0) -> Tensor:
        counts = [len(tokens) for tokens in new]
        filled = [tokens + [0] * (max(counts) - len(tokens)) for tokens in new]
        return self.model.extend(torch.tensor(filled, device=self.device), counts, cache, first)

    def _leave(self, number: int) -> None:
        """Take a sequence out of the cache. The last one goes into its row, so that there is no gap."""
        if number in self._rows:
            row, last = self._rows.index(number), len(self._rows) - 1
            if row != last:
                self._rows[row] = self._rows[last]
                self._cache.fill(row, self._cache, last, self._cache.lengths[last])
            self._rows.pop()
            self._cache.free(last)
