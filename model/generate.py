"""Text from a model, one token at a time: how a token is chosen, and sequences of unequal length that go on together.

Each sequence of a batch goes on as it would alone: it has its own positions, its own window and its own random numbers.
So what it says depends on the others by no more than the rounding of larger matrix products. Knows no tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrate.model.gpt import GPT, Cache


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
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
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


class Continuation:
    """Sequences that go on together, by a token each at every step. The model must be in evaluation mode.

    Once a sequence is longer than block_size its window slides, every position changes, and no cache can help: each of
    its tokens then costs a full forward pass. So it does once dynamic NTK changes the frequencies with each token
    (cache_length of the configuration). transformers go on with keys that were turned by older ones, so what they say
    depends on where their cache began; here it is what an uncached forward pass says.

    Args:
        prompts: token ids of each sequence, one or more; of a long one the last block_size count.
        seeds: of the random numbers of each sequence.
        room: how many tokens will be asked for at most.
        use_cache: keep keys and values. The result is that of computing every position anew.

    Attributes:
        tokens: the sequences so far, their prompts included.
        live: the numbers of those that go on.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        choice: Choice,
        seeds: Sequence[Sequence[int]],
        room: int,
        use_cache: bool = True,
    ) -> None:
        self.model, self.choice = model, choice
        self.device = next(model.parameters()).device
        self.tokens = [list(prompt) for prompt in prompts]
        self.live = list(range(len(prompts)))
        self._random = [np.random.default_rng(list(seed)) for seed in seeds]
        limit = model.config.cache_length
        self._cached = [row for row in self.live if use_cache and len(self.tokens[row]) <= limit]
        longest = max((len(self.tokens[row]) for row in self._cached), default=0)
        self._cache = Cache(model.config, len(self._cached), min(longest + room, limit))
        self._seen: Tensor | None = None
        if choice.repetition_penalty != 1.0:
            self._seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(prompt, device=self.device)] = True

    def end(self, row: int) -> None:
        """Leave a sequence as it is."""
        self.live.remove(row)

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """One more token for each sequence that goes on: number -> token, -1 where its logits are not finite.

        A sequence goes on with token 0 there, until it is ended.
        """
        logits, rows = self._logits()
        seen = self._seen[rows] if self._seen is not None else None
        logits = self.choice.filtered(logits, seen)
        if self.choice.temperature == 0:
            drawn = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
        else:
            drawn = draw(logits, [self._random[row].random() for row in rows])
        found = dict(zip(rows, drawn.tolist(), strict=True))
        for row, token in found.items():
            self.tokens[row].append(max(token, 0))
            if self._seen is not None:
                self._seen[row, max(token, 0)] = True
        return found

    def _logits(self) -> tuple[Tensor, list[int]]:
        """Logits of the next token, (batch, vocab), and the numbers of the sequences that they are of."""
        block_size, limit, live = self.model.config.block_size, self.model.config.cache_length, set(self.live)
        kept = [row for row in self._cached if row in live and len(self.tokens[row]) <= limit]
        parts = []
        if kept != self._cached:
            self._cache.keep([self._cached.index(row) for row in kept])
            self._cached = kept
        if kept:
            new = [self.tokens[row][have:] for row, have in zip(kept, self._cache.lengths, strict=True)]
            parts.append(self._extend(new, self._cache))
        others = [row for row in self.live if row not in set(kept)]
        if others:
            parts.append(self._extend([self.tokens[row][-block_size:] for row in others], None))
        return torch.cat(parts), kept + others

    def _extend(self, new: list[list[int]], cache: Cache | None) -> Tensor:
        counts = [len(tokens) for tokens in new]
        filled = [tokens + [0] * (max(counts) - len(tokens)) for tokens in new]
        return self.model.extend(torch.tensor(filled, device=self.device), counts, cache)
