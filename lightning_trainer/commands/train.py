"""`fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import sys

from lightning_trainer.engine.run import FailedRun, run_command


def run(command: str, words: list[str]) -> int:
    """Run the command; its exit status."""
    try:
        text = run_command([command, *words])
    except FailedRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if text:
        print(text)
    return 0
