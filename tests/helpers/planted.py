"""Callbacks that do what a test wants to see found or survived; named in its YAML."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback


class TrueNoise(Callback):
    """Training that never repeats: noise of the operating system on the weights."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            next(module.parameters()).add_(random.SystemRandom().uniform(1e-4, 2e-4))


class NudgeOnResume(Callback):
    """A weight that is not what was saved."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if trainer.global_step:
            with torch.no_grad():
                dict(module.named_parameters())["model.model.norm.weight"][5] += 0.25


class Forgetful(Callback):
    """Noise from a generator of its own, whose state it forgets to save."""

    def __init__(self) -> None:
        self.rng = random.Random(0)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            next(module.parameters()).add_(self.rng.uniform(1e-4, 2e-4))


class _Between(Callback):
    """Does something before the save of one optimizer step, and undoes it before that of another."""

    def __init__(self, first: int, last: int) -> None:
        self.at: dict[int, Callable[[], None]] = {first: self.begin, last: self.end}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.root = Path(trainer.default_root_dir)
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.at.get(trainer.global_step, lambda: None)()

    def begin(self) -> None: ...

    def end(self) -> None: ...


class SmallFiles(_Between):
    """No file may become larger than a few KiB."""

    def begin(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.before[1]))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class FullDisk(_Between):
    """Something else has taken all but a little of the disk."""

    def __init__(self, first: int, last: int, left: int = 65536) -> None:
        super().__init__(first, last)
        self.left = left

    def begin(self) -> None:
        free = os.statvfs(self.root)
        (self.root / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - self.left)))

    def end(self) -> None:
        (self.root / "ballast").unlink()


class ReadOnly(_Between):
    """Nothing can be written among the checkpoints: for root, who may write everywhere, they are a mounted disk."""

    def begin(self) -> None:
        self._set("ro", 0o555)

    def end(self) -> None:
        self._set("rw", 0o755)

    def _set(self, option: str, mode: int) -> None:
        folder = self.root / "checkpoints"
        if os.geteuid() == 0:
            subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)
        else:
            folder.chmod(mode)
