"""SIGINT and SIGTERM as an exception of ours.

Lightning answers a KeyboardInterrupt itself: it ignores SIGINT from then on and exits with status 1. So it never sees
one: until RunCheckpoint answers signals with a checkpoint, they raise `Interrupted`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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


def is_interruptible() -> bool:
    """Whether SIGTERM raises where the main thread stands: nothing is to be saved first."""
    return signal.getsignal(signal.SIGTERM) is _raise


@contextmanager
def protected() -> Iterator[None]:
    """Nobody ends the process while this runs, however long it takes: a checkpoint is being written."""
    global _protections
    _protections += 1
    try:
        yield
    finally:
        _protections -= 1


def is_protected() -> bool:
    """Whether something runs that must not be cut short."""
    return _protections > 0


_protections = 0


@contextmanager
def heard_elsewhere() -> Iterator[Callable[[], int]]:
    """Let another thread hear of signals: Python answers none while its main thread waits in C, for a rank say.

    Yields:
        A function that returns the first SIGINT or SIGTERM since its last call, or 0.
    """
    if not in_main_thread():
        yield lambda: 0
        return
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    _listen_in_this_process_alone()
    _writers.append(writer)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def heard() -> int:
        try:
            return next((signum for signum in os.read(reader, 64) if signum in ANSWERED), 0)
        except BlockingIOError:
            return 0

    try:
        yield heard
    finally:
        signal.set_wakeup_fd(before)
        _writers.remove(writer)
        os.close(writer)
        os.close(reader)


_writers: list[int] = []


@cache
def _listen_in_this_process_alone() -> None:
    """A loader's worker is forked with the pipe; its signals are not ours."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) if _writers else None)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
