"""Breaker: a worker that does not answer is left alone for a while, one that refuses for good for good."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

FAILURES = 3
"""In a row, before calls stop."""

FIRST, FACTOR, LONGEST, SPREAD = 1.0, 1.6, 60.0, 0.2
"""Seconds to the first probe, growth from one to the next, the longest, and the share by which each is varied."""


class Breaker:
    """Says whether the worker is to be called.

    Args:
        clock: Seconds that only grow.
        rng: Varies the time between probes, so that several trainers do not knock together.

    Attributes:
        state: `closed`: call. `open`: only probe, when `wait` is over. `off`: never again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        self._clock, self._rng = clock, rng or random.Random()
        self.state: Literal["closed", "open", "off"] = "closed"
        self._failures = self._probes = 0
        self._probe_at = 0.0

    def succeeded(self) -> None:
        """A call was answered."""
        if self.state != "off":
            self.state, self._failures, self._probes = "closed", 0, 0

    def failed(self) -> None:
        """A call was not answered, in a way that may pass."""
        self._failures += 1
        if self.state == "off" or (self.state == "closed" and self._failures < FAILURES):
            return
        self.state = "open"
        pause = min(LONGEST, FIRST * FACTOR**self._probes)
        self._probe_at = self._clock() + pause * self._rng.uniform(1 - SPREAD, 1 + SPREAD)
        self._probes += 1

    def refused(self) -> None:
        """The worker will never take this run's calls."""
        self.state = "off"

    def wait(self) -> float | None:
        """Seconds to the next probe; None: there is none to come."""
        return max(0.0, self._probe_at - self._clock()) if self.state == "open" else None
