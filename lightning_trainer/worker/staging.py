"""Room on the host for one update, where bytes from the wire wait until all of them are there and verified."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.layout import Entry

ALIGNMENT = 64


class Staging:
    """One place per tensor of a layout; nothing on the wire says how large it is.

    Digests are made as the bytes come, so that a commit needs no second look at them.

    Args:
        layout: Of what is taken.

    Attributes:
        held: Number of a tensor -> digest of what lies whole in its place.
        cursor: Bytes taken of the tensors that are needed, laid end to end.
    """

    def __init__(self, layout: Sequence[Entry]) -> None:
        self._layout = layout
        sizes = [-(-entry.nbytes // ALIGNMENT) * ALIGNMENT for entry in layout]
        self._places = [0, *accumulate(sizes)]
        self._memory = memoryview(bytearray(self._places[-1]))
        self.held: dict[int, bytes] = {}
        self.expect(())

    def expect(self, needed: Sequence[int]) -> None:
        """The tensors whose bytes come next, in this order; others keep what they hold."""
        self._needed = tuple(needed)
        self._at, self._filled, self.cursor = 0, 0, 0
        self.total = sum(self._layout[number].nbytes for number in needed)
        self._hash = hashlib.sha256()
        for number in needed:
            self.held.pop(number, None)
        self._close_full()

    def take(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            Refusal: They are more than are expected.
        """
        if self.cursor + len(data) > self.total:
            raise Refusal(Reason.REASON_INVALID_ARGUMENT, f"the update has {self.total} bytes", ["data"])
        rest = memoryview(data)
        while len(rest):
            number = self._needed[self._at]
            part = rest[: self._layout[number].nbytes - self._filled]
            start = self._places[number] + self._filled
            self._memory[start : start + len(part)] = part
            self._hash.update(part)
            self._filled += len(part)
            self.cursor += len(part)
            rest = rest[len(part) :]
            self._close_full()

    def _close_full(self) -> None:
        """Note the digests of tensors that are whole; those without elements are from the start."""
        while self._at < len(self._needed) and self._filled == self._layout[self._needed[self._at]].nbytes:
            self.held[self._needed[self._at]] = self._hash.digest()
            self._at, self._filled, self._hash = self._at + 1, 0, hashlib.sha256()

    def bytes_of(self, number: int) -> memoryview:
        """What lies in the place of a tensor."""
        start = self._places[number]
        return self._memory[start : start + self._layout[number].nbytes]
