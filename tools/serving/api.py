"""OpenAI's API as values: what a request's body asks for, and the bodies that answer it.

Every field is known here. One that would change the answer and is not built is refused unless it has the value that
changes nothing; one that never changes the answer is accepted; any other is refused by its name.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrate.data.conversations import Message
from orchestrate.model.generate import Choice

API = "/v1"
MOST_STOPS, LONGEST_STOP = 4, 1000
DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI has it."""

# Values that change nothing of fields that are not built.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
UNIONS = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "must be a text or a list of texts",
}
# What an answer of ours, or of OpenAI's, has beside its role and text when it is sent back.
_OF_ANSWERS = {"annotations", "audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls"}


class ApiError(Exception):
    """A request that is not answered, as OpenAI's clients read it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    """What both kinds of request have. Absent and null are the same."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field("", max_length=200)
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None


class _Completion(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)


class _Chat(_Body):
    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    truncation: Literal["auto", "disabled"] = "disabled"


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: texts or token ids; or one conversation.
        rows: how many texts that makes.
        max_tokens: of each; None: DEFAULT_TOKENS, of an answer in a chat what is left of the context.
        truncation: whether a conversation that does not fit may lose its oldest turns.
    """

    chat: bool
    model: str
    prompts: Sequence[str | list[int] | list[Message]]
    n: int
    choice: Choice
    seed: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    usage_in_stream: bool
    truncation: bool = False

    @property
    def rows(self) -> int:
        return self.n * len(self.prompts)


def read(body: bytes, chat: bool) -> Asked:
    """The body of a request. Raises ApiError."""
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object")
    form: type[_Body] = _Chat if chat else _Completion
    kept = {}
    for name, value in given.items():
        if name not in form.model_fields and name not in NEUTRAL and name not in WITHOUT_EFFECT:
            raise ApiError(400, f"unknown field {name!r:.100}", param=name[:100], code="unknown_parameter")
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name in form.model_fields:
            kept[name] = value
        elif not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    try:
        asked = form.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise ApiError(400, f"{name}: is missing", param=name, code="missing_required_parameter") from None
        said, got = UNIONS.get(name, first["msg"]), f", got {first['input']!r:.80}"
        raise ApiError(400, f"{name}: {said}{got}", param=name, code="invalid_value") from None
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if len(stop) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stop):
        allowed = f"at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters"
        raise ApiError(400, f"stop: must be {allowed}", param="stop", code="invalid_value")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: only with stream", param="stream_options", code="invalid_value")
    more: dict[str, Any] = {}
    if isinstance(asked, _Chat):
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens: give one of them", param="max_tokens")
        more = {
            "prompts": [_messages(asked.messages)],
            "max_tokens": asked.max_completion_tokens or asked.max_tokens,
            "truncation": asked.truncation == "auto",
        }
    elif isinstance(asked, _Completion):
        more = {"prompts": _prompts(asked.prompt), "max_tokens": asked.max_tokens}
    return Asked(
        chat=chat,
        model=asked.model,
        n=asked.n,
        choice=Choice(asked.repetition_penalty, asked.temperature, asked.top_k, asked.top_p),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed % 2**64,
        stop=stop,
        stream=asked.stream,
        usage_in_stream=asked.stream_options is not None and asked.stream_options.include_usage,
        **more,
    )


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given or [] in given:
        raise ApiError(400, "prompt: is empty", param="prompt", code="invalid_value")
    return [given] if isinstance(given[0], int) else given


def _messages(given: list[dict[str, Any]]) -> list[Message]:
    """Texts by role; a developer's are the system's. Raises ApiError."""
    found = []
    for number, message in enumerate(given):
        place = f"messages[{number}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            allowed = "system, developer, user or assistant"
            raise ApiError(400, f"{place}.role: must be {allowed}, got {role!r:.80}", param=f"{place}.role")
        for name in set(message) - {"role", "content"}:
            if name not in _OF_ANSWERS or message[name]:
                raise ApiError(400, f"{place}.{name:.80}: is not supported here", param=f"{place}.{name:.80}")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"{place}.content: must be text, or parts of the type text", param=f"{place}.content")
        found.append(Message("system" if role == "developer" else role, content))
    if not found:
        raise ApiError(400, "messages: is empty", param="messages", code="invalid_value")
    return found


# ---------------------------------------------------------------------------------------------- answers


class Answer:
    """The bodies that answer one request.

    Args:
        model: the checkpoint that answers.
        dropped: how many of the oldest messages it does not see.
    """

    def __init__(self, asked: Asked, model: str, prompt_tokens: int, dropped: int) -> None:
        self._chat, self._prompt_tokens = asked.chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": model,
        }
        if dropped:
            self._head["dropped_messages"] = dropped

    def whole(self, texts: Iterable[tuple[str, str]], tokens: int) -> dict[str, Any]:
        """Of texts, each with why it ended, and of how many tokens they are together."""
        choices = []
        for index, (text, end) in enumerate(texts):
            said: dict[str, Any] = {"text": text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": end})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(tokens)}

    def chunk(self, index: int, text: str, end: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of a text, as it comes."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {
                "delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
            }
        choice = {"index": index, **said, "logprobs": None, "finish_reason": end}
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def usage(self, tokens: int) -> dict[str, Any]:
        """The last chunk where the usage was asked for."""
        return {**self._head, "object": self._chunk, "choices": [], "usage": self._usage(tokens)}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _usage(self, tokens: int) -> dict[str, int]:
        given = self._prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": tokens, "total_tokens": given + tokens}
