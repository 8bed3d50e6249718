"""Texts that a model writes: of several prompts together, in pieces as they come, each to its end.

Which tokens come is model/generate.py's; here they become text, and a text ends. Changes nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from orchestrate.data.keeping import spoken
from orchestrate.data.stream import DataSet
from orchestrate.data.tokenizer import Pieces, Tokenizer
from orchestrate.model.generate import Choice, Continuation, evaluating
from orchestrate.model.gpt import GPT
from orchestrate.training.run.run import Run
from orchestrate.training.run.sharding import reshard
from orchestrate.training.settings.config import TrainConfig
from orchestrate.training.settings.errors import Refused
from orchestrate.training.settings.records import Settings

AT_EVALUATIONS = Choice(temperature=0.8, top_k=200)
"""How sample_prompts are continued: as sample.py does by default."""

NOT_FINITE = "the model's logits are not finite: its weights have diverged"


class Piece(NamedTuple):
    """A piece of a text, as it comes."""

    prompt: int
    """Number of the prompt, from 0."""
    sample: int
    """Which of its texts, from 0."""
    text: str
    """The first piece of a text begins with its prompt."""
    last: bool
    """Whether the text ends with it."""


def samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    count: int,
    max_new_tokens: int,
    *,
    choice: Choice,
    seed: int,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    in_step: bool = False,
) -> Iterator[Piece]:
    """So many texts of each prompt, one after the other, in pieces as they come.

    A text ends before a stop string, with the tokenizer's end-of-text token, or after max_new_tokens. It follows from
    the model, its prompt, the seed and which of the prompt's texts it is; what is generated beside it does not matter.

    Args:
        stop: texts that end a text; they are looked for in what follows the prompt, over the borders of tokens.
        batch_size: how many texts are generated together.
        in_step: always make the same number of passes through the model, as ranks that make each one together must.

    Raises ValueError for a prompt that cannot be read, and for logits that are not finite.
    """
    given = encoded(tokenizer, prompts, model.config.vocab_size)
    jobs = [(number, sample) for number in range(len(prompts)) for sample in range(count)]
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        ids = [given[number] for number, _ in batch]
        rows = Continuation(model, len(batch), max(map(len, ids)) + max_new_tokens)
        for prompt, (_, sample) in zip(ids, batch, strict=True):
            rows.add(prompt, choice, (seed, sample))
        texts = [Text(tokenizer, prompt, stop) for prompt in ids]
        front, broken = 0, False
        for step in range(max_new_tokens):
            if not rows.live:
                break
            with evaluating(model), autocast():
                drawn = rows.step()
            for row, token in drawn.items():
                broken |= token < 0
                texts[row].add(token)
                if texts[row].ended and not in_step:
                    rows.end(row)
            while front < len(texts):
                if step + 1 == max_new_tokens:
                    texts[front].end()
                if (text := texts[front].take()) or texts[front].ended:
                    yield Piece(*batch[front], text, texts[front].ended)
                if not texts[front].ended:
                    break
                front += 1
        if broken:
            raise Refused(NOT_FINITE)


def encoded(tokenizer: Tokenizer, prompts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """The token ids of prompts. Raises Refused where one has none, or some that the model does not have."""
    found, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        problem = ""
        try:
            found.append(tokenizer.encode(prompt))
        except ValueError as error:
            problem = str(error)
        else:
            if not found[-1]:
                problem = "the prompt is empty"
            elif max(found[-1]) >= vocab_size:
                problem = f"token {max(found[-1])} of the prompt is beyond the model's vocabulary of {vocab_size}"
        if problem:
            problems.append(f"prompt {number}: {problem}" if len(prompts) > 1 else problem)
    if problems:
        raise Refused(problems)
    return found


class Text:
    """A text that grows by tokens, and what of it has not been shown yet: first its prompt.

    Args:
        stop: texts that end it.
        ends: the ids that end it, beside the tokenizer's end-of-text.

    Attributes:
        ended: whether one of them has come, or a token of logits that are not finite.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], ends: Collection[int] = ()
    ) -> None:
        self._stop, self._ends = stop, {tokenizer.end_of_text, *ends}
        self._pieces = Pieces(tokenizer)
        self._ready = "".join(self._pieces.push(token) for token in prompt)
        self._held = ""
        """What may be the beginning of a stop string."""
        self.ended = False

    def add(self, token: int) -> None:
        """One more token; nothing once the text has ended."""
        if self.ended:
            return
        if token in self._ends or token < 0:
            self.end()
            return
        self._look_at(self._pieces.push(token))

    def end(self) -> None:
        """There will be no more of it."""
        if not self.ended:
            self._look_at(self._pieces.end())
            self._ready, self._held, self.ended = self._ready + self._held, "", True

    def take(self) -> str:
        """What is new and certain."""
        text, self._ready = self._ready, ""
        return text

    def _look_at(self, new: str) -> None:
        self._held += new
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self._ready, self._held, self.ended = self._ready + self._held[: min(found)], "", True
            return
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        kept = next((n for n in range(min(longest, len(self._held)), 0, -1) if self._may_begin(self._held[-n:])), 0)
        certain = len(self._held) - kept
        self._ready, self._held = self._ready + self._held[:certain], self._held[certain:]

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


def check_prompts(config: TrainConfig, data: DataSet, settings: Settings) -> None:
    """Raises Refused where the texts of sample_prompts cannot be read by the run's tokenizer, or by its model."""
    if not config.sample_prompts:
        return
    try:
        tokenizer = spoken(data, settings.vocabulary_map)
        encoded(tokenizer, config.sample_prompts, settings.model.vocab_size)
    except ValueError as error:
        problems = error.problems if isinstance(error, Refused) else [str(error)]
        raise Refused([f"sample_prompts: {problem}" for problem in problems]) from None


def continue_prompts(run: Run) -> list[dict[str, str]]:
    """Each of sample_prompts and the text that it begins, from the first rank; nothing on the others.

    With sharded weights every rank takes part, and makes the same number of passes whatever comes of them. The run is
    left as it is. Raises Refused for logits that are not finite.
    """
    config, prompts = run.config, run.config.sample_prompts
    if not prompts or not (run.ranks.is_first or run.ranks.sharded):
        return []
    tokenizer = spoken(run.batches.opened.speaks, run.settings.vocabulary_map)
    texts = [{"prompt": prompt, "text": ""} for prompt in prompts]
    try:
        with run.stopwatch.part("eval"):
            for piece in samples(
                run.model,
                tokenizer,
                prompts,
                1,
                config.sample_tokens,
                choice=AT_EVALUATIONS,
                seed=config.seed,
                autocast=run.autocast,
                in_step=run.ranks.sharded,
            ):
                texts[piece.prompt]["text"] += piece.text
    finally:
        if run.ranks.sharded:
            reshard(run.model)
    return texts if run.ranks.is_first else []
