"""Ctrl-C and SIGTERM as a request to finish the step and save."""

import signal
import threading

from ..core.errors import InterruptedRun


class SignalGuard:
    """Inside ``with``, the first SIGINT or SIGTERM only sets `received`; the second acts at once."""

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.received is not None:
            raise InterruptedRun("Stopped at once; the last checkpoint is kept.", number)
        self.received = number
