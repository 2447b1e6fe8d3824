"""A run of two ranks, forked, so that the second needs not import everything again: a `main` for jobs of ForkServer.

    M, this process ── rank 0 ── rank 1

Rank 0 starts rank 1 as it always does, but for `subprocess.Popen`, which here only wakes a process that was forked in
time: before rank 0 had threads. Everything else, and all that the ranks do to each other, is as for a user.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPORT, SENT = "RANKS_REPORT", "RANKS_SENT"
"""Environment variables: the file for the report, and the one that a callback writes when it has sent its signals."""


@dataclass(frozen=True)
class Report:
    """How a run ended.

    Args:
        status: Of rank 0; negative: the signal it died of.
        seconds: From the first signal sent, if any, until no process was left.
        left: Processes of the run that had not ended half a minute after rank 0.
    """

    status: int
    seconds: float
    left: list[str]


def main(words: list[str]) -> int:
    """Run both ranks to the end; the report tells how it was."""
    begun = time.time()
    pid = os.fork()
    if not pid:
        _leave_with(lambda: _rank_0(words))
    status = _ended(pid, 100)
    deadline = time.monotonic() + 30
    while (left := _others()) and time.monotonic() < deadline:
        time.sleep(0.02)
    sent = Path(os.environ[SENT])
    seconds = time.time() - (sent.stat().st_mtime if sent.exists() else begun)
    report = Report(status, seconds, left)
    Path(os.environ[REPORT]).write_text(json.dumps(asdict(report)), encoding="utf-8")
    return 0


def _ended(pid: int, seconds: float) -> int:
    """Status of a process, which is killed when it does not end in time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _leave_with(run: Callable[[], int]) -> None:
    status = 70
    try:
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _rank_0(words: list[str]) -> int:
    from lightning.pytorch.strategies.launchers import subprocess_script

    from lightning_trainer.cli import main as run

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        _leave_with(lambda: _rank_1(reader, words))
    os.close(reader)

    class Woken(subprocess.Popen):  # type: ignore[type-arg]
        def _execute_child(self, *args: Any) -> None:
            self.pid, self._child_created = pid, True
            with os.fdopen(writer, "w") as pipe:
                json.dump(dict(args[6]), pipe)  # its environment

    subprocess_script.subprocess = SimpleNamespace(Popen=Woken)  # type: ignore[assignment]
    return run(words)


def _rank_1(reader: int, words: list[str]) -> int:
    from lightning_trainer.cli import main as run

    with os.fdopen(reader) as pipe:
        environment = pipe.read()
    if not environment:
        return 0
    os.environ.update(json.loads(environment))
    return run(words)


def _others() -> list[str]:
    """Processes of this session besides this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.parent.name, stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        if int(rest[3]) == os.getsid(0) and rest[0] != "Z" and int(pid) != os.getpid():
            found.append(f"{pid} ({rest[0]})")
    return found
