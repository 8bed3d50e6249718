"""Who may ask: what every request passes before anything of it is read.

A browser sends requests for any page that it shows. So a request must name this server as its host (or a page
elsewhere could point a name of its own at this address: DNS rebinding), and where it names an origin, that must be this
server too (cross-site requests). Requests of the API need the token, where there is one, and are counted by address.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrate.tools.serving.api import API, ApiError

MOST_ADDRESSES = 10_000

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Rate:
    """So many requests a minute from an address; as many may come at once (a token bucket)."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._left: dict[str, tuple[float, float]] = {}
        """Address: (requests that it may make, as of when)."""

    def wait(self, address: str, now: float) -> float:
        """Count a request; seconds until it would be taken, 0 where it is."""
        if not self._a_minute:
            return 0.0
        left, then = self._left.get(address, (float(self._a_minute), now))
        left = min(self._a_minute, left + (now - then) * self._a_minute / 60)
        if len(self._left) >= MOST_ADDRESSES and address not in self._left:
            # An address that has not asked for a minute has its full number again.
            self._left = {other: kept for other, kept in self._left.items() if now - kept[1] < 60}
            if len(self._left) >= MOST_ADDRESSES:
                return 60.0
        self._left[address] = (left - (left >= 1), now)
        return 0.0 if left >= 1 else (1 - left) * 60 / self._a_minute


class Guard:
    """Wraps an application.

    Args:
        hosts: names that a request may have for this server; none: any.
        token: what requests of the API must bring; empty: nothing.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str, rate: Rate) -> None:
        self._app, self._hosts, self._token, self._rate = app, frozenset(hosts), token.encode("utf-8"), rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as error:
            await refusal(error)(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or (self._hosts and _name(hosts[0]) not in self._hosts):
            raise ApiError(403, "this server is not asked for by that Host; --allow_host names another", code="host")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            raise ApiError(403, "a page of another origin may not ask this server", code="origin")
        if not (scope["path"] + "/").startswith(API + "/"):
            return
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise ApiError(403, "a page of another origin may not ask this server", code="origin")
        address = (scope.get("client") or ("",))[0]
        if wait := self._rate.wait(address, time.monotonic()):
            raise ApiError(
                429, "too many requests from this address", code="rate_limit_exceeded", retry_after=int(wait) + 1
            )
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self._token and not (
            kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8"), self._token)
        ):
            raise ApiError(401, "this server needs its token as API key", code="invalid_api_key")


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def refusal(error: ApiError) -> JSONResponse:
    """The answer to a request that is not accepted."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
