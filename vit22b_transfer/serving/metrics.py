"""What a server counts, and its text form for Prometheus (exposition format 0.0.4)."""

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Sequence


class Metrics:
    """Counts since the start; any thread may add.

    batch_sizes: upper bounds of the histogram of batches. queue_length: asked when the
      text is made.
    """

    def __init__(self, batch_sizes: Sequence[int], queue_length: Callable[[], int]):
        self._bounds, self._queue_length = tuple(batch_sizes), queue_length
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._batches = [0] * len(self._bounds)
        self._examples = 0
        self._device_seconds = 0.0
        self._lock = threading.Lock()

    def add_request(self, endpoint: str, outcome: str, seconds: float) -> None:
        """Counts a request that ended so, `ok` or the status, after so long."""
        with self._lock:
            self._requests[endpoint, outcome] += 1
            self._seconds[endpoint] += seconds  # pyright: ignore[reportArgumentType]

    def add_batch(self, size: int, seconds: float) -> None:
        """Counts a batch of `size` requests that was on the device for so long."""
        with self._lock:
            place = bisect.bisect_left(self._bounds, size)
            self._batches[min(place, len(self._batches) - 1)] += 1
            self._examples += size
            self._device_seconds += seconds

    def seconds_per_batch(self) -> float:
        """The mean so far, 1 before there is one."""
        with self._lock:
            count = sum(self._batches)
            return self._device_seconds / count if count else 1.0

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        with self._lock:
            lines = _head("requests_total", "counter", "Requests by how they ended.")
            for (endpoint, outcome), count in sorted(self._requests.items()):
                labels = f'endpoint="{endpoint}",outcome="{outcome}"'
                lines.append(f"vit22b_requests_total{{{labels}}} {count}")
            lines += _head(
                "request_seconds", "summary", "From the headers to the answer."
            )
            for endpoint, seconds in sorted(self._seconds.items()):
                of = sum(n for (name, _), n in self._requests.items() if name == endpoint)
                label = f'{{endpoint="{endpoint}"}}'
                lines.append(f"vit22b_request_seconds_sum{label} {seconds:.6f}")
                lines.append(f"vit22b_request_seconds_count{label} {of}")
            lines += _head("queue_length", "gauge", "Requests that wait for a batch.")
            lines.append(f"vit22b_queue_length {self._queue_length()}")
            lines += _head("batch_size", "histogram", "Requests in a batch.")
            total = 0
            for bound, count in zip(self._bounds, self._batches, strict=True):
                total += count
                lines.append(f'vit22b_batch_size_bucket{{le="{bound}"}} {total}')
            lines.append(f'vit22b_batch_size_bucket{{le="+Inf"}} {total}')
            lines.append(f"vit22b_batch_size_sum {self._examples}")
            lines.append(f"vit22b_batch_size_count {total}")
            lines += _head("device_seconds_total", "counter", "Time spent in batches.")
            lines.append(f"vit22b_device_seconds_total {self._device_seconds:.6f}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_: str) -> list[str]:
    return [f"# HELP vit22b_{name} {help_}", f"# TYPE vit22b_{name} {kind}"]
