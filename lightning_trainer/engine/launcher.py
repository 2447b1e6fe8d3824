"""RankLauncher: starts this machine's other ranks, and sees to it that all end when one does.

Lightning's own looks every five seconds and answers a rank that ended badly by killing all: rank 0 in the middle of
ending well, too, so that a run that was asked to stop reports 137. And a rank that waits for the others to come, or for
rank 0 to read the data, waits for half an hour after they are gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_trainer.signals import (
    ANSWERED,
    Interrupted,
    heard_elsewhere,
    in_main_thread,
    is_interruptible,
    is_protected,
)
from lightning_trainer.types import InputError

PARENT = "LIGHTNING_TRAINER_RANK_0"
"""Environment variable by which a rank knows the process that started it."""

GRACE, GRACE_WHILE_TRAINING = 3.0, 20.0
"""Seconds a rank has to end by itself once another has ended, or it was asked to; it may be writing a checkpoint."""

_POLL = 0.2


class RankFailed(RuntimeError):
    """Another rank ended, so that this one cannot go on."""


class FailedRank(NamedTuple):
    """A rank that ended badly; `returncode` as Popen has it: negative is a signal."""

    rank: int
    returncode: int

    @property
    def status(self) -> int:
        """As a shell counts it."""
        return 128 - self.returncode if self.returncode < 0 else self.returncode

    @property
    def asked_to_end(self) -> int:
        """SIGINT or SIGTERM, where that is why; 0 otherwise."""
        return self.status - 128 if self.status - 128 in ANSWERED else 0

    def __str__(self) -> str:
        if not self.rank:
            return "rank 0 has ended"
        if self.returncode == -signal.SIGKILL:
            return f"rank {self.rank} was killed (SIGKILL): was there enough memory?"
        if self.returncode < 0:
            return f"rank {self.rank} was ended by {signal.Signals(-self.returncode).name}"
        return f"rank {self.rank} ended with an error; what it said stands above"


def use_rank_launcher(trainer: Trainer) -> None:
    """Let a Trainer start and watch its ranks our way."""
    stock = trainer.strategy.launcher
    if isinstance(stock, _SubprocessScriptLauncher):
        trainer.strategy._launcher = RankLauncher(stock.cluster_environment, stock.num_processes, stock.num_nodes)


def leave_sigterm_to_us(trainer: Trainer) -> None:
    """Keep Lightning from answering SIGTERM; RunCheckpoint does, and asks the other ranks once a step.

    Lightning answers with a collective inside the handler, which deadlocks unless rank 0 alone is asked, and has every
    rank ask rank 0 before each micro-batch, which waits for the device.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    register = connector.register_signal_handlers

    def register_others() -> None:
        before = signal.getsignal(signal.SIGTERM)
        register()
        if in_main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)

    for owner, name, replacement in (
        (connector, "register_signal_handlers", register_others),
        (loop, "_broadcast_sigterm_tensor", lambda: None),
    ):
        if not hasattr(owner, name):  # or the assignment would do nothing, silently
            raise RuntimeError(f"this version of Lightning has no {type(owner).__name__}.{name}; take 2.6")
        setattr(owner, name, replacement)


class RankLauncher(_SubprocessScriptLauncher):
    """Runs a function in all ranks; while it runs, none outlives another by more than the grace.

    A process makes one run: the others end with it.
    """

    _launched = False  # of this process
    _parent: int | None = None  # the process that started this one, where that is ours
    _failed: FailedRank | None = None
    _sigterm_sent = False  # to the main thread, because of it

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, where nobody else does, and call the function in this one.

        Raises:
            RankFailed: Another rank ended with an error.
            Interrupted: Another rank was asked to end before it could ask the others.
            InputError: This process has made a run of several ranks before.
        """
        self._refuse_second_run()
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._start_others()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        self._finished, self._lock = threading.Event(), threading.Lock()
        with heard_elsewhere() as heard:
            watch = threading.Thread(target=self._watch, args=(heard,), name="ranks", daemon=True)
            watch.start()
            try:
                result = function(*args, **kwargs)
                self._finish()
                self._wait_for_others()
                return result
            except BaseException as error:
                self._finish()
                cause = self._root_cause(error)
                self._end_others()
                if cause is None:
                    raise
                raise cause from error
            finally:
                self._finish()
                watch.join()  # it listens to what is closed next

    def _refuse_second_run(self) -> None:
        if RankLauncher._launched and self.num_processes > 1:
            raise InputError(
                "a process makes one run on several devices, whose other processes end with it; start another for the "
                "next, or set trainer.devices: 1",
                key="trainer.devices",
            )
        RankLauncher._launched |= self.num_processes > 1

    def _start_others(self) -> None:
        if self.cluster_environment.creates_processes_externally:
            self._parent = int(os.environ[PARENT]) if PARENT in os.environ else None
            return
        os.environ[PARENT] = str(os.getpid())
        try:
            self._call_children_scripts()
        except BaseException:
            self._kill_others()
            raise
        finally:
            del os.environ[PARENT]

    def _finish(self) -> None:
        """No signal is sent to the main thread from here on; one that is on its way is let pass."""
        while not self._finished.is_set():
            try:
                with self._lock:
                    self._finished.set()
            except Interrupted:
                if not self._sigterm_sent:
                    raise

    def _wait_for_others(self) -> None:
        """To one that has more to do, the end of this process would look like a failure.

        Raises:
            RankFailed: One ended badly after all.
        """
        ended = _wait_for(self._have_ended, GRACE_WHILE_TRAINING)
        failed = self._find_failed()
        if failed is not None:
            raise RankFailed(str(failed))
        if not ended:
            logging.getLogger(__name__).warning("other ranks did not end within %.0f s of this", GRACE_WHILE_TRAINING)
            self._end_others()

    def _watch(self, heard: Callable[[], int]) -> None:
        asked = 0
        while not self._finished.wait(_POLL):
            self._failed = self._find_failed()
            signum = heard()
            if self._failed is not None:
                self._end_after(self._failed)
            elif signum:
                asked += 1
                # While training, RunCheckpoint answers at the end of the step. Asked twice, nothing is waited for: this
                # rank may be waiting for one that hangs.
                if self._is_to_end(asked) and not self._finished.wait(GRACE) and self._is_to_end(asked):
                    self._exit_now(128 + signum)

    @staticmethod
    def _is_to_end(asked: int) -> bool:
        return (is_interruptible() or asked > 1) and not is_protected()

    def _find_failed(self) -> FailedRank | None:
        if self._parent is not None and os.getppid() != self._parent:
            return FailedRank(0, 1)
        codes = ((rank, process.poll()) for rank, process in enumerate(self.procs, start=1))
        return next((FailedRank(rank, code) for rank, code in codes if code), None)

    def _end_after(self, failed: FailedRank) -> None:
        """Let the main thread end; it may be in the middle of something long, or wait in C for what never comes."""
        grace = GRACE_WHILE_TRAINING
        with self._lock:
            if is_interruptible() and not self._finished.is_set():
                grace, self._sigterm_sent = GRACE, True
                signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)
        while not self._finished.wait(grace):
            if is_protected():
                continue
            if not failed.asked_to_end:
                logging.getLogger(__name__).error("error: %s", failed)
            self._exit_now(failed.status)

    def _exit_now(self, status: int) -> None:
        self._kill_others()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)

    def _root_cause(self, error: BaseException) -> BaseException | None:
        """What ended the run, where this rank's error is only that it lost another."""
        if _is_broken_connection(error):
            self._failed = _wait_for(self._find_failed, 3.0 if self.procs else 0.0)
            if self._failed is None:
                return RankFailed(f"ranks could not connect, or lost each other: {error}")
        elif not (self._sigterm_sent and isinstance(error, Interrupted)):
            return None
        if self._failed is None:
            return None
        signum = self._failed.asked_to_end
        return Interrupted(signum) if signum else RankFailed(str(self._failed))

    def _end_others(self) -> None:
        """Wait for the others a moment: they may be about to end by themselves, and have something to say."""
        if _wait_for(self._have_ended, 2.0):
            return
        for process in self.procs:
            process.terminate()
        _wait_for(self._have_ended, 1.0)
        self._kill_others()

    def _have_ended(self) -> bool:
        return all(process.poll() is not None for process in self.procs)

    def _kill_others(self) -> None:
        for process in self.procs:
            process.kill()
        _wait_for(self._have_ended, 5.0)  # one that is stuck in a driver does not hold this one up


def _is_broken_connection(error: BaseException) -> bool:
    # gloo says it with a bare RuntimeError
    return isinstance(error, torch.distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _wait_for(ask: Callable[[], Any], seconds: float) -> Any:
    """The first answer that is true, or the last one."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer
