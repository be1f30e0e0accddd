"""Stopping a long run from outside: at a good moment when asked once, at once when asked again."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from tqdm.auto import tqdm


STOP_SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT")
# Ctrl-C reaches all processes of a terminal, and a launcher passes it on: within this time, it is the same request.
SAME_REQUEST_SECONDS = 1.0


class StopSignals:
    """
    A context in which SIGTERM, SIGHUP and Ctrl-C do not end the process, but are noted in `received` (their number, or
    `None`). The second one has its usual effect. What the process ignores, as under nohup, stays ignored.

    Only a process's main thread receives signals; in another, this context does nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._received_at = 0.0
        self._handlers = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            tqdm.write(f"{signal.Signals(number).name}: stopping after this step. Send it again to stop at once.")
        elif time.monotonic() - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
