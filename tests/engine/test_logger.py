"""RunLogger: the order in which TensorBoard reads the attempts of a run."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer.engine import logger
from lightning_trainer.engine.logger import RunLogger


def _attempt(directory: Path, resumed_from: int, steps: range) -> None:
    run = RunLogger(str(directory))
    run.resume_from(resumed_from)
    for step in steps:
        run.log_metrics({"loss": float(step)}, step)
    run.finalize("success")


def test_attempts_of_one_second_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names end in counters that sort as text: 9 behind 10."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    counter = count(9)

    class Counter:
        @staticmethod
        def get() -> int:
            return next(counter)

    monkeypatch.setattr(event_file_writer, "_global_uid", Counter)
    _attempt(tmp_path, 0, range(1, 3))
    _attempt(tmp_path, 2, range(3, 6))
    _attempt(tmp_path, 5, range(6, 8))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_clock_set_back_is_told_of_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logger, "rank_zero_warn", told.append)
    monkeypatch.setattr(logger.time, "sleep", lambda seconds: pytest.fail("waits"))
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 600}.host.1.0").touch()
    (tmp_path / "events.out.tfevents.of-a-user").touch()
    run = RunLogger(str(tmp_path))
    run.resume_from(3)
    assert told == []  # where nothing is written, nothing is hidden
    assert run.experiment is not None
    assert ["ahead of this machine's clock" in line for line in told] == [True]


def test_a_first_attempt_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("waits")

    monkeypatch.setattr(logger.time, "sleep", fail)
    _attempt(tmp_path, 0, range(1))
