"""RankLauncher: starts this machine's other ranks, and sees to it that all end when one does.

Lightning's own looks every five seconds and answers a rank that ended badly by killing all: rank 0 in the middle of
ending well, too, so that a run that was asked to stop reports 137. And a rank that waits for the others to come, or for
rank 0 to read the data, waits for half an hour after they are gone.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_trainer.signals import ANSWERED, Interrupted, heard_elsewhere, in_main_thread, is_interruptible

PARENT = "LIGHTNING_TRAINER_RANK_0"
"""Environment variable by which a rank knows the process that started it."""

GRACE, GRACE_WHILE_TRAINING = 3.0, 20.0
"""Seconds a rank has to end by itself once another has ended, or it was asked to; it may be writing a checkpoint."""

_POLL = 0.2


class RankFailed(RuntimeError):
    """Another rank ended, so that this one cannot go on."""


def look_after_ranks(trainer: Trainer) -> None:
    """Let a Trainer start and watch its ranks our way, and leave SIGTERM to us.

    Lightning answers SIGTERM with a collective inside the handler, which deadlocks unless rank 0 alone is asked, and
    has every rank ask rank 0 before each micro-batch, which waits for the device. RunCheckpoint asks once a step.
    """
    stock = trainer.strategy.launcher
    if isinstance(stock, _SubprocessScriptLauncher):
        trainer.strategy._launcher = RankLauncher(stock.cluster_environment, stock.num_processes, stock.num_nodes)
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    register = connector.register_signal_handlers

    def register_others() -> None:
        before = signal.getsignal(signal.SIGTERM)
        register()
        if in_main_thread():
            signal.signal(signal.SIGTERM, before)

    connector.register_signal_handlers = register_others  # type: ignore[method-assign]
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class RankLauncher(_SubprocessScriptLauncher):
    """Runs a function in all ranks; while it runs, none outlives another by more than the grace."""

    _parent: int | None = None  # the process that started this one, where that is ours
    _lost: tuple[int, int] | None = None  # rank and status, as a shell counts them, of one that ended badly
    _told = False  # whether the main thread was sent a signal because of it

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, where nobody else does, and call the function in this one.

        Raises:
            RankFailed: Another rank ended with an error.
            Interrupted: Another rank was asked to end before it could ask the others.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._start_others()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        over = threading.Event()
        with heard_elsewhere() as heard:
            watch = threading.Thread(target=self._watch, args=(over, heard), name="ranks", daemon=True)
            watch.start()
            try:
                result = function(*args, **kwargs)
                over.set()
                # To one that has more to do, the end of this process would look like a failure.
                _wait_for(self._have_ended, GRACE_WHILE_TRAINING)
                return result
            except BaseException as error:
                over.set()
                cause = self._cause(error)
                self._end_others()
                if cause is None:
                    raise
                raise cause from error
            finally:
                over.set()
                watch.join()  # it listens to what is closed next

    def _start_others(self) -> None:
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
        elif PARENT in os.environ:
            self._parent = int(os.environ[PARENT])

    def _watch(self, over: threading.Event, heard: Callable[[], int]) -> None:
        while not over.wait(_POLL):
            self._lost = self._find_lost()
            signum = heard()
            if self._lost is not None:
                self._end(over, self._lost[1])
            elif signum and is_interruptible() and not over.wait(GRACE) and is_interruptible():
                self._leave(128 + signum)

    def _find_lost(self) -> tuple[int, int] | None:
        if self._parent is not None and os.getppid() != self._parent:
            return 0, 1
        for rank, process in enumerate(self.procs, start=1):
            code = process.poll()
            if code:
                return rank, 128 - code if code < 0 else code
        return None

    def _end(self, over: threading.Event, status: int) -> None:
        """Let the main thread end; it may be in the middle of something long, or wait in C for what never comes."""
        training = not is_interruptible()
        if not training:
            self._told = True
            signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)
        if not over.wait(GRACE_WHILE_TRAINING if training else GRACE):
            if status - 128 not in ANSWERED:
                logging.getLogger(__name__).error("error: %s", self._in_words())
            self._leave(status)

    def _leave(self, status: int) -> None:
        self._kill_others()
        os._exit(status)

    def _cause(self, error: BaseException) -> BaseException | None:
        """What ended the run, where this rank's error is only that it lost another."""
        if _is_broken_connection(error):
            self._lost = _wait_for(self._find_lost, 3.0 if self.procs else 0.0)
            if self._lost is None and not self.procs:
                return RankFailed("the connection to another rank broke")
        elif not (self._told and isinstance(error, Interrupted)):
            return None
        if self._lost is None:
            return None
        signum = self._lost[1] - 128
        return Interrupted(signum) if signum in ANSWERED else RankFailed(self._in_words())

    def _in_words(self) -> str:
        assert self._lost is not None
        rank, status = self._lost
        if not rank:
            return "rank 0 has ended"
        if status == 128 + signal.SIGKILL:
            return f"rank {rank} was killed (SIGKILL): was there enough memory?"
        if status > 128:
            return f"rank {rank} was ended by {signal.Signals(status - 128).name}"
        return f"rank {rank} ended with an error; what it said stands above"

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
        for process in self.procs:
            process.wait()


def _is_broken_connection(error: BaseException) -> bool:
    # gloo says it with a bare RuntimeError
    return isinstance(error, torch.distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _wait_for(ask: Callable[[], Any], seconds: float) -> Any:
    """The first answer that is true, or the last one."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer
