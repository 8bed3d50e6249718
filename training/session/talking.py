"""Talking to a model: a conversation as the token ids that its next answer follows, and what ends that answer.

A model is talked to by the template of our conversations (data/conversations.py), or by a chat template of its own
(data/chat_template.py). Where it has neither, the text of the conversation goes on. What a message says is text and
never becomes a control token. A conversation that does not fit loses its oldest turns.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrate.data.chat_template import ChatTemplate
from orchestrate.data.conversations import END, START, TEMPLATE, Message, encode, read_messages, spans
from orchestrate.data.stream import read_file
from orchestrate.data.tokenizer import HuggingFaceTokenizer, RemappedTokenizer, Tokenizer
from orchestrate.model.generate import Choice, Continuation, evaluating
from orchestrate.model.gpt import GPT
from orchestrate.training.session.sampling import is_run, open_foreign, open_run_folder
from orchestrate.training.session.start import speaker
from orchestrate.training.session.texts import NOT_FINITE, Text
from orchestrate.training.settings.errors import Refused, refusing

_CONFIG = 4 * 2**20
_TALKS = 64 * 2**20
"""Bytes that a configuration file, and a file of conversations, may have."""


class Prompt(NamedTuple):
    """A conversation as a model reads it."""

    ids: list[int]
    dropped: int = 0
    """How many of the oldest messages were left out; a system prompt stays."""
    cut: int = 0
    """How many tokens were left out at the beginning; of a plain continuation only."""


@dataclass(frozen=True)
class ChatFormat:
    """How a model is talked to.

    Attributes:
        tokenizer: what the model speaks.
        template: of a Hugging Face folder; None: ours, or none.
        plain: there is no template, and the text goes on.
        block_size: tokens that the model sees.
        vocab_size: tokens that the model has.
        ends: the ids that end an answer.
        stop: texts that end an answer.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    plain: bool
    block_size: int
    vocab_size: int
    ends: frozenset[int]
    stop: tuple[str, ...] = ()

    def room(self, max_new_tokens: int) -> int:
        """How many tokens are kept free for an answer of at most so many: no more than a quarter of the context."""
        return max(1, min(max_new_tokens, self.block_size // 4))

    def prompt(self, messages: Sequence[Message], room: int) -> Prompt:
        """What the next answer follows, at most block_size - room ids.

        Oldest turns are left out where it is too long, each from what a user says to before the user speaks again. The
        last one stays. A text that goes on is cut at its beginning instead of being refused.

        Raises Refused for a last turn that is too long, and for what template or tokenizer do not accept.
        """
        if not messages:
            raise Refused("there is no message")
        limit = self.block_size - room
        if limit < 1:
            raise Refused(f"{room} tokens of answer leave no room in a context of {self.block_size}")
        system = list(messages[:1]) if messages[0].role == "system" else []
        talk = list(messages[len(system) :])
        turns = [0, *(n for n, message in enumerate(talk) if n and message.role == "user")]
        ids, dropped = self.encode(messages), 0
        if len(ids) > limit and turns[1:]:
            last, fits = len(turns) - 1, lambda n: len(self.encode(system + talk[n:])) <= limit
            dropped = turns[bisect_left(turns, True, lo=1, hi=last, key=fits)]
            ids = self.encode(system + talk[dropped:])
        if len(ids) > limit and not self.plain:
            beside = ", with the system prompt," if system else ""
            raise Refused(
                f"the message is too long: it has {len(ids)} tokens{beside} as the template writes it, and {limit} fit "
                f"(a context of {self.block_size}, {room} of it for the answer)"
            )
        cut = max(0, len(ids) - limit)
        return Prompt(ids[cut:], dropped, cut)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The whole conversation, up to where the assistant speaks next. Raises Refused."""
        with refusing():
            if self.plain:
                control, ids = [], self.tokenizer.encode_plain(_as_text(messages))
            else:
                parts = self.template.spans(messages) if self.template else spans(messages, answering=True)
                control = [self.tokenizer.control(part.text) for part in parts if part.control]
                if self.template:
                    ids = self.tokenizer.encode_parts([(part.text, part.control) for part in parts])
                else:
                    ids = encode(self.tokenizer, parts)[0]
            # A vocabulary map may have put a word of the text and a control token together.
            special = {self.tokenizer.end_of_text, *control}
            if [i for i in ids if i in special] != control:
                raise Refused("a text of this conversation has a token that this model's control tokens share")
            if self.plain:
                ids = self.tokenizer.encode("") + ids  # what is put before a text
            if not ids:
                raise Refused("the prompt is empty")
            if max(ids) >= self.vocab_size:
                raise Refused(f"token {max(ids)} of the prompt is beyond the model's vocabulary of {self.vocab_size}")
        return ids


class Talk:
    """A conversation under way.

    Attributes:
        system: the system prompt; empty: none.
        turns: what was said, without it. An answer that was interrupted is there as far as it came.
        left_out: how many of the oldest messages the last answer has not seen.
        cut: how many tokens at the beginning it has not seen, of a plain continuation.
        full: why the last answer ended before its end: the option or the context that left no room; empty: it did not.
    """

    def __init__(
        self,
        model: GPT,
        form: ChatFormat,
        system: str = "",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model, self.form, self.system, self._autocast = model, form, system, autocast
        self.turns: list[Message] = []
        self.left_out = self.cut = 0
        self.full = ""

    @property
    def messages(self) -> list[Message]:
        """The system prompt, where there is one, and the turns."""
        return self._opening + self.turns

    @property
    def _opening(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []

    def ask(self, text: str, choice: Choice, seed: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Say something. The answer comes in pieces; it is among the turns when the iterator is exhausted or closed.

        Raises Refused, and nothing was said then, where the prompt is; and in between for logits that are not finite.
        """
        prompt = self._prompt([*self.turns, Message("user", text)], max_new_tokens)
        self.turns.append(Message("user", text))
        return self._answer(prompt, choice, seed, max_new_tokens)

    def retry(self, choice: Choice, seed: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Another answer instead of the last one, or one to a user who has none. Raises Refused."""
        kept = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        if not kept:
            raise Refused("there is nothing to answer")
        prompt = self._prompt(kept, max_new_tokens)
        self.turns = list(kept)
        return self._answer(prompt, choice, seed, max_new_tokens)

    def _prompt(self, turns: Sequence[Message], max_new_tokens: int) -> list[int]:
        prompt = self.form.prompt([*self._opening, *turns], self.form.room(max_new_tokens))
        self.left_out, self.cut, self.full = prompt.dropped, prompt.cut, ""
        return prompt.ids

    def _answer(self, prompt: list[int], choice: Choice, seed: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        context = self.form.block_size - len(prompt)
        room = min(max_new_tokens, context)
        rows = Continuation(self.model, 1, len(prompt) + room)
        number = rows.add(prompt, choice, seed)
        text = Text(self.form.tokenizer, prompt, self.form.stop, self.form.ends)
        text.take()  # the prompt
        said = ""
        try:
            for step in range(room):
                with evaluating(self.model), self._autocast():
                    token = rows.step()[number]
                if token < 0:
                    raise Refused(NOT_FINITE)
                text.add(token)
                if step + 1 == room and not text.ended:
                    self.full = "context" if room == context else "max_new_tokens"
                    text.end()
                new = text.take()
                said += new
                if new:
                    yield new
                if text.ended:
                    break
        finally:
            self.turns.append(Message("assistant", said))

    def save(self, path: str | Path) -> None:
        """Add the conversation to a file of JSON lines, as data/chat/prepare.py reads it. Raises Refused."""
        if not any(message.role == "assistant" for message in self.turns):
            raise Refused("there is no answer to save yet")
        line = json.dumps({"messages": [message._asdict() for message in self.messages]}, ensure_ascii=False)
        try:
            with open(path, "a+b") as file:
                torn = file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n"
                file.write(b"\n" * torn + line.encode("utf-8") + b"\n")
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None

    def load(self, path: str | Path) -> None:
        """Go on with the last conversation of such a file, and with its system prompt. Raises Refused."""
        try:
            lines = read_file(Path(path), _TALKS).decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise Refused(f"{path}: not UTF-8 (byte {error.start})") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        number = next((n for n in range(len(lines), 0, -1) if lines[n - 1].strip()), 0)
        if not number:
            raise Refused(f"{path}: there is no conversation in it")
        try:
            record = json.loads(lines[number - 1])
            if not isinstance(record, dict):
                raise ValueError(f"must be a JSON object with 'messages', got {record!r:.80}")
            messages = read_messages(record.get("messages"), learning=False)
            _as_text(messages).encode("utf-8")  # JSON may hold halves of characters
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path}:{number}: {error}") from None
        self.system = messages[0].content if messages[0].role == "system" else ""
        self.turns = messages[messages[0].role == "system" :]


def chat_format(tokenizer: Tokenizer, block_size: int, vocab_size: int, folder: str = "") -> ChatFormat:
    """How a model with this tokenizer is talked to. Raises Refused.

    Args:
        folder: a Hugging Face folder, whose generation_config.json and config.json name tokens that end a text.
    """
    inner = tokenizer.inner if isinstance(tokenizer, RemappedTokenizer) else tokenizer
    with refusing():
        source = inner.chat_template if isinstance(inner, HuggingFaceTokenizer) else TEMPLATE
        named = [tokenizer.end_of_text, *(_named_ends(folder) if folder else [])]
        ours = [tokenizer.control(name) for name in (START, END)]
        template, stop = None, ""
        if source == TEMPLATE and all(i is not None and i < vocab_size for i in ours):
            named.append(ours[1])
        elif source and source != TEMPLATE:
            template = ChatTemplate(source, inner.control_names, inner.special)
            named.append(tokenizer.control(template.ends.control))
            stop = template.ends.text
        else:
            source = ""
    ends = frozenset(i for i in named if i is not None and i < vocab_size)
    return ChatFormat(tokenizer, template, not source, block_size, vocab_size, ends, (stop,) if stop else ())


def _as_text(messages: Sequence[Message]) -> str:
    """The texts of a conversation behind each other. What the model said goes on where the user's text ended."""
    made = ""
    for role, content in messages:
        made += content if role == "assistant" or not made else f"\n{content}"
    return made


def _named_ends(folder: str) -> list[int]:
    """What a Hugging Face folder's configurations name as eos_token_id. Raises ValueError."""
    found = []
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            values = json.loads(read_file(path, _CONFIG))
            named = values.get("eos_token_id") if isinstance(values, dict) else None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        for i in named if isinstance(named, list) else [named]:
            if i is not None and (type(i) is not int or i < 0):
                raise ValueError(f"{path}: 'eos_token_id' must be token ids, got {named!r:.80}")
            found += [] if i is None else [i]
    return found


def open_talker(
    source: str, checkpoint: str = "latest", dataset: str = "", base: str = ""
) -> tuple[GPT, ChatFormat, list[str]]:
    """The model of a run folder, a Hugging Face or PEFT folder or a nanoGPT ckpt.pt, and how it is talked to.

    The third is what is wrong with newer checkpoints. Raises ValueError.

    Args:
        checkpoint: of a run folder: latest, best, or the name of a checkpoint's folder.
        dataset: the data set whose tokenizer is taken instead of the model's own.
        base: where a PEFT folder's base model is.
    """
    if is_run(source, checkpoint):
        if base:
            raise Refused(f"--base {base}: {source} is a run folder and has no base")
        model, tokenizer, passed_over = open_run_folder(source, checkpoint, dataset)
        folder = ""
    else:
        model, tokenizer = open_foreign(source, dataset, base)
        passed_over, folder = [], "" if dataset else speaker(source, base)
    config = model.config
    return model, chat_format(tokenizer, config.block_size, config.vocab_size, folder), passed_over
