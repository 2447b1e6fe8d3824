"""`inspect`: what the model will see of the first rows."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from lightning_trainer.diagnose.inspect_rows import look
from lightning_trainer.diagnose.page import as_html
from lightning_trainer.diagnose.terminal import as_text
from lightning_trainer.engine.run import quiet_stack
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.types import InputError


def run(command: str, words: list[str]) -> int:
    """Print the rows, or write them as a page."""
    parser = argparse.ArgumentParser(
        prog=f"lightning-trainer {command}",
        description="What the model will see of the first rows. Other options are those of `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=3, help="training rows shown (3)")
    parser.add_argument("--html", type=Path, default=None, help="write a page to this file instead")
    given, rest = parser.parse_known_args(words)
    if given.rows < 1:
        raise InputError(f"--rows must be at least 1, not {given.rows}")
    with quiet_stack():
        cli = TrainerCLI(["fit", *rest])
        with cli.config_errors():
            view = look(cli.datamodule, given.rows)
    if given.html is not None:
        _write(given.html, as_html(view, "What the model will see"))
        print(f"{given.html}: {view.found} rows")
        return 0
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(as_text(view, colour, shutil.get_terminal_size().columns), end="")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {path}: cannot be written: {error.strerror}") from error
