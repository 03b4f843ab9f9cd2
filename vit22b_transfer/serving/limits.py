"""What a client may take: bytes, time and a page's place; the rest is refused early."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vit22b_transfer.serving.forms import Refused

# Of every answer. Scripts, styles and requests of the page are of this server alone.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    body: bytes of a request. bodies: bytes of all that are held at a time.
    seconds: in which headers, and then a body, must have come.
    connections: open at a time; beyond it requests get 503.
    """

    body: int = 32 << 20
    bodies: int = 128 << 20
    seconds: float = 20.0
    connections: int = 512


class Bodies:
    """Bodies of requests that are read, no more of them at a time than is allowed."""

    def __init__(self, limits: Limits):
        self._limits, self.held = limits, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request):
        """A context with a request's body; after it, the body counts no more.

        Raises:
          Refused: 413 if it is too large, 408 if it is too slow, 503 if there are too
            many others. What else the client sends is then read and thrown away for a
            while, so that it hears the answer.
        """
        parts: list[bytes] = []
        with self._holding() as hold:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    self._check(_length(request))
                    async for part in request.stream():
                        hold(len(part))
                        parts.append(part)
            except Refused:
                parts.clear()
                await self._discard(request)
                raise
            except TimeoutError:
                parts.clear()
                raise Refused(
                    408,
                    f"the body was not there after {self._limits.seconds:g} s; send it "
                    "faster, or a smaller image.",
                ) from None
            body = b"".join(parts)
            parts.clear()
            yield body

    @contextlib.contextmanager
    def _holding(self) -> Iterator:
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            mine, self.held = mine + size, self.held + size
            self._check(mine)
            if self.held > self._limits.bodies:
                raise Refused(
                    503, "too many images are being sent; try again.", retry_after=2
                )

        try:
            yield hold
        finally:
            self.held -= mine

    def _check(self, size: int) -> None:
        if size > self._limits.body:
            raise Refused(
                413,
                f"the body has more than {self._limits.body >> 20} MiB; send a smaller "
                "image.",
            )

    async def _discard(self, request: Request) -> None:
        seen = 0
        with contextlib.suppress(TimeoutError, RuntimeError):
            async with asyncio.timeout(min(2.0, self._limits.seconds)):
                async for part in request.stream():
                    seen += len(part)
                    if seen > 4 * self._limits.body:
                        return


def _length(request: Request) -> int:
    said = request.headers.get("content-length", "0")
    return int(said) if said.isdecimal() and len(said) < 20 else 0


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine alone."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class Guard:
    """ASGI middleware: who may ask, and headers that keep the page to itself.

    local: the server listens on this machine alone. Then a request must call it by one
      of that machine's names: a page of a stranger whose name was made to point here
      (DNS rebinding) calls it by its own. In any case a POST that a browser sends for a
      page of another origin is refused.
    """

    def __init__(self, app: ASGIApp, *, local: bool):
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        refused = self._refusal(scope)
        app = self._app if refused is None else error(refused)
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Refused | None:
        said: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            said.setdefault(name, []).append(value)
        hosts = said.get(b"host", [])
        host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
        name = re.sub(r":[0-9]*$", "", host).lower()
        name = re.sub(r"^\[(.*)\]$", r"\1", name)  # an address of IPv6
        if not host or (self._local and not is_loopback(name)):
            return Refused(
                421,
                "this server listens on this machine alone; call it "
                "http://127.0.0.1:PORT or http://localhost:PORT.",
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins = said.get(b"origin", [])
        own = {b"http://" + hosts[0], b"https://" + hosts[0]}  # behind a proxy
        sites = said.get(b"sec-fetch-site", [])
        if not set(origins) <= own or not set(sites) <= {b"same-origin", b"none"}:
            return Refused(403, "only this server's own page may send requests to it.")
        return None


def error(refused: Refused) -> Response:
    """The answer to a request that is refused."""
    headers = {}
    if refused.retry_after is not None:
        headers["retry-after"] = str(refused.retry_after)
    return JSONResponse({"error": refused.sentence}, refused.status, headers)
