"""One call of a pipeline at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable


class CallLock:
    """Lets one thread at a time into a pipeline's call. Copies and pickles are fresh locks."""

    def __init__(self):
        self.lock = threading.RLock()  # a callback may call the pipeline

    def __reduce__(self) -> tuple:
        return CallLock, ()


def one_call_at_a_time(call: Callable) -> Callable:
    # A call's progress is in the pipeline, where callbacks look for it: guidance, interrupt, the schedulers' state.
    @functools.wraps(call)
    def locked(self, *args, **kwargs):
        with self._call_lock.lock:
            return call(self, *args, **kwargs)

    return locked
