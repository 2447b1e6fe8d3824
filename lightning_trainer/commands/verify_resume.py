"""`verify-resume`: does a run of this configuration, stopped and resumed, end as if it had not been?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_trainer.diagnose.verify_resume import Comparison, compare, read_record
from lightning_trainer.engine.run import FailedRun, quiet_stack
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.engine.verify_attempt import carry_out
from lightning_trainer.engine.verify_resume import Launch, attempts
from lightning_trainer.types import InputError


def run(command: str, words: list[str], launch: Launch | None = None) -> int:
    """Print what came of it; 0 where resume is exact, 1 where it is not."""
    parser = argparse.ArgumentParser(
        prog=f"lightning-trainer {command}",
        description="Train a few optimizer steps twice, once with a stop in the middle and a resume in a new process, "
        "and compare: the rows and the loss of every step, then weights, optimizer and random generators, bit by bit. "
        "It begins from the start, without --ckpt_path, in a temporary folder next to the run directory, which needs "
        "room for two checkpoints; previews, exports and other checkpoints are left out. The exit status is 1 if "
        "anything differs. "
        "Other options are those of `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, the stop in their middle (%(default)s)")
    parser.add_argument("--attempt", type=Path, default=None, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args(words)
    try:
        if given.attempt is not None:
            carry_out(given.attempt)
            return 0
        if given.steps < 2:
            raise InputError(f"--steps must be at least 2, not {given.steps}")
        return _verify(given.steps, rest, launch)
    except FailedRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _verify(steps: int, words: list[str], launch: Launch | None) -> int:
    with quiet_stack():
        cli = TrainerCLI(["fit", *words])
    with cli.config_errors(), attempts(cli, steps, lambda text: print(text, flush=True), launch) as made:
        names = (made.undisturbed, made.stopped, made.resumed)
        straight, stopped, resumed = (read_record(made.folder, name) for name in names)
        if not resumed.steps:
            last = max(stopped.steps, default=0)
            raise FailedRun(
                f"the run ends at optimizer step {last}, where it was stopped, and nothing was left to go on with; "
                "take another --steps, or leave out what ends the run"
            )
        found = compare(straight, stopped, resumed, (made.straight, made.broken))
    if made.left_out:
        print(f"left out, as they only write: {', '.join(made.left_out)}")
    return _tell(found)


def _tell(found: Comparison) -> int:
    print(found.as_text())
    return 0 if found.first is None else 1
