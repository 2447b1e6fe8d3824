"""Companion: the dispatcher as the training process sees it. Starting, talking and ending take bounded time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_trainer.preview.dialogue import Lines, Setup

# Not `-m`: that would run the package's own __init__, which loads torch.
_START = """\
import sys, types
root = sys.argv[1]
sys.path.append(root)
package = types.ModuleType("lightning_trainer.preview")
package.__path__ = [root + "/lightning_trainer/preview"]
sys.modules[package.__name__] = package
from lightning_trainer.preview.dispatcher import main
main()
"""

RESTARTS = 3
"""Of a dispatcher that has ended by itself."""

NOTICES = 32
"""That are kept for whoever asks."""

ROOT = Path(__file__).parents[2]

QUIT_SECONDS = 0.6
"""For the dispatcher to tell the worker that it ends."""

KILL_SECONDS = 1.0
"""For the kernel to end it, then."""


class Companion:
    """A dispatcher that is kept running, and what it says of the worker.

    Args:
        setup: What it is told first.

    Attributes:
        state: Of the worker: empty (not known yet), connected, lost (one call failed), paused or off.
        why: It is not connected.
        notices: A line for each change of state.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self._restarts = setup, 0
        self.state = self.why = ""
        self.notices: deque[str] = deque(maxlen=NOTICES)
        self._process: _Process | None = _Process(setup)

    @property
    def is_usable(self) -> bool:
        """Whether a job may be handed over."""
        return self.state not in ("paused", "off")

    @property
    def pid(self) -> int:
        """Of the process; 0 where there is none."""
        return 0 if self._process is None else self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a job over; never waits."""
        if self._process is not None:
            self._process.lines.send(message)

    def receive(self, timeout: float = 0.0) -> list[dict[str, Any]]:
        """What there is to say of jobs; waits up to `timeout` seconds for something, a change of state included.

        Returns:
            Messages of type `free` or `result`, and `ended` where the process has and knows of no job any more.
        """
        if self._process is None:
            return []
        try:
            messages = self._process.lines.receive(timeout)
        except EOFError:
            return [self._ended(self._process)]
        for message in messages:
            if message["type"] == "state":
                self._change(message["state"], message["why"])
        return [message for message in messages if message["type"] != "state"]

    def _ended(self, process: _Process) -> dict[str, Any]:
        how, self._process = process.stop(), None
        why = f"the preview dispatcher ended ({how})"
        if self._restarts == RESTARTS:
            self._change("off", f"{why} {RESTARTS + 1} times")
            return {"type": "ended", "why": why}
        self._restarts += 1
        self.state = self.why = ""
        try:
            self._process = _Process(self._setup)
        except OSError as error:  # no memory, no process number
            self._change("off", f"{why} and cannot be started again: {error.strerror}")
        else:
            self.notices.append(f"{why} and is started again; training continues")
        return {"type": "ended", "why": why}

    def _change(self, state: str, why: str) -> None:
        self.state, self.why = state, why
        lines = {
            "connected": "connected",
            "lost": f"{why}; training continues",
            "paused": f"{why}; previews are paused until it answers, training continues",
            "off": f"{why}; NO PREVIEWS until the run is started again, training continues",
        }
        self.notices.append(f"preview worker {self._setup.address}: {lines[state]}")

    def take_notices(self) -> list[str]:
        """Those since the last call."""
        told = list(self.notices)
        self.notices.clear()
        return told

    def stop(self) -> None:
        """End it for good."""
        if self._process is not None:
            self._process.stop()
        self._process = None
        self.state, self.why = "off", "the run has ended"


class _Process:
    """One dispatcher."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        # Of its own process group, so that the terminal's Ctrl-C and `kill -TERM -GROUP` reach the trainer alone.
        # gRPC's own log is for its developers; what matters comes as errors of calls.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(ROOT), str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                pass_fds=setup.slots,
                process_group=0,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
        self.pid = self._process.pid
        self.lines = Lines(ours)
        self.lines.send(setup.to_json())

    def stop(self) -> str:
        """End it, if it has not; returns how it ended."""
        self.lines.send({"type": "quit"})
        try:
            self._process.wait(QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # It can outlive this only within the kernel, on a device that hangs.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_SECONDS)
        self.lines.close()
        status = self._process.returncode
        return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
