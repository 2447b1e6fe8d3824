"""The main job, whole: fit, what it leaves behind, and going on with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_trainer.cli import main
from lightning_trainer.engine.run_directory import RunDirectory

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 3, "num_prompts": 2, "max_new_tokens": 6}}

Job = Callable[..., Path]
Scalars = Callable[[Path], dict[str, list[tuple[int, float]]]]


class _Disturb(Callback):
    """Does something at the end of one optimizer step, before the other callbacks."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop.epoch_loop._should_accumulate():
            self.act()


class _DisturbValidation(Callback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_validation_batch_start(self, *_: Any) -> None:
        self.act()


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), *words])


def boom() -> None:
    raise RuntimeError("a fault in the middle of a run")


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def deterministic(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    clocks = {"train/tokens_per_second", "preview/latency_seconds", "preview/stall_ms"}
    return {tag: points for tag, points in found.items() if tag not in clocks}


def test_a_run_leaves_everything_behind(job: Job, tmp_path: Path, scalars: Scalars, lines: Any, capsys: Any) -> None:
    assert fit(job(trainer={"callbacks": [PREVIEW, "HuggingFaceExport"]})) == 0
    run = tmp_path / "run"
    found = scalars(run)
    steps = [step for step, _ in found["train/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    for tag in ("train/grad_norm", "train/lr", "train/tokens_per_second", "train/trained_token_fraction"):
        assert [step for step, _ in found[tag]] == steps
    assert found["train/loss"][-1][1] < found["train/loss"][0][1]
    assert [step for step, _ in found["val/loss"]] == [steps[-1] // 2, steps[-1]]
    assert {"val/perplexity", "val/token_accuracy", "preview/pass_rate", "preview/weights_step"} <= found.keys()
    previews = lines(run / "previews.jsonl")
    assert {p["step"] for p in previews} == {*range(3, steps[-1] + 1, 3), steps[-1]}
    assert all(p["weights_step"] == p["step"] and len(p["content_sha256"]) == 64 for p in previews)
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["fingerprints"]) == {"data", "tokenizer", "template", "profile"}
    assert (run / "checkpoints" / "last.ckpt").is_symlink()
    assert not (run / "checkpoints" / "last.ckpt").readlink().is_absolute()
    assert "tensorboard --logdir" in capsys.readouterr().out.splitlines()[-1]


def test_export_and_checkpoint_load_in_transformers(job: Job, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert fit(job(trainer={"callbacks": ["HuggingFaceExport"], "max_epochs": 1})) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "last.ckpt")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert same(dict(exported.state_dict()), dict(kept.state_dict()))
    assert exported.config.use_cache
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is 1 plus 2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = exported.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_the_saved_config_runs_again_as_it_is(job: Job, tmp_path: Path, weights: Any) -> None:
    assert fit(job(trainer={"max_epochs": 1})) == 0
    again = tmp_path / "again"
    assert fit(tmp_path / "run" / "config.yaml", "--trainer.default_root_dir", str(again)) == 0
    assert same(weights(tmp_path / "run" / "checkpoints/last.ckpt"), weights(again / "checkpoints/last.ckpt"))


def test_previews_do_not_change_training_by_one_bit(job: Job, tmp_path: Path, weights: Any) -> None:
    sampled = {**PREVIEW, "init_args": {**PREVIEW["init_args"], "every_n_steps": 1, "temperature": 1.0}}
    without, with_previews = tmp_path / "without", tmp_path / "with"
    for directory, callbacks in ((without, []), (with_previews, [sampled])):
        config = job(trainer={"callbacks": callbacks, "default_root_dir": str(directory)})
        assert fit(config, "--data.num_workers", "0") == 0
    assert (with_previews / "previews.jsonl").exists()
    assert same(weights(without / "checkpoints/last.ckpt"), weights(with_previews / "checkpoints/last.ckpt"))


def test_a_full_gpu_is_told_of_in_words(job: Job, watched: Any, capsys: Any) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    watched(_Disturb(3, full))
    assert fit(job()) == 1
    told = capsys.readouterr().err
    assert "error: the GPU has no memory left: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in told
    assert "model.gradient_checkpointing" in told
    assert "Traceback" not in told


def test_a_full_gpu_without_a_word_of_its_own(job: Job, watched: Any, capsys: Any) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError

    watched(_Disturb(1, full))
    assert fit(job()) == 1
    assert "error: the GPU has no memory left: OutOfMemoryError\n" in capsys.readouterr().err


def test_resume_after_faults_and_signals_is_bit_identical(
    job: Job, tmp_path: Path, watched: Any, monkeypatch: pytest.MonkeyPatch, scalars: Scalars, weights: Any
) -> None:
    """Stopped by a fault, by SIGTERM between steps, by SIGTERM in a validation; each time resumed."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    config = job(
        trainer={"callbacks": [PREVIEW], "val_check_interval": 0.5},
        checkpoint={"every_n_train_steps": 2},
        model={"lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 2}}},
    )
    assert fit(config, "--trainer.default_root_dir", str(straight)) == 0
    words = ["--trainer.default_root_dir", str(broken)]
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    watched(_Disturb(3, boom))
    assert fit(config, *words) == 1
    watched(_Disturb(5, terminate))
    assert fit(config, *words, "--ckpt_path", "last") == 143
    assert (broken / "checkpoints" / "step=000005.ckpt").is_dir()
    watched(_DisturbValidation(terminate))
    assert fit(config, *words, "--ckpt_path", "last") == 143
    watched(Callback())
    assert fit(config, *words, "--ckpt_path", "last") == 0
    assert same(weights(straight / "checkpoints/last.ckpt"), weights(broken / "checkpoints/last.ckpt"))
    assert deterministic(scalars(broken)) == deterministic(scalars(straight))


def test_sigint_saves_and_exits_130(job: Job, tmp_path: Path, watched: Any) -> None:
    watched(_Disturb(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert fit(job()) == 130
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step=000002.ckpt"


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_nonfinite_step_is_not_applied_and_ends_the_run(
    precision: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from lightning_trainer.model.causal_lm import CausalLMModule

    original = CausalLMModule.nats

    def poisoned(module: CausalLMModule, batch: Any, **more: Any) -> Any:
        return original(module, batch, **more) * (float("nan") if module.trainer.global_step == 4 else 1.0)

    monkeypatch.setattr(CausalLMModule, "nats", poisoned)
    config = job(trainer={"precision": precision, "log_every_n_steps": 3}, checkpoint={"every_n_train_steps": 2})
    assert fit(config) == 1
    assert "optimizer step 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step=000004.ckpt"


STOCK = [
    {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 5}},
    {"class_path": "LearningRateMonitor"},
    {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "save_top_k": 2}},
]


@pytest.mark.parametrize("callback", STOCK, ids=[c["class_path"] for c in STOCK])
def test_a_second_config_swaps_callbacks(
    callback: dict[str, Any], job: Job, tmp_path: Path, scalars: Scalars, recwarn: Any
) -> None:
    """PreviewCallback out, one of Lightning's own in: it trains, checkpoints and resumes."""
    config = job(trainer={"callbacks": [PREVIEW], "max_epochs": 1})
    if callback["class_path"] == "ModelCheckpoint":
        callback = {**callback, "init_args": {**callback["init_args"], "dirpath": str(tmp_path / "stock")}}
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert fit(config, "--config", str(overlay)) == 0
    run = tmp_path / "run"
    assert not (run / "previews.jsonl").exists()
    first = len(scalars(run)["train/loss"])
    assert fit(config, "--config", str(overlay), "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    steps = [step for step, _ in scalars(run)["train/loss"]]
    assert steps == list(range(1, 2 * first + 1))
    if callback["class_path"] == "ModelCheckpoint":
        from transformers import AutoModelForCausalLM

        assert [AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "stock").iterdir()]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the callback is left out on purpose
def test_resuming_from_a_stock_checkpoint(job: Job, tmp_path: Path, weights: Any) -> None:
    stock = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "stock"), "save_top_k": -1}}
    config = job(trainer={"callbacks": [stock]})
    assert fit(config) == 0
    [first, *_] = sorted((tmp_path / "stock").iterdir(), key=lambda p: p.name)
    again = tmp_path / "again"
    words = ["--ckpt_path", str(first), "--trainer.default_root_dir", str(again), "--trainer.callbacks", "null"]
    assert fit(config, *words) == 0
    assert same(weights(tmp_path / "run/checkpoints/last.ckpt"), weights(again / "checkpoints/last.ckpt"))


def test_a_rate_changed_in_the_yaml_wins_over_the_checkpoint(job: Job, tmp_path: Path, scalars: Scalars) -> None:
    constant = {"class_path": "WarmupConstant", "init_args": {"warmup_steps": 0}}
    config = job(model={"lr_scheduler": constant}, trainer={"max_epochs": 1})
    assert fit(config) == 0
    words = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--model.optimizer.init_args.lr", "0.5e-3"]
    assert fit(config, *words) == 0
    rates = [value for _, value in scalars(tmp_path / "run")["train/lr"]]
    half = len(rates) // 2
    assert rates == pytest.approx([3e-3] * half + [0.5e-3] * half)


def test_a_run_directory_is_not_overwritten(job: Job, tmp_path: Path, capsys: Any) -> None:
    config = job(trainer={"max_epochs": 1})
    assert fit(config) == 0
    assert fit(config) == 2
    message = capsys.readouterr().err
    assert "--ckpt_path last" in message
    assert "--overwrite true" in message
    assert fit(config, "--overwrite", "true") == 0
    assert (tmp_path / "run.old-1" / "checkpoints" / "last.ckpt").exists()


def test_two_processes_do_not_train_in_one_directory(job: Job, tmp_path: Path, capsys: Any) -> None:
    with RunDirectory(tmp_path / "run").held():
        assert fit(job(), "--overwrite", "true") == 2
        assert "another process is training in" in capsys.readouterr().err
    assert fit(job(), "--trainer.max_steps", "1") == 0
    with RunDirectory(tmp_path / "run").held():
        assert fit(job(), "--ckpt_path", "last") == 2
        assert fit(job(), "--overwrite", "true") == 2
    assert fit(job(), "--overwrite", "true", "--trainer.max_steps", "1") == 0


def test_last_without_a_checkpoint_is_an_error_and_auto_is_not(job: Job, tmp_path: Path, capsys: Any) -> None:
    config = job(trainer={"max_epochs": 1})
    assert fit(config, "--ckpt_path", "last") == 2
    assert "there is no whole checkpoint" in capsys.readouterr().err
    assert fit(config, "--ckpt_path", "auto") == 0


def test_a_changed_profile_is_refused_unless_allowed(job: Job, capsys: Any) -> None:
    config = job(trainer={"max_epochs": 1}, data={"max_length": 512})
    assert fit(config) == 0
    words = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.profile", "Regime3"]
    assert fit(config, *words) == 2
    message = capsys.readouterr().err
    assert "was Plain" in message
    assert "is Regime3" in message
    with pytest.warns(UserWarning, match=r"profile is not what the run began with \(allowed\)"):
        assert fit(config, *words, "--allow-changed", "profile") == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--trainer.precision", "16-mixed"], "mixed precision"),
        (["--data.train_path", "nowhere.jsonl"], "there is no data file 'nowhere.jsonl'"),
        (["--model.pretrained", "./nowhere"], "there is no model directory './nowhere'"),
        (["--data.profile", "Regime4"], "did you mean Regime3?"),
        (["--data.batch_size", "0"], "data.batch_size: must be at least 1, not 0"),
        (["--data.max_lenght", "3"], "did you mean --data.max_length?"),
        (["--trainer.use_distributed_sampler", "true"], "must stay false"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: must be at least 1, not 0"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val: must be at least 0, not -1"),
        (["--seed_everything", "5000000000"], "seed_everything: must be at least 0 and below 2**32, not 5000000000"),
        (["--trainer.default_root_dir", "a" * 300], "trainer.default_root_dir: File name too long: 'aaa"),
        (
            ["--data.profile", "EmojiThink", "--data.profile.emoji_fraction", "5"],
            "data.profile: EmojiThink: emoji_fraction is 5.0; it must lie between 0 and 1",
        ),
        (
            ["--trainer.callbacks+=PreviewCallback", "--trainer.callbacks.every_n_steps=-1"],
            "trainer.callbacks: PreviewCallback.every_n_steps must be at least 1, not -1",
        ),
        (["--trainer.overfit_batches", "2"], "trainer.overfit_batches: is not supported"),
        (["--trainer.val_check_interval", "5000"], "`val_check_interval` (5000) must be less than or equal"),
        (["--model.attn_implementation", "bogus"], "bogus"),
        (["--trainer.default_root_dir", "rows.jsonl"], "'rows.jsonl' is a file; name a directory"),
        (["--checkpoint.monitor", "val/loss", "--data.val_fraction", "0"], "there is no validation in this run"),
    ],
)
def test_what_is_wrong_before_training_exits_2(
    words: list[str], error: str, job: Job, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(job(), *words) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert error in message[-1]
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_bad_rows_stop_the_run_before_it_takes_the_directory(
    job: Job, tmp_path: Path, chat_rows: Any, write_rows: Any, lines: Any, capsys: Any
) -> None:
    config = job()
    path = write_rows(chat_rows(20))
    with path.open("a") as file:
        file.write('{"messages": []}\nnot json\n')
    assert fit(config) == 2
    message = capsys.readouterr().err
    assert f"{path}:21: " in message
    assert f"{path}:22: not JSON" in message
    assert {fault["line"] for fault in lines(tmp_path / "run" / "quarantine.jsonl")} == {21, 22}
    assert fit(config, "--data.max_bad_fraction", "0.2") == 0


def test_ten_rows_one_epoch_no_validation(job: Job, tmp_path: Path) -> None:
    config = job(rows=10, data={"val_fraction": 0.0}, trainer={"callbacks": [PREVIEW], "max_epochs": 1})
    with pytest.warns(UserWarning, match="previews show training rows"):
        assert fit(config) == 0


@pytest.mark.parametrize("profile", ["Plain", "EmojiThink", "Regime3"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_every_profile_packed_and_padded(profile: str, packing: str, job: Job) -> None:
    config = job(rows=16, data={"profile": profile, "max_length": 512}, trainer={"max_steps": 2})
    assert fit(config, "--data.packing", packing) == 0


def test_validate_test_and_predict(job: Job, tmp_path: Path, lines: Any, capsys: Any) -> None:
    config = job(trainer={"max_epochs": 1})
    assert fit(config) == 0
    rows = tmp_path / "rows.jsonl"
    common = ["--config", str(config), "--ckpt_path", "last"]
    assert main(["validate", *common]) == 0
    assert "val/loss" in capsys.readouterr().out
    assert main(["test", *common, "--data.test_path", str(rows)]) == 0
    assert "test/loss" in capsys.readouterr().out
    words = ["--data.predict_path", str(rows), "--prediction.max_new_tokens", "4"]
    assert main(["predict", *common, *words]) == 0
    predictions = lines(tmp_path / "run" / "predictions.jsonl")
    assert [p["row"] for p in predictions] == [f"{rows}:{n}" for n in range(1, 41)]
    assert all(p["golden_answer"].startswith("(add") for p in predictions)
    assert main(["test", *common]) == 2


def test_gradient_checkpointing_and_full_loss_change_nothing(job: Job, tmp_path: Path, weights: Any) -> None:
    kinds: dict[str, list[str]] = {
        "plain": [],
        "checkpointed": ["--model.gradient_checkpointing", "true"],
        "full": ["--model.loss", "full"],
    }
    for name, words in kinds.items():
        assert fit(job(trainer={"max_steps": 4}), *words, "--trainer.default_root_dir", str(tmp_path / name)) == 0
    found = {name: weights(tmp_path / name / "checkpoints/last.ckpt") for name in kinds}
    assert same(found["plain"], found["checkpointed"])
    for key, value in found["plain"].items():
        torch.testing.assert_close(found["full"][key], value, atol=1e-5, rtol=1e-4)


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(job: Job, tmp_path: Path) -> None:
    config = job(checkpoint={"every_n_train_steps": 2})
    assert fit(config) == 0
    folder = tmp_path / "run" / "checkpoints"
    first = sorted(path.name for path in folder.glob("step=*.ckpt"))[0]
    assert fit(config, "--ckpt_path", str(folder / first), "--trainer.max_steps", str(int(first[5:11]) + 1)) == 0
    assert (folder / "last.ckpt").resolve().name == f"step={int(first[5:11]) + 1:06d}.ckpt"
    assert len(list(folder.glob("step=*.ckpt.old-1"))) == 2
    assert fit(config, "--ckpt_path", "last") == 0


def test_auto_starts_over_where_no_checkpoint_was_made_yet(
    job: Job, tmp_path: Path, scalars: Scalars, lines: Any
) -> None:
    """A run that ended before its first checkpoint: no point of a curve and no preview stands twice."""
    config = job(trainer={"callbacks": [PREVIEW], "max_epochs": 1})
    assert fit(config) == 0
    run = tmp_path / "run"
    for path in (run / "checkpoints").iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    assert fit(config, "--ckpt_path", "auto") == 0
    steps = [step for step, _ in scalars(run)["train/loss"]]
    assert steps == list(range(1, len(steps) + 1))
    previewed = [(p["step"], p["prompt_id"]) for p in lines(run / "previews.jsonl")]
    assert len(previewed) == len(set(previewed))
    assert len(lines(run / "previews.old.jsonl")) == len(previewed)


def test_a_checkpoint_of_another_run_is_compared_with_what_it_was_trained_on(
    job: Job, tmp_path: Path, capsys: Any
) -> None:
    config = job(trainer={"max_epochs": 1}, data={"max_length": 512})
    assert fit(config) == 0
    words = ["--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt"), "--trainer.max_epochs", "2"]
    other = ["--trainer.default_root_dir", str(tmp_path / "other")]
    assert fit(config, *words, *other, "--data.profile", "Regime3") == 2
    assert "was Plain" in capsys.readouterr().err
    assert fit(config, *words, *other) == 0
    assert fit(config, *words, *other) == 2  # taken, by another run
    assert "already holds a run" in capsys.readouterr().err


def test_rows_that_cannot_be_previewed_do_not_end_the_run(
    job: Job, tmp_path: Path, write_rows: Any, chat_rows: Any, lines: Any
) -> None:
    """Rows set aside are not previewed either."""
    rows = [{"messages": [{"role": "assistant", "content": "hello"}]}, *chat_rows(30)]
    val = write_rows(rows, "val.jsonl")
    config = job(
        trainer={"callbacks": [PREVIEW], "max_epochs": 1}, data={"val_path": str(val), "max_bad_fraction": 0.1}
    )
    assert fit(config) == 0
    assert len({p["prompt_id"] for p in lines(tmp_path / "run" / "previews.jsonl")}) == 2


def test_a_preview_that_raises_is_told_once_and_training_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lightning_trainer.preview import LocalPreviewBackend

    monkeypatch.setattr(LocalPreviewBackend, "submit", lambda *_: boom())
    with pytest.warns(UserWarning, match="previews are off for the rest of this run: RuntimeError: a fault"):
        assert fit(job(trainer={"callbacks": [PREVIEW], "max_epochs": 1})) == 0
    assert not (tmp_path / "run" / "previews.jsonl").exists()


def test_a_signal_in_the_last_preview_still_counts(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_trainer.callbacks import PreviewCallback

    monkeypatch.setattr(PreviewCallback, "on_train_end", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert fit(job(trainer={"callbacks": [PREVIEW], "max_epochs": 1})) == 130
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_nothing_is_moved_aside_for_a_run_that_cannot_start(job: Job, tmp_path: Path) -> None:
    config = job(trainer={"max_epochs": 1})
    assert fit(config) == 0
    assert fit(config, "--overwrite", "true", "--data.train_path", "nowhere.jsonl") == 2
    assert not (tmp_path / "run.old-1").exists()


@pytest.mark.parametrize("monitor", ["val/los", "train/lo"])
def test_a_monitor_that_is_not_there_is_named(monitor: str, job: Job, capsys: Any) -> None:
    assert fit(job(checkpoint={"monitor": monitor})) == 2
    assert f"there is no metric {monitor!r}" in capsys.readouterr().err


def test_the_checkpoint_of_the_best_step_knows_that_it_is(job: Job, tmp_path: Path) -> None:
    """Its save is due anyway; a run resumed there must not delete it for another."""
    config = job(trainer={"max_steps": 2, "val_check_interval": 2}, checkpoint={"monitor": "val/loss"})
    assert fit(config, "--checkpoint.every_n_train_steps", "1") == 0
    states = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt" / "trainer.pt", weights_only=True)["callbacks"]
    [best] = [state["best"] for state in states.values() if "best" in state]
    assert best[0][1] == max(step for _, step in best)


def test_a_stop_in_the_middle_of_a_step_waits_for_its_end(
    job: Job, tmp_path: Path, scalars: Scalars, weights: Any
) -> None:
    config = job(trainer={"accumulate_grad_batches": 3, "max_steps": 4})
    straight = ["--trainer.default_root_dir", str(tmp_path / "straight")]
    assert fit(config, *straight) == 0
    clock = ["--trainer.callbacks", "[{class_path: planted.EndsInAWindow, init_args: {batches: 4}}]"]
    assert fit(config, *clock) == 0
    run = tmp_path / "run"
    assert (run / "checkpoints" / "last.ckpt").resolve().name == "step=000002.ckpt"
    assert scalars(run)["train/loss"] == scalars(tmp_path / "straight")["train/loss"][:2]
    assert fit(config, "--ckpt_path", "last") == 0
    assert same(weights(run / "checkpoints/last.ckpt"), weights(tmp_path / "straight" / "checkpoints/last.ckpt"))


def test_a_failed_export_costs_no_checkpoint_and_is_made_up_for(job: Job, tmp_path: Path, capsys: Any) -> None:
    export = {"class_path": "HuggingFaceExport", "init_args": {"directory": "/proc/nothing/here"}}
    config = job(trainer={"max_steps": 2, "callbacks": [export]}, checkpoint={"every_n_train_steps": 100})
    assert fit(config) == 1
    assert "error: the export /proc/nothing/here could not be written" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "step=000002.ckpt"
    (tmp_path / "run" / ".export.tmp-1").mkdir()
    assert fit(config, "--ckpt_path", "last", "--trainer.callbacks.directory", "null") == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not (tmp_path / "run" / ".export.tmp-1").exists()


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(job: Job, capsys: Any) -> None:
    assert fit(job(trainer={"callbacks": ["planted.KeepsAnObject"], "max_steps": 1})) == 1
    assert (
        "what a callback keeps cannot be read back: planted.Odd; its state_dict() may hold" in capsys.readouterr().err
    )


def test_the_best_are_kept_besides_the_newest(job: Job, tmp_path: Path, scalars: Scalars) -> None:
    config = job(
        trainer={"val_check_interval": 0.25, "max_epochs": 3},
        checkpoint={"monitor": "val/loss", "save_top_k": 2, "keep_last": 1, "every_n_train_steps": 100},
        model={"optimizer": {"class_path": "CompensatedAdamW", "init_args": {"lr": 0.5}}},
    )
    assert fit(config) == 0
    scores = sorted(scalars(tmp_path / "run")["val/loss"], key=lambda point: point[1])
    kept = {int(path.name[5:11]) for path in (tmp_path / "run" / "checkpoints").glob("step=*.ckpt")}
    last = scalars(tmp_path / "run")["train/loss"][-1][0]
    assert kept == {*(step for step, _ in scores[:2]), last}


def test_a_validation_between_micro_batches_waits_for_the_step(job: Job, tmp_path: Path, scalars: Scalars) -> None:
    trainer = {"max_steps": 5, "max_epochs": 3, "accumulate_grad_batches": 4, "val_check_interval": 3}
    assert fit(job(trainer=trainer, checkpoint={"monitor": "val/loss", "save_top_k": -1})) == 0
    steps = [step for step, _ in scalars(tmp_path / "run")["val/loss"]]
    for step in steps:
        state = torch.load(tmp_path / f"run/checkpoints/step={step:06d}.ckpt/trainer.pt", weights_only=True)
        assert not state["mid_window"]
    # Nine micro-batches an epoch make windows of 4, 4 and 1; due after 3, 6 and 9, held after 4, 8 and 9.
    assert steps == [1, 2, 3, 4, 5]
    assert fit(tmp_path / "run.yaml", "--ckpt_path", str(tmp_path / "run/checkpoints/step=000004.ckpt")) == 0


def test_fast_dev_run_leaves_an_old_run_as_it_is(job: Job, tmp_path: Path) -> None:
    config = job(trainer={"callbacks": [PREVIEW], "max_epochs": 1})
    assert fit(config) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert fit(config, "--trainer.fast_dev_run", "true") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_fast_dev_run_leaves_nothing(job: Job, tmp_path: Path) -> None:
    assert fit(job(trainer={"callbacks": [PREVIEW]}), "--trainer.fast_dev_run", "true") == 0
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
