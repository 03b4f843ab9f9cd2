"""uvicorn around the application: one process, one socket, an end without loss."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import h11
import rich.console
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vit22b_transfer import UserError
from vit22b_transfer.serving.app import App
from vit22b_transfer.serving.limits import Limits

_KEEP_ALIVE = 5  # seconds that an idle connection is kept
_BACKLOG = 2048


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet.

    port: 0 takes a free one.

    Raises:
      UserError: if the address cannot be taken, or is none.
    """
    made = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        if made is not None:
            made.close()
        raise UserError(
            f"cannot listen at {host} port {port}: {error}. Take another --port (0 is "
            "any free one) or --host."
        ) from error
    return made


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make(app: App, bounds: Limits | None = None) -> uvicorn.Server:
    """The server of an application."""
    bounds = bounds or Limits()
    config = uvicorn.Config(
        app.asgi,
        http=_protocol(bounds.seconds),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=bounds.connections,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    return uvicorn.Server(config)


def run(app: App, bound: socket.socket, console: rich.console.Console) -> None:
    """Serves until SIGINT or SIGTERM; then what is in the queue is answered first.

    A SIGINT behind another signal ends it at once.
    """
    server = make(app)
    with _signals_end_it():
        bound.listen(_BACKLOG)  # whoever reads the line may connect
        console.print(f"serving at {address(bound)}  (Ctrl-C ends it)", markup=False)
        server.run(sockets=[bound])
    console.print("all requests are answered; stopped", markup=False)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Context in which a signal that uvicorn passes on at its end does nothing more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _ignored) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored(number, frame) -> None:
    del number, frame


def _protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which also gives up clients whose bytes do not come."""

    class Timed(H11Protocol):
        """HTTP/1.1 with a bound of the time from the first byte of headers to the last.

        And from the connection to the first byte; and from an answer that came before
        the end of a body to that end, as uvicorn reads on and throws it away.
        """

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._waits():
                self._stop_waiting()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._give_up)

        def _waits(self) -> bool:
            """Whether all that is asked is answered, and the client's bytes are due."""
            answered = self.conn.our_state is h11.DONE
            theirs = self.conn.their_state
            return theirs is h11.IDLE or (answered and theirs is h11.SEND_BODY)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _give_up(self) -> None:
            self._late = None
            if not self._waits() or self.transport.is_closing():
                return
            if self.conn.their_state is h11.IDLE:
                answer = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n"
                self.transport.write(answer + b"content-length: 0\r\n\r\n")
            self.transport.close()

    return Timed
