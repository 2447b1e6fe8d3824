"""SIGINT and SIGTERM as an exception of ours.

Lightning answers a KeyboardInterrupt itself: it ignores SIGINT from then on and exits with status 1. So it never sees
one: until RunCheckpoint answers signals with a checkpoint, they raise `Interrupted`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ANSWERED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the process to end.

    Args:
        signum: SIGINT or SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def in_main_thread() -> bool:
    """Whether this is the thread that Python gives signals to; no other may set handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` on SIGINT and SIGTERM; put the handlers there were back at the end."""
    handlers = {signum: signal.signal(signum, _raise) for signum in ANSWERED} if in_main_thread() else {}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
