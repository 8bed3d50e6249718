"""A tokenizer's own chat template, in Jinja, as spans: where its control tokens stand, and where text does.

Others publish models whose template makes one text of a conversation. There a message that names a control token would
become one. So the template is rendered with a stand-in for what each message says, which nobody can guess. What of the
rendering names a control token is the template's; then the messages take their places, as text. A stranger wrote the
template: transformers renders it in a sandbox, and an error of it is a ValueError.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from orchestrate.data.conversations import Message, Span


class Ends(NamedTuple):
    """What a template writes behind an answer."""

    control: str = ""
    """The first control token."""
    text: str = ""
    """Where there is none before the user speaks again: what stands there instead."""


class ChatTemplate:
    """A chat template, and the control tokens of its tokenizer.

    Args:
        source: Jinja, as transformers reads it.
        control: the names of the control tokens.
        special: what else the template may ask for: bos_token, eos_token and their like, by name.
    """

    def __init__(self, source: str, control: Sequence[str], special: Mapping[str, str]) -> None:
        self.source, self._control, self._special = source, list(control), dict(special)
        longest_first = sorted(filter(None, control), key=len, reverse=True)  # as tokenizers find them
        self._names = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def spans(self, messages: Sequence[Message], answering: bool = True) -> list[Span]:
        """A conversation; with `answering`, up to where the assistant speaks next.

        A template may leave out parts of earlier answers (what a model thought). Raises ValueError where it leaves out
        the last message or a system prompt, and where it refuses the conversation.
        """
        said: dict[str, str] = {}
        parts = [self._hidden(message.content, said) for message in messages]
        needed = {len(messages) - 1} | {n for n, message in enumerate(messages) if message.role == "system"}
        rendered = self._render([Message(m.role, part) for m, part in zip(messages, parts, strict=True)], answering)
        for number in sorted(needed):
            if any(stand_in in parts[number] and stand_in not in rendered for stand_in in said):
                role = messages[number].role
                raise ValueError(f"the chat template leaves out what message {number + 1} ({role}) says")
        stand_ins = re.compile("|".join(said) or "(?!)")
        pieces = [stand_ins.sub(lambda found: said[found[0]], text) for text in self._names.split(rendered)]
        return [Span(text, False, bool(place % 2)) for place, text in enumerate(pieces) if text]

    @cached_property
    def ends(self) -> Ends:
        """What ends an answer; nothing where that cannot be seen."""
        said: dict[str, str] = {}
        first, answer, second = (self._hidden(text, said) for text in "abc")
        talk = [Message("user", first), Message("assistant", answer), Message("user", second)]
        try:
            behind = self._render(talk, False).partition(answer)[2].partition(second)[0]
        except ValueError:
            return Ends()
        control = self._names.search(behind)
        return Ends(control[0]) if control else Ends(text=behind.rstrip())

    def _hidden(self, content: str, said: dict[str, str]) -> str:
        """A message as the template sees it. `said` learns what its stand-ins stand for.

        Blanks at its ends stay, because templates strip them; so do texts that the template looks for in messages.
        """
        made = ""
        for place, text in enumerate(self._looked_for.split(content)):
            core = text.strip()
            if place % 2 == 0 and core:
                stand_in = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))  # private use
                said[stand_in] = core
                text = text.replace(core, stand_in)
            made += text
        return made

    @cached_property
    def _looked_for(self) -> re.Pattern[str]:
        """Texts such as </think> that the template looks for; none that could be part of a control token."""
        import jinja2
        from jinja2 import nodes

        try:
            bare = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source)  # a tag of transformers
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
        except (jinja2.TemplateError, RecursionError):
            return re.compile("((?!))")
        calls = (node.args for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Getattr))
        searched = ([node.expr] for node in tree.find_all(nodes.Compare) if node.ops[0].op in ("in", "notin"))
        texts = {node.value for given in (*calls, *searched) for node in given if isinstance(node, nodes.Const)}
        kept = [text for text in texts if isinstance(text, str) and len(text.strip()) > 1 and not self._touches(text)]
        return re.compile("(" + ("|".join(map(re.escape, sorted(kept, key=len, reverse=True))) or "(?!)") + ")")

    def _touches(self, text: str) -> bool:
        """Whether a text, with others beside it, could be part of a control token's name, or has one."""
        return any(
            text in name
            or name in text
            or any(name.startswith(text[-n:]) or name.endswith(text[:n]) for n in range(1, len(text)))
            for name in self._control
        )

    def _render(self, messages: Sequence[Message], answering: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        talk = [message._asdict() for message in messages]
        try:
            rendered, _ = render_jinja_template(
                [talk], chat_template=self.source, add_generation_prompt=answering, **self._special
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {str(error)!r:.300}") from None
        except Exception as error:  # a template may do anything to its values
            raise ValueError(
                f"the chat template cannot be rendered ({type(error).__name__}: {str(error)!r:.300})"
            ) from None
        return rendered[0]
