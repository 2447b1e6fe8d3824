"""status.json of whole runs: what it says while they train, how they ended, and that they do not notice it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_trainer.callbacks import StatusFile
from lightning_trainer.callbacks import status as callback_module
from lightning_trainer.cli import main
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.status import TrainingStatusReader, TrainingStatusWriter
from lightning_trainer.types import InputError

STATUS = {"class_path": "StatusFile", "init_args": {"every_n_steps": 2, "recent_examples": 3}}
PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 3, "num_prompts": 2, "max_new_tokens": 6}}

Job = Callable[..., Path]
Add = Callable[[Callback], None]


class _Watch(Callback):
    """What the file says when a step was just made, by that step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.seen[trainer.global_step] = read(self.path)


class _Act(Callback):
    """Does something once one step is made, before the other callbacks."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop.epoch_loop._should_accumulate():
            self.act()


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Put a callback before those of the next runs."""
    original = TrainerCLI._callbacks

    def put(callback: Callback) -> None:
        monkeypatch.setattr(TrainerCLI, "_callbacks", lambda cli, config: [callback, *original(cli, config)])

    return put


@pytest.fixture
def every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second between two updates."""
    monkeypatch.setattr(callback_module, "LEAST_SECONDS", 0.0)


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), *words])


def read(run: Path) -> dict[str, Any]:
    return TrainingStatusReader(run / "status.json").read()


def boom() -> None:
    raise RuntimeError("a fault in the middle of a run")


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("every_update")
def test_the_file_says_what_the_curves_say(job: Job, tmp_path: Path, add: Add, scalars: Any, lines: Any) -> None:
    run = tmp_path / "run"
    watch = _Watch(run)
    add(watch)
    config = job(trainer={"callbacks": [STATUS, PREVIEW]})
    assert fit(config) == 0
    found = {tag: dict(points) for tag, points in scalars(run).items()}
    last = max(found["train/loss"])
    assert set(watch.seen) == set(range(1, last + 1))
    due = {0, 1, *range(2, last, 2), *found["val/loss"]}
    for step, state in watch.seen.items():
        written = max(earlier for earlier in due if earlier < step)
        assert (state["current_step"], state["status"], state["alive"]) == (written, "training", True)
        if written:
            assert state["loss"] == pytest.approx(found["train/loss"][written])
            assert state["learning_rate"] == pytest.approx(found["train/lr"][written])
    end = read(run)
    assert (end["status"], end["is_training"], end["current_step"], end["total_steps"]) == (
        "completed",
        False,
        last,
        last,
    )
    assert end["loss"] == pytest.approx(found["train/loss"][last])
    assert end["tokens_per_sec"] == pytest.approx(found["train/tokens_per_second"][last])
    assert end["validation_loss"] == pytest.approx(found["val/loss"][last])
    assert end["val_train_gap"] == pytest.approx(found["val/loss"][last] - found["train/loss"][last], abs=1e-6)
    assert (end["epoch"], end["max_output_tokens"], end["context_window"]) == (1, 6, 160)
    assert end["model_name"].endswith("model")
    previews = lines(run / "previews.jsonl")
    passed = [p["check"]["ok"] and p["check"]["correct"] is not False for p in previews]
    assert (end["total_evals"], end["total_correct"]) == (len(previews), sum(passed))
    assert end["accuracy_percent"] == pytest.approx(100 * sum(passed) / len(passed))
    assert [e["model_answer"] for e in end["recent_examples"]] == [p["text"] for p in previews[-3:]]
    newest = previews[-1]
    assert (end["current_prompt"], end["golden_answer"]) == (newest["prompt"], newest["golden_answer"])
    assert (end["model_answer"], end["answer_matches"]) == (newest["text"], passed[-1])
    assert not list(run.glob(".status*"))


@pytest.mark.usefixtures("every_update")
def test_status_changes_no_bit_of_training(job: Job, tmp_path: Path, weights: Any) -> None:
    often = {"class_path": "StatusFile", "init_args": {"every_n_steps": 1}}
    constant = {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ConstantLR"}}  # nothing counts the steps ahead
    for name, callbacks in (("without", [PREVIEW]), ("with", [PREVIEW, often])):
        config = job(trainer={"callbacks": callbacks, "default_root_dir": str(tmp_path / name)}, model=constant)
        assert fit(config) == 0
    assert (tmp_path / "with" / "status.json").exists()
    last = "checkpoints/last.ckpt"
    assert same(weights(tmp_path / "without" / last), weights(tmp_path / "with" / last))


def test_a_crash_is_told_and_a_resumed_run_counts_every_preview_once(job: Job, tmp_path: Path, add: Add) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    config = job(trainer={"callbacks": [STATUS, PREVIEW]}, checkpoint={"every_n_train_steps": 4})
    assert fit(config, "--trainer.default_root_dir", str(straight)) == 0
    add(_Act(8, boom))
    assert fit(config, "--trainer.default_root_dir", str(broken)) == 1
    crashed = read(broken)
    assert (crashed["status"], crashed["current_step"], crashed["total_evals"]) == ("crashed", 7, 4)
    assert crashed["error_type"] == "RuntimeError"
    assert crashed["error_message"] == "a fault in the middle of a run"

    watch = _Watch(broken)
    add(watch)
    assert fit(config, "--trainer.default_root_dir", str(broken), "--ckpt_path", "last") == 0
    resumed = watch.seen[5]  # it goes on from step 4, before the second preview
    assert (resumed["current_step"], resumed["total_evals"], resumed["error_type"]) == (4, 2, None)
    assert len(resumed["recent_examples"]) == 2
    of_machine = {"timestamp", "heartbeat", "tokens_per_sec", "seconds_since_heartbeat"}
    ends = [{k: v for k, v in read(run).items() if k not in of_machine} for run in (straight, broken)]
    assert ends[0] == ends[1]


def test_a_run_that_begins_anew_forgets_the_abandoned_one(job: Job, tmp_path: Path, add: Add) -> None:
    config = job(trainer={"callbacks": [STATUS, PREVIEW]})
    add(_Act(5, boom))
    assert fit(config) == 1
    assert read(tmp_path / "run")["total_evals"] == 2
    watch = _Watch(tmp_path / "run")
    add(watch)
    assert fit(config, "--ckpt_path", "auto", "--trainer.max_steps", "1") == 0
    assert watch.seen[1]["loss"] is watch.seen[1]["current_prompt"] is None
    assert (watch.seen[1]["total_evals"], watch.seen[1]["recent_examples"]) == (0, [])


def test_a_checkpoint_without_a_status_goes_on_with_what_the_file_says(job: Job, tmp_path: Path, add: Add) -> None:
    config = job(trainer={"callbacks": [], "max_epochs": 1})
    assert fit(config) == 0
    writer = TrainingStatusWriter(tmp_path / "run" / "status.json")
    writer.update(total_evals=7, total_correct=5)
    writer.finish("paused")
    overlay = job(name="overlay.yaml", trainer={"callbacks": [STATUS]})
    assert fit(overlay, "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert (read(tmp_path / "run")["total_evals"], read(tmp_path / "run")["accuracy_percent"]) == (7, 500 / 7)


def test_a_signal_pauses(job: Job, tmp_path: Path, add: Add) -> None:
    add(_Act(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert fit(job(trainer={"callbacks": [STATUS]})) == 143
    found = read(tmp_path / "run")
    assert (found["status"], found["current_step"], found["error_type"]) == ("paused", 3, None)
    assert found["loss"] is not None
    assert not any(thread.name == "status heartbeat" for thread in threading.enumerate())


def test_a_loss_that_is_not_finite_crashes_with_the_step_before(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_trainer.model.causal_lm import CausalLMModule

    original = CausalLMModule.nats

    def poisoned(module: CausalLMModule, batch: Any, **more: Any) -> Any:
        return original(module, batch, **more) * (float("nan") if module.trainer.global_step == 2 else 1.0)

    monkeypatch.setattr(CausalLMModule, "nats", poisoned)
    assert fit(job(trainer={"callbacks": [STATUS]})) == 1
    found = read(tmp_path / "run")
    assert (found["status"], found["error_type"], found["current_step"]) == ("crashed", "NonFiniteError", 2)
    assert found["loss"] > 0


@pytest.mark.filterwarnings("ignore:the status file could not be kept")
def test_a_status_that_cannot_be_kept_does_not_end_the_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(TrainingStatusWriter, "update", broken)
    monkeypatch.setattr(TrainingStatusWriter, "finish", broken)
    assert fit(job(trainer={"callbacks": [STATUS], "max_epochs": 1})) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_caller_has_writers_of_its_own_told_once_a_second(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = TrainingStatusWriter(tmp_path / "mine.json", model_name="my name")
    taken = TrainingStatusWriter(tmp_path / "run" / "." / "status.json")
    watch, callback = _Watch(tmp_path / "run"), StatusFile()
    callback.writers += [mine, taken]
    original = TrainerCLI._callbacks
    monkeypatch.setattr(TrainerCLI, "_callbacks", lambda cli, config: [watch, *original(cli, config), callback])
    monkeypatch.setattr(callback_module, "LEAST_SECONDS", 3600)
    assert fit(job(trainer={"max_epochs": 1})) == 0
    assert {state["current_step"] for state in watch.seen.values()} == {0, 1}
    assert callback.writers == [mine, taken]
    states = [TrainingStatusReader(tmp_path / name).read() for name in ("mine.json", "run/status.json")]
    assert [state["status"] for state in states] == ["completed"] * 2
    assert states[0]["current_step"] == states[1]["current_step"] == max(watch.seen)
    assert states[0]["model_name"] == "my name"
    assert states[1]["model_name"].endswith("model")


def test_fast_dev_run_writes_nothing(job: Job, tmp_path: Path) -> None:
    assert fit(job(trainer={"callbacks": [STATUS], "fast_dev_run": True})) == 0
    assert not (tmp_path / "run" / "status.json").exists()


@pytest.mark.parametrize("name", ["every_n_steps", "recent_examples"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"StatusFile.{name} must be at least 1, not 0"):
        StatusFile(**{name: 0})
