"""Which run may change the weights: one at a time, for as long as it is heard of."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from lightning_trainer.rpc.errors import Reason, Refusal

SECONDS = 60.0
"""How long a run that is not heard of keeps the worker."""


class Lease:
    """The right of one run to change the weights.

    Args:
        seconds: Until it ends, counted from the run's last call.
        clock: Seconds that only grow; never the time of day, which may be set back.

    Attributes:
        run_id: Of the holder; empty where there is none.
        token: Number of this lease. Calls with that of an earlier one are refused, however late they come.
        begun_seq: Largest publish_seq of an update that was begun.
        last_seq: publish_seq of what was made resident last.
    """

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._until = float("-inf")
        # Not from 0: a token of the worker's life before must not fit.
        self.run_id, self.token = "", secrets.randbits(48)
        self.begun_seq, self.last_seq = 0, 0

    @property
    def remaining(self) -> float:
        """Seconds until it ends; 0 where it has."""
        return max(0.0, self._until - self._clock())

    def refuse_others(self, run_id: str) -> None:
        """Raises:
        Refusal: Another run holds it.
        """
        if self.remaining and self.run_id != run_id:
            text = f"another run holds the worker for {self.remaining:.0f} s unless it goes on"
            raise Refusal(Reason.REASON_LEASE_HELD, text, ["run_id"], round(self.remaining * 1000) + 1)

    def take(self, run_id: str) -> None:
        """Make `run_id` the holder, with a new token where it was not."""
        self.refuse_others(run_id)
        if not self.remaining:
            self.run_id, self.begun_seq, self.last_seq = run_id, 0, 0
            self.token += 1
        self._until = self._clock() + self._seconds

    def renew(self, run_id: str) -> None:
        """Count from now, if `run_id` is the holder; a lease that has ended is not revived."""
        if self.remaining and run_id == self.run_id:
            self._until = self._clock() + self._seconds

    def check(self, token: int) -> None:
        """Let the holder through, and count from now.

        Raises:
            Refusal: The token is of a lease that has ended.
        """
        if token != self.token or not self.remaining:
            raise Refusal(Reason.REASON_FENCED, "this lease has ended: begin again", ["fencing_token"])
        self.renew(self.run_id)

    def release(self, token: int) -> None:
        """End it, so that another run may begin at once.

        Raises:
            Refusal: The token is of a lease that has ended.
        """
        self.check(token)
        self._until = float("-inf")
