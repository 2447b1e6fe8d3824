"""Callbacks that do what a test wants to see found or survived; named in its YAML."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_trainer.preview.base import PreviewBackend, failed
from lightning_trainer.types import PreviewResult


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


class Odd:
    """No plain value."""


class KeepsAnObject(Callback):
    """State that can be written and not be read back."""

    def state_dict(self) -> dict[str, Any]:
        return {"kept": Odd()}


class Slow(Callback):
    """Steps that take a little longer, so that other processes keep up."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.05)


class EndsInAWindow(Callback):
    """Stops training after a number of micro-batches, as a clock may."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop |= batch_idx + 1 == self.batches


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
    """No file may become larger than `limit` bytes."""

    def __init__(self, first: int, last: int, limit: int = 20_000) -> None:
        super().__init__(first, last)
        self.limit = limit

    def begin(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

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


class Gradients(Callback):
    """Writes each optimizer step's gradient to `folder`, as RANK-STEP.pt."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [parameter.grad.flatten() for parameter in module.parameters()]
        torch.save(torch.cat(gradients), self.folder / f"{trainer.global_rank}-{trainer.global_step}.pt")


class Signals(Callback):
    """Sends a signal to ranks of a run of two, in the middle of an optimizer step.

    Args:
        by: Rank that sends it; by then the other one waits for it in a collective.
        to: Ranks that get it.
        signum: Which.
        step: Optimizer steps completed.
        hook: Of the callback.
    """

    def __init__(
        self, by: int, to: list[int], signum: int = 15, step: int = 2, hook: str = "on_train_batch_start"
    ) -> None:
        self.by, self.to, self.signum, self.step = by, to, signum, step
        setattr(self, hook, self._send)

    def _send(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.by and not trainer.sanity_checking:
            send_to_ranks(trainer, self.to, self.signum)
            self.step = -1


class Fails(Callback):
    """Raises in one rank, in the middle of an optimizer step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            raise ValueError(f"rank {self.rank} has found something")


class SlowEnd(Callback):
    """One rank has more to do at the end."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        time.sleep(2.0 * (trainer.global_rank == self.rank))


class FullForLogs(_Between):
    """The curves of rank 0, which has some, cannot be written."""

    def begin(self) -> None:
        self._set(self._refuse)

    def end(self) -> None:
        self._set(None)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.loggers = trainer.loggers if trainer.is_global_zero else []

    def _set(self, flush: Callable[[], None] | None) -> None:
        for logger in self.loggers:
            if flush is None:
                del logger.experiment.flush
            else:
                logger.experiment.flush = flush

    def _refuse(self) -> None:
        raise OSError(28, "No space left on device")


def send_to_ranks(trainer: Any, to: list[int], signum: int) -> None:
    """Once the other rank has had the time to begin waiting."""
    other = os.getppid() if trainer.global_rank else trainer.strategy.launcher.procs[0].pid
    _send(trainer.global_rank, other, to, signum)


def _send(rank: int, other: int, to: list[int], signum: int) -> None:
    time.sleep(0.5)
    Path(os.environ["RANKS_SENT"]).touch()
    for receiver in sorted(to, key=lambda receiver: receiver == rank):  # itself last: that may be its end
        os.kill(os.getpid() if receiver == rank else other, signum)


def _given() -> list[int]:
    return json.loads(os.environ["RANKS_TO"])  # type: ignore[no-any-return]


def long_preparation() -> None:
    """Rank 0 takes a minute to read the data, for which the other waits, when SIGTERM comes."""
    from lightning_trainer.data import ChatDataModule

    prepare = ChatDataModule.prepare_data

    def slowly(data: Any) -> None:
        prepare(data)
        send_to_ranks(data.trainer, _given(), signal.SIGTERM)
        time.sleep(60)

    ChatDataModule.prepare_data = slowly  # type: ignore[method-assign]


def late_rank_1() -> None:
    """Rank 1 takes a minute to begin, for which rank 0 waits, when SIGTERM comes."""
    meet = torch.distributed.init_process_group

    def late(*args: Any, **kwargs: Any) -> None:
        if os.environ["LOCAL_RANK"] == "1":
            _send(1, os.getppid(), _given(), signal.SIGTERM)
            time.sleep(60)
        meet(*args, **kwargs)

    torch.distributed.init_process_group = late


class CopiesLate(PreviewBackend):
    """Reads the weights only when it must, as copies from a GPU may; the answer is their sum."""

    backend_type = "late"

    def __init__(self) -> None:
        super().__init__()
        self._asked: list[tuple[Any, int, float]] = []
        self._done: list[PreviewResult] = []

    def _sum(self) -> float:
        return float(sum(p.detach().double().sum() for p in self.model.parameters()))

    def submit(self, requests: Any, sampling: Any, step: int) -> None:
        self._asked.append((requests, step, self._sum()))

    def settle(self) -> None:
        asked, self._asked = self._asked, []
        for requests, step, then in asked:
            assert self._sum() == then, "the weights were changed before `settle`"
            for request in requests:
                result = failed(request, self.backend_type, "")
                self._done.append(replace(result, success=True, text=str(then), weights_step=step))

    def collect(self, timeout: float = 0.0) -> list[PreviewResult]:
        done, self._done = self._done, []
        return done

    def finish(self) -> list[PreviewResult]:
        self.settle()
        return self.collect()
