"""Conversations as tokens: one template for data sets, for export, and for whoever talks to a model.

    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

The two control tokens are ids that the template adds. What a message says is encoded as text, so it never becomes one
of them, whatever it says. The loss counts what the assistant says and the <|im_end|> behind it, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from orchestrate.data.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same for Hugging Face, in Jinja. It makes text of a conversation, so there a message can name a control token."""


class Message(NamedTuple):
    role: str
    """One of ROLES."""
    content: str


class Span(NamedTuple):
    """A stretch of a document."""

    text: str
    counts: bool = True
    """Whether the loss counts it."""
    control: bool = False
    """Whether it is the control token of this name, and no text."""


def spans(messages: Sequence[Message], answering: bool = False) -> list[Span]:
    """A conversation by the template; with `answering`, up to where the assistant speaks next."""
    made = []
    for role, content in messages:
        counts = role == "assistant"
        # What begins an answer is encoded for itself, as it is before the answer is there.
        made += [Span(START, False, True), Span(f"{role}\n", False), Span(content, counts), Span(END, counts, True)]
        made.append(Span("\n", False))
    return made + [Span(START, False, True), Span("assistant\n", False)] * answering


def encode(tokenizer: Tokenizer, parts: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """The ids of a document and which of them the loss counts. Raises ValueError."""
    ids: list[int] = []
    counts: list[bool] = []
    for text, counted, control in parts:
        token = tokenizer.control(text) if control else None
        if control and token is None:
            raise ValueError(f"the tokenizer has no control token {text}")
        new = tokenizer.encode_plain(text) if token is None else [token]
        ids += new
        counts += [counted] * len(new)
    return ids, counts


# ---------------------------------------------------------------------------------------------- records


class Document(NamedTuple):
    """A record as it is to be encoded."""

    spans: list[Span]
    source: str


def chat(record: dict[str, Any]) -> Document:
    """{"messages": [{"role", "content"}, ...]}, what else the record has is left out. Raises ValueError."""
    return Document(spans(read_messages(record.get("messages"))), "messages")


def task(record: dict[str, Any]) -> Document:
    """A record of SmolTalk, of MMLU or of GSM8K, told by its fields. Raises ValueError."""
    nested = record.get("train")
    record = nested if isinstance(nested, dict) else record  # as MMLU's auxiliary_train has it
    if "messages" in record:
        return Document(spans(read_messages(record["messages"])), "smoltalk")
    if "choices" in record:
        return Document(spans(_multiple_choice(record)), "mmlu")
    if "question" in record and "answer" in record:
        question, answer = (_text(record, name) for name in ("question", "answer"))
        # What stands in << >> is for a calculator: the answer says it again behind.
        said = re.sub(r"<<[^<>]*>>", "", answer)
        return Document(spans([Message("user", question), Message("assistant", said)]), "gsm8k")
    raise ValueError(
        "neither of SmolTalk (messages) nor of MMLU (question, choices, answer) nor of GSM8K (question, answer); "
        + f"it has {', '.join(map(repr, record)) or 'no fields'}"
    )


TASKS = ("smoltalk", "mmlu", "gsm8k")


def _multiple_choice(record: dict[str, Any]) -> list[Message]:
    question, choices, answer = _text(record, "question"), record["choices"], record.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"'choices' must be a list of 2 to 26 texts, got {choices!r:.80}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' must be a whole number from 0 to {len(choices) - 1}, got {answer!r:.80}")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    shown = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    asked = f"{question}\n\n{shown}\n\nAnswer with the letter alone."
    return [Message("user", asked), Message("assistant", letters[answer])]


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, got {value!r:.80}")
    return value


def read_messages(values: Any, learning: bool = True) -> list[Message]:
    """A list of {"role", "content"}; with `learning`, one that an assistant speaks in. Raises ValueError."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"'messages' must be a list of {{'role', 'content'}}, got {values!r:.80}")
    found = []
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict) or set(value) != {"role", "content"}:
            raise ValueError(f"message {number} must have 'role' and 'content' and no more, got {value!r:.80}")
        if value["role"] not in ROLES:
            raise ValueError(f"message {number}: 'role' must be one of {', '.join(ROLES)}, got {value['role']!r:.80}")
        found.append(Message(value["role"], _text(value, "content")))
    if learning and not any(message.role == "assistant" for message in found):
        raise ValueError("no message is of the assistant, so there is nothing to learn from")
    return found
