"""RankLauncher: what the end of another rank makes of this one, without the ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from lightning_trainer.engine.launcher import FailedRank, RankFailed, RankLauncher
from lightning_trainer.signals import Interrupted, interruptible
from lightning_trainer.types import InputError

Start = Callable[..., RankLauncher]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Start:
    """One whose other rank runs the Python code given."""
    monkeypatch.setattr(RankLauncher, "_launched", False)
    monkeypatch.setattr("lightning_trainer.engine.launcher._set_num_threads_if_needed", lambda num_processes: None)

    def make(code: str) -> RankLauncher:
        found = RankLauncher(LightningEnvironment(), 2, 1)

        def start() -> None:
            found.procs = [subprocess.Popen([sys.executable, "-c", code])]

        monkeypatch.setattr(found, "_call_children_scripts", start)
        return found

    return make


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (-9, 137, "rank 1 was killed (SIGKILL): was there enough memory?"),
        (-11, 139, "rank 1 was ended by SIGSEGV"),
        (3, 3, "rank 1 ended with an error"),
        (255, 255, "rank 1 ended with an error"),
    ],
)
def test_what_a_rank_ended_of(code: int, status: int, text: str) -> None:
    failed = FailedRank(1, code)
    assert failed.status == status
    assert str(failed).startswith(text)
    assert not failed.asked_to_end


@pytest.mark.parametrize("code", [143, -15])
def test_a_rank_that_was_asked_to_end(code: int) -> None:
    assert FailedRank(1, code).asked_to_end == signal.SIGTERM


def test_a_rank_that_fails_after_this_one_is_through(launcher: Start) -> None:
    with pytest.raises(RankFailed, match="rank 1 ended with an error"):
        launcher("import time; time.sleep(0.3); raise SystemExit(3)").launch(lambda: "done")


def test_a_rank_that_ends_later_is_waited_for(launcher: Start) -> None:
    started = launcher("import time; time.sleep(0.3)")
    assert started.launch(lambda: "done") == "done"
    assert [process.returncode for process in started.procs] == [0]


def test_a_rank_that_fails_ends_what_can_be_interrupted(launcher: Start) -> None:
    with interruptible(), pytest.raises(RankFailed, match="rank 1 ended with an error"):
        launcher("raise SystemExit(255)").launch(lambda: time.sleep(60))


def test_a_rank_that_was_stopped_stops_this_one(launcher: Start) -> None:
    with interruptible(), pytest.raises(Interrupted):
        launcher("raise SystemExit(143)").launch(lambda: time.sleep(60))


def test_an_error_of_this_rank_ends_the_others_and_is_raised(launcher: Start) -> None:
    def fail() -> Any:
        raise KeyError("mine")

    started = launcher("import time; time.sleep(60)")
    with pytest.raises(KeyError, match="mine"):
        started.launch(fail)
    assert started.procs[0].poll() is not None


def test_a_broken_connection_says_what_broke(launcher: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail() -> Any:
        raise torch.distributed.DistError("port 29500: address in use")

    started = launcher("")
    monkeypatch.setattr(started, "_call_children_scripts", lambda: None)
    with pytest.raises(RankFailed, match="ranks could not connect, or lost each other: port 29500: address in use"):
        started.launch(fail)


def test_a_process_makes_one_run_of_several_ranks(launcher: Start) -> None:
    assert launcher("").launch(lambda: 1) == 1
    with pytest.raises(InputError, match="start another for the next"):
        launcher("").launch(lambda: 2)
