"""Who may use the model, and the one thread in which it is used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


class Compute:
    """One thread for everything that touches the model.

    A daemon, and no ThreadPoolExecutor: Python joins the threads of an executor when it exits, and would wait for ever
    for a kernel that hangs.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Run `job` after those submitted before."""
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    async def run(self, job: Callable[[], Result]) -> Result:
        """Its result; the event loop goes on meanwhile."""
        return await asyncio.wrap_future(self.submit(job))

    def close(self, timeout: float) -> bool:
        """End the thread; False if it is still at work after `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # whoever waits for the result raises it
                future.set_exception(error)
            del future, job, item


def note_exception(ended: asyncio.Future[Any]) -> None:
    """Look at how something ended, which asyncio complains of where nobody waits for it any more."""
    if not ended.cancelled():
        ended.exception()


class Turns:
    """One at a time, in the order of their coming; an urgent one goes before those who wait.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def taken(self) -> bool:
        """Whether someone has the turn."""
        return self._taken

    async def take(self, urgent: bool = False) -> None:
        """Wait for the turn; `give` it back."""
        place = self.enter(urgent)
        try:
            await place
        except BaseException:
            self.leave(place)
            raise

    def enter(self, urgent: bool = False) -> asyncio.Future[None]:
        """Take a place at once; to be awaited, which is having the turn, or left by `leave`."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._taken:
            (self._waiting.appendleft if urgent else self._waiting.append)(place)
        else:
            self._taken = True
            place.set_result(None)
        return place

    def leave(self, place: asyncio.Future[None]) -> None:
        """Give up a place whose turn has not been used; once, and not after `give`."""
        if place.done() and not place.cancelled():
            self.give()
        elif place in self._waiting:
            self._waiting.remove(place)

    def give(self) -> None:
        """Hand the turn to the next."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # whoever waited may have been cancelled a moment ago
                place.set_result(None)
                return
        self._taken = False
