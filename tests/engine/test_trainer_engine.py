"""TrainerEngine: the same run as `fit`, told as a result."""

from __future__ import annotations

import json
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_trainer import (
    CausalLMModule,
    ChatDataModule,
    TrainerConfig,
    TrainerEngine,
    TrainingResult,
    TrainingStatusReader,
    TrainingStatusWriter,
    create_default_config,
)
from lightning_trainer.cli import main

Make = Callable[..., TrainerConfig]


@pytest.fixture
def small(tiny_model_dir: Path, tmp_path: Path, chat_rows: Any, write_rows: Any) -> Make:
    """A job of three steps over ten rows."""

    def make(output: str = "run", rows: int = 10, **hyperparams: Any) -> TrainerConfig:
        config = create_default_config(
            model_path=str(tiny_model_dir),
            dataset_path=str(write_rows(chat_rows(rows), "job.jsonl")),
            output_dir=str(tmp_path / output),
            base_model="tiny",
            model_architecture="Qwen3ForCausalLM",
            max_context_length=2048,
            vocab_size=384,
        )
        values = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 3, "warmup_steps": 1, **hyperparams}
        for name, value in values.items():
            setattr(config.hyperparams, name, value)
        config.monitoring.preview_max_tokens = 4
        config.environment.dataloader_num_workers = 0
        config.environment.logging_steps = 1
        return config

    return make


def test_the_usage_example(tiny_model_dir: Path, tmp_path: Path, chat_rows: Any, write_rows: Any) -> None:
    config = create_default_config(
        model_path=str(tiny_model_dir),
        dataset_path=str(write_rows(chat_rows(24))),
        output_dir=str(tmp_path / "a"),
        base_model="tiny",
        model_architecture="Qwen3ForCausalLM",
        max_context_length=2048,
        vocab_size=384,
    )
    config.profile.name = "regime3"
    config.hyperparams.fp_precision = "bf16"
    config.hyperparams.batch_size = 16
    config.monitoring.preview_max_tokens = 8
    result = TrainerEngine(TrainingStatusWriter(tmp_path / "status.json")).run_job(config)
    assert result.success, result.error_message
    assert result.global_step == 1
    assert result.runtime_sec > 0
    assert result.last_checkpoint_path == str(tmp_path / "a" / "checkpoints" / "step=000001.ckpt")
    assert result.final_loss is not None
    assert 5 < result.final_loss < 7  # ln(384) = 5.95, random weights
    assert (result.summary["profile"], result.summary["precision"]) == ("regime3", "bf16")
    assert result.summary["metrics"]["train/loss"] == result.final_loss
    assert (result.error_type, result.error_message) == (None, None)

    saved = tmp_path / "job.json"
    saved.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    again = TrainerConfig.from_dict(json.loads(saved.read_text(encoding="utf-8")))
    again.output.output_dir = str(tmp_path / "b")
    assert TrainerEngine(None).run_job(again).final_loss == result.final_loss


def test_the_same_weights_as_fit_on_the_converted_job(small: Make, tmp_path: Path, weights: Any) -> None:
    config = small("python", rows=40, max_steps=4, gradient_accumulation=2, eval_strategy="steps", eval_steps=2)
    saved = tmp_path / "job.json"
    saved.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert main(["convert", str(saved), "-o", str(tmp_path / "run.yaml")]) == 0
    directory = ["--trainer.default_root_dir", str(tmp_path / "yaml")]
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), *directory]) == 0
    result = TrainerEngine().run_job(config)
    assert result.success, result.error_message
    assert result.summary["metrics"]["val/loss"] > 0
    mine, theirs = (weights(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("python", "yaml"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.filterwarnings("ignore:16-true skips steps")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("profile", ["emoji_think", "regime3", "plain"])
def test_ten_rows_three_steps(
    small: Make, profile: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = small(fp_precision=precision)
    config.profile.name = profile
    result = TrainerEngine().run_job(config)
    assert result.success, result.error_message
    assert result.global_step == 3
    assert not list(Path().iterdir())


@pytest.mark.filterwarnings("ignore:previews show training rows")
def test_no_validation_split(small: Make) -> None:
    config = small(eval_strategy="epoch")
    config.monitoring.validation_split = 0.0
    assert TrainerEngine().run_job(config).success


def test_the_writer_is_told_from_start_to_end(small: Make, tmp_path: Path) -> None:
    seen: list[tuple[str, int | None]] = []

    class Spy(TrainingStatusWriter):
        def update(self, **fields: Any) -> None:
            super().update(**fields)
            seen.append((fields.get("status", ""), fields.get("current_step", -1)))

    result = TrainerEngine(Spy(tmp_path / "mine.json")).run_job(small())
    assert seen[0] == ("training", None)
    assert {step for _, step in seen} >= {0, 1, 3}
    mine, own = (TrainingStatusReader(path).read() for path in (tmp_path / "mine.json", tmp_path / "run/status.json"))
    assert mine["status"] == own["status"] == "completed"
    assert mine["loss"] == own["loss"] == pytest.approx(result.final_loss)
    assert (mine["current_step"], mine["total_steps"]) == (3, 3)
    assert mine["total_evals"] == own["total_evals"] > 0


def test_a_job_that_is_wrong_from_the_start(small: Make, tmp_path: Path) -> None:
    config = small()
    config.data.dataset_path = str(tmp_path / "nowhere.jsonl")
    writer = TrainingStatusWriter(tmp_path / "status.json")
    result = TrainerEngine(writer).run_job(config)
    assert not result.success
    assert (result.global_step, result.final_loss, result.last_checkpoint_path) == (0, None, None)
    assert result.error_type == "ConfigError"
    assert "there is no data file" in str(result.error_message)
    state = TrainingStatusReader(tmp_path / "status.json").read()
    assert (state["status"], state["error_type"]) == ("crashed", "ConfigError")
    assert not TrainerEngine().run_job({"hyperparams": {"batch_size": 0}}).success


def test_a_job_that_fails_keeps_the_step_it_reached(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at_step(monkeypatch, 2, lambda: (_ for _ in ()).throw(RuntimeError("out of luck")))
    config = small(save_steps=1)
    result = TrainerEngine().run_job(config)
    assert (result.success, result.error_type, result.error_message) == (False, "RuntimeError", "out of luck")
    assert result.global_step == 2
    assert result.final_loss is not None
    assert result.last_checkpoint_path == str(tmp_path / "run" / "checkpoints" / "step=000002.ckpt")
    state = TrainingStatusReader(tmp_path / "run" / "status.json").read()
    assert (state["status"], state["error_message"]) == ("crashed", "out of luck")

    monkeypatch.undo()
    config.output.resume_from_checkpoint = "last"
    assert TrainerEngine().run_job(config).global_step == 3


def test_a_keyboard_interrupt_passes_and_leaves_a_checkpoint(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    writer = TrainingStatusWriter(tmp_path / "status.json")
    with pytest.raises(KeyboardInterrupt):
        TrainerEngine(writer).run_job(small())
    assert (tmp_path / "run" / "checkpoints" / "step=000002.ckpt").is_dir()
    assert TrainingStatusReader(tmp_path / "status.json").read()["status"] == "paused"


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
)
def test_a_signal_before_the_first_step(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, raised: type[BaseException]
) -> None:
    handlers = {known: signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(ChatDataModule, "prepare_data", lambda self: os.kill(os.getpid(), signum))
    with pytest.raises(raised):
        TrainerEngine(TrainingStatusWriter(tmp_path / "status.json")).run_job(small())
    assert {known: signal.getsignal(known) for known in handlers} == handlers
    assert TrainingStatusReader(tmp_path / "status.json").read()["status"] == "paused"


def test_eval_steps_are_optimizer_steps_over_all_epochs(small: Make, tmp_path: Path, scalars: Any) -> None:
    """An epoch's last window is short, so that micro-batches would count otherwise."""
    config = small(rows=20, max_steps=9, gradient_accumulation=3, batch_size=1, max_length=1024)
    config.data.enable_packing = False
    config.hyperparams.eval_strategy, config.hyperparams.eval_steps = "steps", 4
    assert TrainerEngine().run_job(config).global_step == 9
    assert [step for step, _ in scalars(tmp_path / "run")["val/loss"]] == [4, 8]


def test_a_second_job_inherits_no_figures_of_the_first(small: Make, tmp_path: Path) -> None:
    engine = TrainerEngine(TrainingStatusWriter(tmp_path / "status.json"))
    assert engine.run_job(small()).success
    wrong = small("other")
    wrong.model.model_path = str(tmp_path / "nowhere")
    assert not engine.run_job(wrong).success
    state = TrainingStatusReader(tmp_path / "status.json").read()
    assert state["status"] == "crashed"
    assert {state[name] for name in ("current_step", "total_steps", "loss", "total_evals")} == {None}


def test_a_job_that_is_already_through_says_so_and_keeps_its_figures(
    small: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = TrainerEngine().run_job(small())
    again = small()
    again.output.resume_from_checkpoint = "last"
    second = TrainerEngine(TrainingStatusWriter(tmp_path / "mine.json")).run_job(again)
    assert "nothing is left to train: the run stands at optimizer step 3" in capsys.readouterr().out
    assert (second.success, second.global_step, second.final_loss) == (True, 3, first.final_loss)
    for path in (tmp_path / "mine.json", tmp_path / "run" / "status.json"):
        status = json.loads(path.read_text())
        assert (status["status"], status["current_step"], status["loss"]) == ("completed", 3, first.final_loss)


def test_a_refused_job_leaves_the_status_of_the_run_that_is_there(small: Make, tmp_path: Path) -> None:
    status = tmp_path / "run" / "status.json"
    assert TrainerEngine(TrainingStatusWriter(status)).run_job(small()).success
    before = TrainingStatusReader(status).read()
    assert not TrainerEngine(TrainingStatusWriter(status)).run_job(small()).success
    after = TrainingStatusReader(status).read()
    assert (after["status"], after["loss"], after["current_step"]) == ("completed", before["loss"], 3)


def test_it_runs_beside_the_main_thread(small: Make) -> None:
    results: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(TrainerEngine().run_job(small())))
    thread.start()
    thread.join(timeout=60)
    assert results[0].success, results[0].error_message


def test_two_jobs_in_one_process_and_nothing_is_held(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    stock = CausalLMModule.on_fit_start

    def note(module: CausalLMModule) -> None:
        stock(module)
        held.extend([weakref.ref(module.causal_lm), weakref.ref(module.trainer)])

    monkeypatch.setattr(CausalLMModule, "on_fit_start", note)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    engine = TrainerEngine()
    losses = [engine.run_job(small(f"run-{number}")).final_loss for number in range(2)]
    assert losses[0] == losses[1]
    assert len(held) == 4
    assert [ref() for ref in held] == [None] * 4
    assert {signum: signal.getsignal(signum) for signum in handlers} == handlers


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something once, when `step` optimizer steps are complete."""
    stock = CausalLMModule.training_step

    def step_with_act(module: CausalLMModule, batch: Any, batch_idx: int) -> Any:
        if module.trainer.global_step == step:
            act()
        return stock(module, batch, batch_idx)

    monkeypatch.setattr(CausalLMModule, "training_step", step_with_act)
