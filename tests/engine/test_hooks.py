"""What Lightning is spared in every step, and what it must still find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lightning_trainer.cli import main
from lightning_trainer.engine.empty_hooks import STEP_HOOKS, pass_over_empty_hooks

Job = Callable[..., Path]


class Counts(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


def test_hooks_that_are_defined_are_called_and_others_are_not_there() -> None:
    seen: list[str] = []
    counts = Counts()
    one = LambdaCallback(on_before_backward=lambda *_: seen.append("backward"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[counts, one])
    pass_over_empty_hooks(trainer)
    assert [name for name in STEP_HOOKS if callable(getattr(counts, name))] == ["on_train_batch_end"]
    assert callable(one.on_before_backward)
    one.on_before_backward(None, None, None)  # type: ignore[arg-type]
    assert seen == ["backward"]


def test_a_run_calls_what_its_callbacks_define(job: Job, tmp_path: Path) -> None:
    from lightning_trainer.engine.trainer_cli import TrainerCLI

    counts = Counts()
    original = TrainerCLI._callbacks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainerCLI, "_callbacks", lambda cli, config: [counts, *original(cli, config)])
        assert main(["fit", "--config", str(job(trainer={"max_steps": 3, "max_epochs": -1}))]) == 0
    assert counts.steps == 3 * 2


@pytest.mark.parametrize("on_epoch_end", [False, True])
def test_train_loss_can_be_monitored(on_epoch_end: bool, job: Job, tmp_path: Path, lines: Any) -> None:
    stop = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "train/loss", "divergence_threshold": 0.0, "check_on_train_epoch_end": on_epoch_end},
    }
    config = job(trainer={"callbacks": [stop, "StatusFile"]}, validation={} if on_epoch_end else {"every_n_steps": 2})
    assert main(["fit", "--config", str(config)]) == 0
    steps = max(int(path.name[5:11]) for path in (tmp_path / "run/checkpoints").glob("step=*.ckpt"))
    assert steps == (5 if on_epoch_end else 2)


def test_the_bar_shows_the_loss_and_reaches_the_end(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lightning_trainer.callbacks import RunProgress

    shown: list[Any] = []
    update, metrics = RunProgress._update, RunProgress.get_metrics

    def seen_update(bar: Any, task: Any, current: int, **more: Any) -> None:
        shown.append(current)
        update(bar, task, current, **more)

    def seen_metrics(bar: Any, *given: Any) -> Any:
        shown.append(metrics(bar, *given))
        return shown[-1]

    monkeypatch.setattr(RunProgress, "_update", seen_update)
    monkeypatch.setattr(RunProgress, "get_metrics", seen_metrics)
    config = job(trainer={"max_steps": 5, "max_epochs": -1, "enable_progress_bar": True})
    assert main(["fit", "--config", str(config)]) == 0
    assert 9 in shown  # the micro-batches of five steps, the last of which is short
    assert "9/9" in capsys.readouterr().out
    assert {"train/loss", "tokens/s"} <= [seen for seen in shown if isinstance(seen, dict)][-1].keys()
