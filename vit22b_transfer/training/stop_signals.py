"""SIGTERM and SIGINT end the loop after the current step."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While entered, SIGTERM and SIGINT only set a flag; a second one acts as ever.

    With several processes JAX notes SIGTERM (one is enough) and they agree on a step.
    """

    def __init__(self):
        self._received = False
        self._previous = {}

    def stop_after(self, step: int) -> bool:
        """Whether to end the run after `step`; to be asked once for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __enter__(self):
        is_main_thread = threading.current_thread() is threading.main_thread()
        if is_main_thread and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = True
        self.__exit__()
