"""SIGTERM, SIGINT and SIGHUP end a run where it can be gone on with."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While entered, these signals only set a flag; a second one acts as ever.

    Standard error tells of the first, since a step may take long, and what comes before
    it longer.

    SIGHUP, of a terminal that is closed, is left alone where it is ignored, as under
    `nohup`. With several processes JAX notes SIGTERM, and SIGHUP is passed on as one:
    one process is enough, and all agree on a point to stop at.
    """

    def __init__(self):
        self._received = self._agreed = False
        self._points = 0
        self._previous = {}

    def asked(self) -> bool:
        """Whether to stop at this point of the run; once true, it stays true.

        Every process asks at the same points in the same order.
        """
        if self._agreed:
            return True
        if jax.process_count() > 1:
            # JAX's points have to be numbered without a gap.
            self._points += 1
            reached = multihost_utils.reached_preemption_sync_point(self._points)
            self._agreed = bool(reached)
        else:
            self._agreed = self._received
        return self._agreed

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        handlers = {signal.SIGHUP: self._pass_on}
        if jax.process_count() == 1:
            numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            handlers = dict.fromkeys(numbers, self._receive)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self._received = True
        self.__exit__()
        # Not `print`: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(
            2, f"{name}: stopping after what is running; again: at once\n".encode()
        )

    def _pass_on(self, number, frame):
        self.__exit__()
        os.kill(os.getpid(), signal.SIGTERM)
