"""What a server counts, for Prometheus."""

from collections.abc import Callable, Sequence

import prometheus_client

TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Counts since the start; any thread may add.

    batch_sizes: upper bounds of the histogram of batches. queue_length: asked when the
      text is made.
    """

    def __init__(self, batch_sizes: Sequence[int], queue_length: Callable[[], int]):
        # Not the process's own: an instance starts at zero.
        self._registry = registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "vit22b_requests",
            "Requests by how they ended: ok, gone (the client), or the status.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._seconds = prometheus_client.Summary(
            "vit22b_request_seconds",
            "From the headers of a request to its answer.",
            ["endpoint"],
            registry=registry,
        )
        prometheus_client.Gauge(
            "vit22b_queue_length", "Requests that wait for a batch.", registry=registry
        ).set_function(queue_length)
        self._batches = prometheus_client.Histogram(
            "vit22b_batch_size",
            "Requests that were computed together.",
            buckets=list(batch_sizes),
            registry=registry,
        )
        self._device = prometheus_client.Summary(
            "vit22b_batch_seconds", "Time of a batch on the device.", registry=registry
        )
        self._count, self._spent = 0, 0.0

    def add_request(self, endpoint: str, outcome: str, seconds: float) -> None:
        """Counts a request that ended so, `ok` or the status, after so long."""
        self._requests.labels(endpoint, outcome).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def add_batch(self, size: int, seconds: float) -> None:
        """Counts a batch of `size` requests that was on the device for so long."""
        self._batches.observe(size)
        self._device.observe(seconds)
        self._count, self._spent = self._count + 1, self._spent + seconds

    def seconds_per_batch(self) -> float:
        """The mean so far, 1 before there is one."""
        return self._spent / self._count if self._count else 1.0

    def text(self) -> bytes:
        """All of it, as Prometheus reads it, of the type `TYPE`."""
        return prometheus_client.generate_latest(self._registry)
