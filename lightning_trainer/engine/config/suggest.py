"""The nearest valid name to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LEAST_LIKENESS = 0.6
"""Ratio of matching characters from which a name counts as near; difflib's own cutoff."""


def nearest(name: str, candidates: Iterable[str], count: int = 1, least: float = LEAST_LIKENESS) -> list[str]:
    """The `count` candidates most like `name`, best first; case does not matter.

    >>> nearest("earlystoping", ["EarlyStopping", "Timer"])
    ['EarlyStopping']
    """
    scored = [(_likeness(name, candidate), candidate) for candidate in dict.fromkeys(candidates)]
    near = sorted((pair for pair in scored if pair[0] >= least), key=lambda pair: (-pair[0], pair[1]))
    return [candidate for _, candidate in near[:count]]


def did_you_mean(names: Iterable[str]) -> str:
    """The end of a message: "; did you mean a or b?", empty without names."""
    proposals = " or ".join(names)
    return f"; did you mean {proposals}?" if proposals else ""


def _likeness(name: str, candidate: str) -> float:
    return SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
