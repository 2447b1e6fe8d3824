"""What imports cost in a process of its own. Nothing heavy is imported here: it would not be counted."""

from __future__ import annotations

import importlib._bootstrap as bootstrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


@contextmanager
def timed() -> Iterator[list[float]]:
    """Yields a list of the processor's seconds of each outermost import in the block, lazy ones included."""
    seconds: list[float] = []
    inside = False
    find: Callable[..., Any] = bootstrap._find_and_load  # type: ignore[attr-defined]

    def find_and_load(*args: Any) -> Any:
        nonlocal inside
        if inside:
            return find(*args)
        inside, started = True, time.process_time()
        try:
            return find(*args)
        finally:
            inside = False
            seconds.append(time.process_time() - started)

    bootstrap._find_and_load = find_and_load  # type: ignore[attr-defined]  # every import that is not there yet comes by here
    try:
        yield seconds
    finally:
        bootstrap._find_and_load = find  # type: ignore[attr-defined]


def seconds_of_fit(folder: str) -> float:
    """Processor's seconds that a `fit` of a few steps spends in imports, in this process."""
    with timed() as seconds:
        status = import_module("lightning_trainer.cli").main(["fit", "--config", str(Path(folder) / "run.yaml")])
    if status:
        raise RuntimeError(f"fit ended with {status}")
    return sum(seconds)


def seconds_before_fit() -> float:
    """Processor's seconds of what `fit` imports before it reads its configuration, in this process."""
    with timed() as seconds:
        import_module("lightning_trainer.commands.train")
    return sum(seconds)
