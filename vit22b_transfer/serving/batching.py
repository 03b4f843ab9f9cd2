"""A bounded queue: requests that arrive while the device works share a batch."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence

from vit22b_transfer import NotFiniteError
from vit22b_transfer.serving.metrics import Metrics
from vit22b_transfer.serving.predictor import Answer, Asked

Predict = Callable[[Sequence[Asked]], list[Answer | NotFiniteError]]

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue has no room; `seconds` from now it may have."""

    def __init__(self, seconds: int):
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


class PredictionFailed(Exception):
    """A batch could not be computed; the message says why."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    asked: Asked
    answer: "asyncio.Future[Answer]"


class BatchQueue:
    """Requests to batches, in the order of their arrival, one batch at a time.

    Nothing waits for company: a request that finds the device idle goes at once, and
    while it is computed others gather. All of an instance is of one event loop, but for
    `predict`, which is called by one thread of its own.

    limit: the most that wait beside those that are being computed.
    """

    def __init__(
        self, predict: Predict, *, batch_size: int, limit: int, metrics: Metrics
    ):
        self._predict, self._batch_size, self._limit = predict, batch_size, limit
        self._metrics = metrics
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "device")
        self.computing = 0  # requests in the batch that is on the device
        self.failure = ""  # the kind of error of the last batch; "" if it was none

    def __len__(self) -> int:
        return len(self._waiting)

    async def answer(self, asked: Asked) -> Answer:
        """What the model says; a caller that is cancelled leaves the queue.

        Raises:
          QueueFull: at once, if there is no room.
          PredictionFailed: if it could not be computed.
        """
        if len(self._waiting) >= self._limit:
            batches = 1 + math.ceil(self._limit / self._batch_size)
            seconds = math.ceil(batches * self._metrics.seconds_per_batch())
            raise QueueFull(min(max(seconds, 1), 60))
        waiting = _Waiting(asked, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            return await waiting.answer
        finally:
            waiting.answer.cancel()
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def run(self) -> None:
        """Computes what arrives, until it is cancelled."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while self._waiting:
                    count = min(len(self._waiting), self._batch_size)
                    await self._compute([self._waiting.popleft() for _ in range(count)])
        finally:
            self._thread.shutdown(wait=False)

    async def _compute(self, batch: list[_Waiting]) -> None:
        loop, start = asyncio.get_running_loop(), time.monotonic()
        self.computing = len(batch)
        try:
            answers = await loop.run_in_executor(
                self._thread, self._predict, [waiting.asked for waiting in batch]
            )
            self.failure = ""
        except Exception as error:
            # Whatever it is, those who come next may be luckier.
            logger.exception("a batch of %d requests failed", len(batch))
            self.failure = type(error).__name__
            why = "the model could not be run; the server's log says why"
            answers = [PredictionFailed(why) for _ in batch]
        self.computing = 0
        self._metrics.add_batch(len(batch), time.monotonic() - start)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():
                continue  # whoever asked is gone
            if isinstance(answer, dict):
                waiting.answer.set_result(answer)
            else:
                waiting.answer.set_exception(PredictionFailed(str(answer)))
