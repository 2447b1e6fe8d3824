"""How everything here is measured: arms in turn, A B A B …, medians with their range, and ratios pair by pair.

Two shared cores are noisy, and their speed drifts: a time alone says little, a ratio of two arms that ran one after the
other says much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure of a table.

    Args:
        what: Is measured.
        values: One for each round.
        unit: Of the values; empty for a ratio.
        at_most: The bound it must keep, or None.
        at_least: The same from below.
        note: Whatever a reader must know beside it.
    """

    what: str
    values: tuple[float, ...]
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        """Whether the median keeps its bounds."""
        below = self.at_most is None or self.median <= self.at_most
        return below and (self.at_least is None or self.median >= self.at_least)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "values": list(self.values), "median": self.median, "holds": self.holds}

    def as_line(self) -> str:
        """For people."""
        spread = "" if len(self.values) < 2 else f" ({min(self.values):.4g} to {max(self.values):.4g})"
        bounds = [("at most", self.at_most), ("at least", self.at_least)]
        wanted = "".join(f"  {word} {value:g}" for word, value in bounds if value is not None)
        verdict = f"{wanted}{'' if self.holds else '  MISSED'}" if wanted else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.what:44} {self.median:10.4g} {self.unit:9}{spread:26}{verdict}{note}"


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round; every round runs every arm once, in this order.

    Args:
        arms: What to run, by name.
        rounds: That count.
        warmup: Rounds before them, that do not.
        clock: process_time counts the processor's seconds of this process, perf_counter the wall's.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + rounds):
        for name, act in arms.items():
            started = clock()
            act()
            if number >= warmup:
                found[name].append(clock() - started)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Ours / theirs, round by round."""
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))
