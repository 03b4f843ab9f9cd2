"""The page and the endpoints of a served model, as an ASGI application.

    GET  /            the page; /page.js and /page.css are its parts
    POST /v1/caption  image, attention
    POST /v1/answer   image, question, attention
    GET  /health      {"status": "ready", ...}; 503 where it is not
    GET  /metrics     for Prometheus

Every error is {"error": "one sentence"}, but for what comes no further than uvicorn: no
HTTP, clients that are too slow with headers (408), more connections than allowed (503).
"""

import asyncio
import concurrent.futures
import contextlib
import importlib.resources
import logging
import os
import time
from collections.abc import Awaitable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vit22b_transfer import UserError
from vit22b_transfer.serving import forms, limits, metrics
from vit22b_transfer.serving.batching import BatchQueue, PredictionFailed, QueueFull
from vit22b_transfer.serving.forms import Refused
from vit22b_transfer.serving.predictor import Predictor

logger = logging.getLogger(__name__)

# Images that are decoded at a time; `data.images` bounds the memory of all of them.
_DECODING = 4
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_GONE = "gone"  # outcome of a request whose client did not wait


class App:
    """What serves a `Predictor`; `asgi` is the application.

    queue: requests that may wait beside those that are computed.
    local: see `limits.Guard`.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        queue: int,
        local: bool,
        bounds: limits.Limits | None = None,
    ):
        self._predictor = predictor
        self.metrics = metrics.Metrics(predictor.sizes, lambda: len(self.queue))
        self.queue = BatchQueue(
            predictor.predict,
            batch_size=predictor.sizes[-1],
            limit=queue,
            metrics=self.metrics,
        )
        self._room = queue
        self._bodies = limits.Bodies(bounds or limits.Limits())
        self._threads = concurrent.futures.ThreadPoolExecutor(_DECODING, "decoding")
        self.asgi = Starlette(
            routes=[
                *(Route(path, self._page) for path in _PAGE),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/caption", self._caption, methods=["POST"]),
                Route("/v1/answer", self._answer, methods=["POST"]),
            ],
            middleware=[Middleware(limits.Guard, local=local)],
            exception_handlers={HTTPException: _http_error},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, asgi: Starlette):
        del asgi
        work = asyncio.create_task(self.queue.run())
        try:
            yield
        finally:
            work.cancel()
            self._threads.shutdown(wait=False)
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _page(self, request: Request) -> Response:
        name, kind = _PAGE[request.url.path]
        return Response(_file(name), media_type=kind)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": metrics.TYPE})

    async def _health(self, request: Request) -> Response:
        predictor = self._predictor
        checkpoint = predictor.restored.checkpoint
        told: dict[str, Any] = {"status": "ready", "model": "loaded"}
        if not os.path.isdir(checkpoint):
            told["model"] = "loaded; its folder is gone, answers go on from memory"
        told |= {
            "checkpoint": os.path.basename(checkpoint),
            "caption_prompt": predictor.caption_prompt,
            "answer_prompt": predictor.answer_prompt,
            "attention": predictor.grid is not None,
            "queue": len(self.queue),
        }
        if self.queue.failure:
            told["status"] = f"the last batch failed ({self.queue.failure})"
        return JSONResponse(told, 503 if self.queue.failure else 200)

    async def _caption(self, request: Request) -> Response:
        return await self._counted(request, "caption")

    async def _answer(self, request: Request) -> Response:
        return await self._counted(request, "answer")

    async def _counted(self, request: Request, endpoint: str) -> Response:
        start = time.monotonic()
        try:
            response: Response = JSONResponse(
                await self._told(request, asked=endpoint == "answer")
            )
            outcome = "ok"
        except ClientDisconnect:
            response, outcome = Response(status_code=400), _GONE
        except Refused as refused:
            response, outcome = limits.error(refused), str(refused.status)
        except Exception:  # a fault of ours; the others shall not suffer
            logger.exception("a request failed")
            failed = Refused(503, "the server failed; its log says why.")
            response, outcome = limits.error(failed), "503"
        self.metrics.add_request(endpoint, outcome, time.monotonic() - start)
        return response

    async def _told(self, request: Request, *, asked: bool) -> dict[str, Any]:
        if request.query_params:
            raise Refused(400, "nothing is read behind a '?'; send fields in the body.")
        if len(self.queue) >= self._room:
            raise _full(2)
        kind = request.headers.get("content-type", "")
        predictor = self._predictor

        def prepared(body: bytes):
            form = forms.read(kind, body, asked=asked)
            prompt = predictor.prompt_of(form.question)
            return predictor.prepare(form.image, prompt, attention=form.attention)

        try:
            async with self._bodies.read(request) as body:
                loop = asyncio.get_running_loop()
                one = await _unless_gone(
                    request, loop.run_in_executor(self._threads, prepared, body)
                )
            return await _unless_gone(request, self.queue.answer(one))
        except UserError as error:
            raise Refused(400, f"{error}.") from error
        except QueueFull as error:
            raise _full(error.seconds) from error
        except PredictionFailed as error:
            raise Refused(503, f"{error}.", retry_after=10) from error


def _full(seconds: int) -> Refused:
    return Refused(
        503, f"too many requests wait; try again in {seconds} s.", retry_after=seconds
    )


async def _unless_gone(
    request: Request, work: Coroutine[Any, Any, Any] | Awaitable[Any]
) -> Any:
    """The result of the work, which is given up if the client goes.

    Raises:
      ClientDisconnect: then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {
        404: "there is no such page; see /, /v1/caption, /v1/answer, /health, /metrics",
        405: "this place takes another method; images are sent by POST",
    }.get(error.status_code, error.detail)
    refused = limits.error(Refused(error.status_code, f"{sentence}."))
    for name, value in (error.headers or {}).items():
        refused.headers[name] = value
    return refused


def _file(name: str) -> bytes:
    return (importlib.resources.files(__package__ or "") / name).read_bytes()
