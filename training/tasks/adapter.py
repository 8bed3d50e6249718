"""Our models as lm-eval asks them: how likely texts are, and what they are continued with.

Every number is the one that lm-eval's own adapter (lm_eval/models/huggingface.py) gives for the exported model: texts
become tokens as there, and what is too long loses its beginning as there. What differs is the work. Requests are sorted
by length. A context that several requests share is computed once, and so is the beginning that all contexts of a batch
share. The ranks share the batches, and every rank has all the answers. Knows lm-eval's requests, and imports it late.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from orchestrate.data.tokenizer import Pieces, Tokenizer
from orchestrate.model.generate import Choice, Continuation, evaluating
from orchestrate.model.gpt import GPT, Cache
from orchestrate.training.run.distributed import Ranks
from orchestrate.training.run.sharding import reshard

Ids = tuple[int, ...]
_SHARED = 8
"""Tokens that the contexts of a batch must share before their beginning is computed apart."""
_GENERATED = 256
"""Tokens of an answer where a task names no number, as in lm-eval's adapter."""


class CannotDo(ValueError):
    """A task asks for what this model or this tokenizer cannot do."""


class NotFinite(CannotDo):
    """The model's logits are not finite. Raised on every rank, whichever has met them."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite: its weights have diverged")


class Interrupted(Exception):
    """The caller's poll said stop."""


class Asked(NamedTuple):
    """Tokens, and those that may follow them."""

    given: Ids
    asked: Ids


class Adapter:
    """What lm_eval.evaluate calls as a model.

    Every rank is given all requests: to lm-eval it is alone.

    Args:
        batch_size: rows of block_size tokens that a pass through the model may have at most.
        ranks: who shares the work; None: this process alone.
        poll: asked once a batch, equally often on every rank; not 0: Interrupted is raised.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        ranks: Ranks | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        poll: Callable[[], int] = lambda: 0,
    ) -> None:
        self.model, self.tokenizer, self.ranks, self.autocast, self.poll = model, tokenizer, ranks, autocast, poll
        self.max_length = model.config.block_size
        self.device = model.transformer["wte"].weight.device
        self._room = batch_size * self.max_length
        self._before = tokenizer.encode("")
        """What the tokenizer puts before every text."""
        self._contexts: dict[str, list[int]] = {}
        self._kept: tuple[Ids, Cache] | None = None

    # ------------------------------------------------------------------------------------------ what lm-eval calls

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log-probability in nats, and whether no token of it is unlikely.

        Raises CannotDo, as the others do.
        """
        self._contexts = {}
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability in nats of each whole text, in windows of block_size tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            for window in get_rolling_token_windows(ids, self._first(), self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append(Asked(tuple(context), tuple(continuation)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What each context is continued with, up to the first of its stop strings."""
        from lm_eval.models.utils import postprocess_generated_text

        end = None if self.tokenizer.end_of_text is None else self.tokenizer.decode([self.tokenizer.end_of_text])
        alike: dict[tuple[Choice, int, tuple[str, ...]], list[int]] = {}
        prompts: list[list[int]] = []
        for number, request in enumerate(requests):
            context, wanted = request.args
            choice, room, until = wanted_of(wanted, self.max_length)
            prompts.append(self._encode(context, starts_itself=False)[-(self.max_length - room) :])
            stops = tuple(dict.fromkeys([*until, *([end] if end else [])]))
            alike.setdefault((choice, room, stops), []).append(number)
        texts: dict[int, str | None] = {}
        for (choice, room, stops), numbers in alike.items():
            numbers.sort(key=lambda number: (-len(prompts[number]), number))
            size = max(1, self._room // max(1, len(prompts[numbers[0]]) + room))
            chunks = [numbers[first : first + size] for first in range(0, len(numbers), size)]
            for chunk, mine in self._turns(chunks):
                said = self._continued([prompts[number] for number in chunk], choice, room, stops, chunk)
                if mine:
                    texts |= {
                        number: None if text is None else postprocess_generated_text(text, list(stops), None)
                        for number, text in zip(chunk, said, strict=True)
                    }
        for others in self.ranks.gather(texts) if self.ranks else []:
            texts |= others
        if None in texts.values():
            raise NotFinite
        return [texts[number] for number in range(len(requests))]

    # ------------------------------------------------------------------------------------------ texts to tokens

    def _encode(self, text: str, bare: bool = False, starts_itself: bool = True) -> list[int]:
        """As lm-eval's adapter: with what the tokenizer puts before a text, unless the text begins with it itself."""
        ids = self.tokenizer.encode(text)
        start = self.tokenizer.start_of_text
        if starts_itself and start is not None and text.startswith(self.tokenizer.decode([start])):
            bare = True
        if bare and self._before and ids[: len(self._before)] == self._before:
            ids = ids[len(self._before) :]
        if ids and max(ids) >= self.model.config.vocab_size:
            raise CannotDo(f"token {max(ids)} is beyond the model's vocabulary of {self.model.config.vocab_size}")
        return ids

    def _first(self) -> int:
        """What stands before a text where nothing does."""
        if self.tokenizer.start_of_text is None:
            raise CannotDo("it scores texts from their first token on, and the tokenizer has no token that begins one")
        return self.tokenizer.start_of_text

    def _pair(self, context: str, continuation: str) -> Asked:
        """A context and its continuation, split where the tokens of both together are (as lm_eval.api.model does)."""
        if not context:
            ids, first = self._encode(continuation, bare=True), self._first()
            given, asked = ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
        else:
            kept = context.rstrip()
            continuation = context[len(kept) :] + continuation
            if kept not in self._contexts:
                self._contexts[kept] = self._encode(kept)
            whole = self._encode(kept + continuation)
            given, asked = self._contexts[kept], whole[len(self._contexts[kept]) :]
        if not given or not asked:
            raise CannotDo(f"there is no token to score in {continuation!r} after {context[-40:]!r}")
        if len(asked) > self.max_length:
            raise CannotDo(f"a continuation of {len(asked)} tokens does not fit block_size {self.max_length}")
        return Asked(tuple(given[-(self.max_length + 1 - len(asked)) :]), tuple(asked))

    # ------------------------------------------------------------------------------------------ passes

    def _turns(self, chunks: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
        """This rank's chunks in turn, and whether what comes of them counts. Raises Interrupted."""
        turns = self.ranks.turns(len(chunks)) if self.ranks else ((number, True) for number in range(len(chunks)))
        try:
            for mine, counts in turns:
                if self.poll():
                    raise Interrupted
                if mine is not None:
                    with evaluating(self.model), self.autocast(), torch.no_grad():
                        yield chunks[mine], counts
        finally:
            if self._sharded:
                reshard(self.model)

    @property
    def _sharded(self) -> bool:
        return self.ranks is not None and self.ranks.sharded

    def _score(self, requests: Sequence[Asked]) -> list[tuple[float, bool]]:
        numbers: dict[Asked, int] = {}
        places = [numbers.setdefault(request, len(numbers)) for request in requests]
        # Long ones first: what does not fit into memory fails at once. Requests of one context stand together.
        order = sorted(numbers, key=lambda r: (-len(r.given), r.given, -len(r.asked), r.asked))
        chunks: list[list[Asked]] = []
        limit = self.model.config.cache_length
        for request in order:
            grown = [*chunks[-1], request] if chunks else [request]
            longest, rows = _longest(grown), len(grown)
            if not self._sharded and longest <= limit:
                rows = _rows(grown)
            # What fills a row up must have a position too.
            if not chunks or longest > self.max_length or longest * rows > self._room:
                chunks.append([])
            chunks[-1].append(request)
        found = np.zeros((2, len(numbers)))
        self._kept = None
        for chunk, mine in self._turns(chunks):
            cached = _longest(chunk) <= limit
            scores = self._shared(chunk) if cached and not self._sharded else self._plain(chunk)
            if mine:
                for request, score in zip(chunk, scores, strict=True):
                    found[:, numbers[request]] = score
        self._kept = None
        if self.ranks:
            found = self.ranks.sum(found)
        if not np.isfinite(found).all():  # or the first answer would be the likeliest everywhere
            raise NotFinite
        return [(float(found[0, place]), bool(found[1, place])) for place in places]

    def _plain(self, chunk: Sequence[Asked]) -> list[tuple[float, bool]]:
        """One pass for any requests: ranks that hold the weights together make as many each.

        And where rows are so long that no cache helps.
        """
        rows = [(*r.given, *r.asked[:-1]) for r in chunk]
        targets = [(*[-1] * (len(r.given) - 1), *r.asked) for r in chunk]
        return self._summed([len(r.asked) for r in chunk], *self._pass(rows, targets, None))

    def _shared(self, chunk: Sequence[Asked]) -> list[tuple[float, bool]]:
        """What all contexts begin with, then the rest of each context, then the continuations: each once."""
        contexts = list(dict.fromkeys(r.given for r in chunk))
        row_of = {given: row for row, given in enumerate(contexts)}
        capacity = _longest(chunk)
        cache, alike = self._beginning(contexts, capacity)
        rest = [given[alike:] for given in contexts]
        logits = self.model.extend(self._table(rest), [len(ids) for ids in rest], cache).float()
        rows = torch.tensor([row_of[r.given] for r in chunk], device=self.device)
        first = torch.tensor([r.asked[0] for r in chunk], device=self.device)
        values = (logits[rows, first] - logits.logsumexp(-1)[rows]).double()
        likeliest = logits.argmax(-1)[rows] == first
        found = [[float(value), bool(best)] for value, best in zip(values, likeliest, strict=True)]
        longer = [number for number, r in enumerate(chunk) if len(r.asked) > 1]
        if longer:
            before, cache = cache, Cache(self.model.config, len(longer), capacity)
            for row, number in enumerate(longer):
                of = row_of[chunk[number].given]
                cache.fill(row, before, of, before.lengths[of])
            more = [chunk[number].asked for number in longer]
            scores = self._pass([ids[:-1] for ids in more], [ids[1:] for ids in more], cache)
            summed = self._summed([len(ids) - 1 for ids in more], *scores)
            for number, (value, best) in zip(longer, summed, strict=True):
                found[number] = [found[number][0] + value, found[number][1] and best]
        return [(value, best) for value, best in found]

    def _beginning(self, contexts: Sequence[Ids], capacity: int) -> tuple[Cache, int]:
        """A cache with what all contexts begin with, a row for each, and how many tokens that is.

        It is kept for the batches after this one: examples before the questions are often the same all along.
        """
        shared: Ids = tuple(os.path.commonprefix(contexts))[: min(map(len, contexts)) - 1]
        known, cache = self._kept or ((), None)
        rows = Cache(self.model.config, len(contexts), capacity)
        if cache is None or shared[: len(known)] != known or 2 * len(known) < len(shared):
            if len(contexts) == 1 or len(shared) < _SHARED:
                return rows, 0
            known, cache = shared, Cache(self.model.config, 1, len(shared))
            self.model.extend(self._table([known]), [len(known)], cache)
            self._kept = known, cache
        for row in range(len(contexts)):
            rows.fill(row, cache, 0, len(known))
        return rows, len(known)

    def _pass(
        self, rows: Sequence[Ids], targets: Sequence[Ids], cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [len(row) for row in rows]
        return self.model.score(self._table(rows), counts, self._table(targets, empty=-1), cache)

    def _table(self, rows: Sequence[Sequence[int]], empty: int = 0) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[empty] * (longest - len(row))] for row in rows], device=self.device)

    @staticmethod
    def _summed(counts: Sequence[int], values: torch.Tensor, likeliest: torch.Tensor) -> list[tuple[float, bool]]:
        parts = zip(values.double().cpu().split(list(counts)), likeliest.cpu().split(list(counts)), strict=True)
        return [(float(mine.sum()), bool(best.all())) for mine, best in parts]

    def _continued(
        self, prompts: Sequence[list[int]], choice: Choice, room: int, stops: Sequence[str], numbers: Sequence[int]
    ) -> list[str | None]:
        """What the prompts are continued with; each ends with the first stop string, or the token that ends a text.

        None where logits were not finite.
        """
        rows = Continuation(self.model, len(prompts), max(map(len, prompts)) + room)
        texts = [_Said(self.tokenizer, stops) for _ in prompts]
        for number, prompt in zip(numbers, prompts, strict=True):
            rows.add(prompt, choice, (0, number))
        for _ in range(room):
            live = [row for row in rows.live if not texts[row].ended]
            if not (self.ranks.sum(np.array([len(live)])).any() if self._sharded and self.ranks else live):
                break
            for row, token in rows.step().items():
                texts[row].add(token)
                if texts[row].ended and not self._sharded:  # sharded ranks make each pass together
                    rows.end(row)
        unspoken = self.tokenizer.unspoken
        return [None if t.broken else self.tokenizer.decode([i for i in t.ids if i not in unspoken]) for t in texts]


def _longest(chunk: Sequence[Asked]) -> int:
    """Positions of the rows of a batch, where contexts and answers are filled up each."""
    return max(len(r.given) for r in chunk) + max(len(r.asked) for r in chunk) - 1


def _rows(chunk: Sequence[Asked]) -> int:
    """Rows that a batch has at most at a time: one a context, and then one an answer of several tokens."""
    return max(len({r.given for r in chunk}), sum(len(r.asked) > 1 for r in chunk))


class _Said:
    """An answer that grows by tokens until it holds a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.ids: list[int] = []
        self.ended = self.broken = False
        self._pieces, self._end, self._stops, self._text = Pieces(tokenizer), tokenizer.end_of_text, stops, ""
        self._longest = max(map(len, stops), default=0)

    def add(self, token: int) -> None:
        """One more token; nothing once it has ended."""
        if self.ended:
            return
        if token == self._end or token < 0:
            self.ended, self.broken = True, token < 0
            return
        self.ids.append(token)
        new = self._pieces.push(token)
        self._text += new
        tail = self._text[-(len(new) + self._longest) :] if new else ""
        self.ended = any(stop in tail for stop in self._stops if stop)


def wanted_of(given: dict[str, Any], max_length: int) -> tuple[Choice, int, list[str]]:
    """How a task wants its answers made: the choice of tokens, how many of them, and what ends an answer.

    Raises CannotDo for what a model with a context of max_length tokens, or this adapter, cannot give.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    kwargs = normalize_gen_kwargs(given, _GENERATED)
    until, room, sample = kwargs.pop("until"), kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
    temperature = float(kwargs.pop("temperature", 0.0) or 0.0)
    top_k, top_p = kwargs.pop("top_k", None), kwargs.pop("top_p", None)
    if room >= max_length:
        raise CannotDo(f"it asks for {room} new tokens, and the model has block_size {max_length}")
    if kwargs:
        raise CannotDo(f"it asks for {', '.join(sorted(kwargs))}, which this adapter does not know")
    until = [until] if isinstance(until, str) else list(until or [])
    if not sample:
        return Choice(temperature=0), room, until
    return Choice(temperature=temperature or 1.0, top_k=int(top_k or 0), top_p=float(top_p or 1.0)), room, until
