"""The HTTP side: routes, and a request's way from its body to its answer.

A request is read, counted, given its model, turned into rows, and answered as they are written: as one body, or as
server-sent events. Whatever ends it, its rows are dropped and its model is given back. Requests beyond the queue are
told to come again. Nothing of a request becomes a path.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from importlib import resources
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orchestrate.tools.serving.api import API, DEFAULT_TOKENS, Answer, ApiError, Asked, read
from orchestrate.tools.serving.engine import Engine, Piece, Row, Told
from orchestrate.tools.serving.guard import refusal
from orchestrate.tools.serving.models import Loaded, Offer, Shelf, TooLarge, Unknown
from orchestrate.training.session.texts import NOT_FINITE, Text, encoded
from orchestrate.training.settings.errors import Refused

MOST_BYTES = 2**20
"""Of a request's body."""
BODY_SECONDS = 30.0
"""Within which a body must have come."""
SEND_SECONDS = 60.0
"""For so long a client may leave what it is sent unread."""
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}

_T = TypeVar("_T")
_ENDS: dict[str, tuple[int, str, str]] = {
    "broken": (500, NOT_FINITE, "not_finite"),
    "failed": (500, "the model failed; the server's log says why", "failed"),
    "stopping": (503, "the server is stopping", "stopping"),
}
"""Ends of rows without an answer: status, message, code."""


def _ended(end: str) -> ApiError:
    status, message, code = _ENDS[end]
    return ApiError(status, message, code=code, retry_after=5 if status == 503 else 0)


class _Request:
    """The rows of one request, and what has come of them."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service, self.asked = service, asked
        self.loaded: Loaded | None = None
        self.rows: list[Row] = []
        self.answer: Answer | None = None
        self.come: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        service.rows += asked.rows

    def close(self) -> None:
        """It has ended, however."""
        self._service.close(self)


class Service:
    """What a server of models has.

    Args:
        queue: rows that may wait beyond the slots of one model.

    Attributes:
        rows: of all requests that are under way.
    """

    def __init__(self, shelf: Shelf, engine: Engine, queue: int) -> None:
        self.shelf, self.engine = shelf, engine
        self.slots, self.queue = shelf.slots, queue
        self.rows = 0
        self._stopping = asyncio.Event()
        self._of_row: dict[Row, tuple[_Request, int]] = {}

    def app(self) -> Starlette:
        routes = [
            Route(f"{API}/models", self._models),
            Route(f"{API}/models/{{name:path}}", self._model),
            Route(f"{API}/completions", self._completions, methods=["POST"]),
            Route(f"{API}/chat/completions", self._chat, methods=["POST"]),
            Route("/health", self._health),
            *(Route(path, _file(*file)) for path, file in PAGE.items()),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _refused,
            HTTPException: _http_refused,
            ClientDisconnect: _nobody,
            Exception: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def stop(self, seconds: float) -> None:
        """Take no requests any more; those that are being answered have so many seconds, and the others are told."""
        self._stopping.set()
        self.engine.stop(seconds)

    def arrived(self, told: Told) -> None:
        """What the engine says; on the event loop's thread."""
        for row, piece in told:
            request, index = self._of_row[row]
            request.come.put_nowait((index, piece))
            if piece.end:
                del self._of_row[row]
                self.shelf.release(row.loaded)

    def close(self, request: _Request) -> None:
        self.rows -= request.asked.rows
        self.engine.drop([row for row in request.rows if row in self._of_row])
        if request.loaded is not None:
            self.shelf.release(request.loaded)

    # ------------------------------------------------------------------------------------------ routes

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "stopping" if self._stopping.is_set() else "ok", "rows": self.rows})

    async def _models(self, request: Request) -> Response:
        described = []
        for offer in await self.shelf.offers():
            described += [_described(name, offer) for name in (*offer.aliases, offer.name)]
        return JSONResponse({"object": "list", "data": described})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            return JSONResponse(_described(name, await self.shelf.find(name)))
        except Unknown as error:
            raise _unknown(error) from None

    async def _completions(self, request: Request) -> Response:
        return await self._answered(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answered(request, chat=True)

    async def _answered(self, http: Request, chat: bool) -> Response:
        asked = read(await _body(http), chat)
        if self._stopping.is_set():
            raise _ended("stopping")
        if asked.rows > self.slots:
            raise ApiError(400, f"{asked.rows} texts are asked for at once, {self.slots} are allowed", param="n")
        if self.rows + asked.rows > self.slots + self.queue:
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_after=1)
        request, response = _Request(self, asked), None
        try:
            await _unless(self._begin(request), _gone(http), self._stops())
            response = _Stream(request) if asked.stream else JSONResponse(await _unless(_whole(request), _gone(http)))
            return response
        finally:
            if not isinstance(response, _Stream):
                request.close()

    async def _stops(self) -> Exception:
        """When requests that have no rows yet are told that the server stops."""
        await self._stopping.wait()
        return _ended("stopping")

    async def _begin(self, request: _Request) -> None:
        asked = request.asked
        try:
            loaded = request.loaded = await self.shelf.lease(asked.model)
        except Unknown as error:
            raise _unknown(error) from None
        except TooLarge as error:
            raise ApiError(400, str(error), param="model", code="model_too_large") from None
        rows, request.answer = await asyncio.to_thread(_rows, asked, loaded)
        for index, row in enumerate(rows):
            loaded.users += 1
            self._of_row[row] = request, index
        request.rows = rows
        self.engine.add(rows)


def _rows(asked: Asked, loaded: Loaded) -> tuple[list[Row], Answer]:
    """What is to be written, and the form of the answer. Raises ApiError."""
    talk, param = loaded.format, "messages" if asked.chat else "prompt"
    context, dropped = talk.block_size, 0
    prompts: list[list[int]] = []
    try:
        for given in asked.prompts:
            if isinstance(given, str):
                prompts += encoded(talk.tokenizer, [given], talk.vocab_size)
            elif not asked.chat:
                prompts.append(_checked(given, talk.vocab_size))
            elif asked.truncation:
                found = talk.prompt(given, talk.room(asked.max_tokens or context))
                prompts.append(found.ids)
                dropped = found.dropped + (found.cut > 0)
            else:
                prompts.append(talk.encode(given))
    except Refused as error:
        raise ApiError(400, "; ".join(error.problems), param=param, code="invalid_value") from None
    rows = []
    for prompt in prompts:
        left = context - len(prompt)
        room = asked.max_tokens or (left if asked.chat else min(DEFAULT_TOKENS, left))
        room = min(room, left) if asked.truncation else room
        if not 1 <= room <= left:
            raise ApiError(
                400,
                f"the model's context is {context} tokens: there are {len(prompt)} in the {param}, and {max(room, 1)} "
                "are to be written",
                param=param,
                code="context_length_exceeded",
            )
        for i in range(asked.n):
            if asked.chat:
                text = Text(talk.tokenizer, prompt, (*asked.stop, *talk.stop), talk.ends)
            else:
                text = Text(talk.tokenizer, prompt, asked.stop)
            text.take()  # an answer does not repeat its prompt
            rows.append(Row(loaded, prompt, asked.choice, (asked.seed, i), room, text, not asked.stream))
    return rows, Answer(asked, loaded.offer.name, sum(map(len, prompts)), dropped)


def _checked(ids: list[int], vocab_size: int) -> list[int]:
    """Token ids as a request gives them. Raises Refused."""
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise Refused(f"prompt: there is no token {wrong[0]}; the model has {vocab_size}")
    return ids


async def _whole(request: _Request) -> dict[str, Any]:
    """All texts of a request, when they have ended. Raises ApiError."""
    texts, ends, tokens = [""] * len(request.rows), [""] * len(request.rows), 0
    while not all(ends):
        index, piece = await request.come.get()
        texts[index] += piece.text
        if piece.end in _ENDS:
            raise _ended(piece.end)
        if piece.end:
            ends[index] = piece.end
            tokens += piece.tokens
    return request.answer.whole(zip(texts, ends, strict=True), tokens)


async def _events(request: _Request) -> AsyncIterator[dict[str, str]]:
    """The texts of a request as server-sent events, as they come."""
    answer, left, tokens = request.answer, len(request.rows), 0
    if request.asked.chat:
        for index in range(left):
            yield _event(answer.chunk(index, "", first=True))
    while left:
        index, piece = await request.come.get()
        if piece.text:
            yield _event(answer.chunk(index, piece.text))
        if piece.end in _ENDS:
            yield _event(_ended(piece.end).body())
            return
        if piece.end:
            left, tokens = left - 1, tokens + piece.tokens
            yield _event(answer.chunk(index, "", piece.end))
    if request.asked.usage_in_stream:
        yield _event(answer.usage(tokens))
    yield {"data": "[DONE]"}


def _event(body: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(body, separators=(",", ":"))}


class _Stream(EventSourceResponse):
    """The events of a request, which is closed whatever becomes of them, also before the first one."""

    def __init__(self, request: _Request) -> None:
        super().__init__(_events(request), send_timeout=SEND_SECONDS)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._request.close()


async def _body(http: Request) -> bytes:
    """A request's body. Raises ApiError."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json")

    async def read_all() -> bytes:
        body = b""
        async for piece in http.stream():
            body += piece
            if len(body) > MOST_BYTES:
                raise too_large
        return body

    too_large = ApiError(413, f"the body is larger than {MOST_BYTES} bytes")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise too_large
    try:
        return await asyncio.wait_for(read_all(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None


async def _unless(work: Coroutine[Any, Any, _T], *ends: Coroutine[Any, Any, Exception]) -> _T:
    """What this work returns, unless one of the ends comes first, which is raised then."""
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(coroutine) for coroutine in (work, *ends)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise next(task.result() for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(http: Request) -> Exception:
    """When the client goes away. The body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    return ClientDisconnect()


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("orchestrate.tools.serving").joinpath(name).read_bytes()

    async def sent(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return sent


def _described(name: str, offer: Offer) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": offer.created,
        "owned_by": "orchestrate",
        "checkpoint": offer.name,
        "iter": offer.iter,
        "val_loss": offer.val_loss,
    }


def _unknown(error: Unknown) -> ApiError:
    return ApiError(404, str(error), param="model", code="model_not_found")


async def _refused(request: Request, error: ApiError) -> Response:
    return refusal(error)


async def _http_refused(request: Request, error: HTTPException) -> Response:
    return refusal(ApiError(error.status_code, error.detail))


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(ApiError(500, "the server failed; its log says why", code="failed"))
