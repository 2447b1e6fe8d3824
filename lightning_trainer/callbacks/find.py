"""The callbacks of a kind that a Trainer has."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def callbacks_of(trainer: Any, kind: type[T]) -> list[T]:
    """Those of the Trainer's callbacks that are of this class, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]
