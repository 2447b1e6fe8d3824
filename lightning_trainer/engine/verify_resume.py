"""The attempts of `verify-resume`: one that is stopped in the middle, one that goes on, one that was never stopped.

Each is a process of its own, so that nothing but files passes from one to the next. The undisturbed one comes last:
until it has written its checkpoint, only one other stands, and two are the most there ever are.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._util import import_object
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from lightning_trainer import checkpoints
from lightning_trainer.callbacks import HuggingFaceExport, PreviewCallback, StatusFile
from lightning_trainer.engine.run import FailedRun
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.engine.verify_attempt import Plan
from lightning_trainer.types import InputError

LEFT_OUT = (PreviewCallback, HuggingFaceExport, StatusFile, Checkpoint, ProgressBar)
"""Callbacks that only write; some into directories of their own."""

NEVER = 1 << 40
"""Optimizer steps."""

ENDED = (0, 128 + signal.SIGTERM)

Launch = Callable[[Path, Path], int]
"""Carries out the plan in the first file, what is printed to the second; the exit status."""


@dataclass(frozen=True)
class Attempted:
    """What the attempts left behind; it is gone when the temporary folder is.

    Attributes:
        broken: Records of the attempt stopped in the middle and of the one that went on, and their last checkpoint.
        straight: Record and last checkpoint of the undisturbed one.
        left_out: Names of the callbacks that did not take part.
    """

    folder: Path
    stopped: str
    resumed: str
    undisturbed: str
    broken: Path
    straight: Path
    left_out: tuple[str, ...]


@contextmanager
def attempts(
    cli: TrainerCLI, steps: int, say: Callable[[str], None], launch: Launch | None = None
) -> Iterator[Attempted]:
    """Make the three, in a folder next to the run directory that is removed at the end, whatever happens.

    Args:
        cli: Of the `fit` that is to be verified; it is not run.
        steps: Optimizer steps of an attempt.
        say: Told what is being done.
        launch: Starts an attempt; None starts a process.

    Raises:
        InputError: An attempt found fault with the configuration.
        FailedRun: An attempt failed.
    """
    beside = _existing(cli.run_directory.path.absolute().parent)
    name = cli.run_directory.path.name
    with _folder(beside, f".{name}.verify-resume-") as folder:
        left_out = _write_config(cli, folder / "config.yaml")
        attempt = _Attempt(folder, steps, launch or _launch)
        say(f"1/3 training to the middle of {steps} optimizer steps, then SIGTERM")
        attempt.make("stopped", "broken", halfway=True)
        say("2/3 going on from its checkpoint in a new process")
        broken = attempt.make("resumed", "broken", "--ckpt_path", "last")
        say("3/3 training as far without a stop")
        straight = attempt.make("undisturbed", "straight")
        yield Attempted(folder, "stopped", "resumed", "undisturbed", broken, straight, left_out)


class _Attempt:
    def __init__(self, folder: Path, steps: int, launch: Launch) -> None:
        self.folder, self.steps, self.launch = folder, steps, launch
        self.date = datetime.date.today().isoformat()

    def make(self, name: str, run: str, *words: str, halfway: bool = False) -> Path:
        """Its last checkpoint."""
        directory, plan = self.folder / run, self.folder / f"{name}.json"
        given = ["--config", str(self.folder / "config.yaml"), "--trainer.default_root_dir", str(directory), *words]
        Plan(given, str(self.folder / name), self.steps, halfway, self.date).save(plan)
        log = self.folder / f"{name}.log"
        status = self.launch(plan, log)
        if halfway and status == 0:
            raise FailedRun(f"the run ends by itself before optimizer step {self.steps // 2}: lower --steps")
        if status not in ENDED:
            _fail(status, log)
        last = checkpoints.find_last(directory / "checkpoints", lambda _: None)
        if last is None:
            raise FailedRun(f"the attempt left no whole checkpoint behind; it said:\n{_tail(log)}")
        return last


def _launch(plan: Path, log: Path) -> int:
    words = [sys.executable, "-m", "lightning_trainer", "verify-resume", "--attempt", str(plan)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:  # Ctrl-C: its ranks and loader workers go with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def _fail(status: int, log: Path) -> None:
    text = _tail(log)
    if status != 2:
        raise FailedRun(f"an attempt ended with status {status}; it said:\n{text}")
    # Where it stands in the attempt's own file helps nobody; the caller knows where in the user's.
    fault = re.sub(r"^\S+/config\.yaml:\d+:\d+: ", "", text.rpartition("error: ")[2])
    key, _, message = fault.partition(": ")
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
        raise InputError(message, key=key)
    raise InputError(fault)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.is_dir())


@contextmanager
def _folder(beside: Path, prefix: str) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    except OSError as error:
        raise InputError(
            f"no folder can be made in {str(beside)!r} ({error.strerror}); name another place",
            key="trainer.default_root_dir",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_config(cli: TrainerCLI, path: Path) -> tuple[str, ...]:
    """The run's whole configuration, less what only writes; the names of the callbacks left out."""
    config: dict[str, Any] = yaml.safe_load(cli.resolved_config())
    trainer: dict[str, Any] = config["trainer"]
    given = trainer["callbacks"] or []
    given = given if isinstance(given, list) else [given]
    trainer["callbacks"] = [callback for callback in given if not issubclass(_class_of(callback), LEFT_OUT)]
    # The attempts log beside themselves; a logger stays, since callbacks may ask for one.
    trainer.update({"logger": None, "enable_progress_bar": False, "fast_dev_run": False, "max_time": None})
    # Every checkpoint but the last would only take time and room.
    config["checkpoint"].update({"every_n_train_steps": NEVER, "keep_last": 1, "monitor": None})
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return tuple(_class_of(callback).__name__ for callback in given if callback not in trainer["callbacks"])


def _class_of(callback: dict[str, Any]) -> type:
    found: type = import_object(callback["class_path"])
    return found
