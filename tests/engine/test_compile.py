"""Runs under model.compile, with machine code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_trainer.cli import main
from lightning_trainer.engine.trainer_cli import TrainerCLI

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's own, of torch

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 3, "max_new_tokens": 4}}


@pytest.fixture
def fit(job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train as if in a process of its own; the run's directory."""

    def run(name: str, *words: str, compile: bool = True, **trainer: Any) -> Path:
        cache = tmp_path / "code"
        shutil.rmtree(cache, ignore_errors=True)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        torch.compiler.reset()
        model = {"compile": compile, "lr_scheduler": {"class_path": "WarmupConstant"}}  # as long as one likes
        config = job(model=model, trainer=trainer, checkpoint={"every_n_train_steps": 2})
        assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / name), *words]) == 0
        return tmp_path / name

    return run


def test_a_compiler_that_fails_leaves_everything_as_it_was(
    job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: original(self, backend=broken, **how))
    plain = job("plain.yaml", checkpoint={"every_n_train_steps": 2, "keep_last": 9})
    compiled = str(job("compiled.yaml", model={"compile": True}))
    assert main(["fit", "--config", compiled]) == 2
    assert ": model.compile: torch.compile fails here: " in capsys.readouterr().err
    assert main(["fit", "--config", str(plain)]) == 0  # the directory is not taken
    run = tmp_path / "run"
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    earlier = str(run / "checkpoints" / "step=000004.ckpt")
    assert main(["fit", "--config", compiled, "--ckpt_path", earlier]) == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(("val_fraction", "least"), [(0.2, 4), (0.0, 2)])
def test_self_check_previews_and_later_rows_compile_nothing_more(
    val_fraction: float, least: int, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    made: list[int] = []

    class Counts(Callback):
        def on_train_start(self, *_: Any) -> None:  # before the self-check, and behind the trial
            made.append(counters["frames"]["ok"])

        def on_fit_end(self, *_: Any) -> None:
            made.append(counters["frames"]["ok"])

    compile_, callbacks = torch.nn.Module.compile, TrainerCLI._callbacks
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="eager", **how))
    monkeypatch.setattr(TrainerCLI, "_callbacks", lambda cli, config: [Counts(), *callbacks(cli, config)])
    counters.clear()
    config = job(model={"compile": True}, trainer={"callbacks": [PREVIEW]}, data={"val_fraction": val_fraction})
    assert main(["fit", "--config", str(config)]) == 0
    assert made[0] == made[1] >= least


@pytest.mark.slow
def test_a_compiled_run_is_the_run(fit: Any, scalars: Any, weights: Any) -> None:
    """The same losses as uncompiled; to the bit the same when it is resumed, and with previews."""
    plain, compiled, previewed = fit("plain", compile=False), fit("compiled"), fit("previewed", callbacks=[PREVIEW])
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert [step for step, _ in scalars(compiled)[tag]] == [step for step, _ in scalars(plain)[tag]]
        for (_, one), (_, two) in zip(scalars(compiled)[tag], scalars(plain)[tag], strict=True):
            assert one == pytest.approx(two, rel=1e-4)
    last = weights(compiled / "checkpoints/last.ckpt")
    assert all(torch.equal(value, last[name]) for name, value in weights(previewed / "checkpoints/last.ckpt").items())
    fit("resumed", "--trainer.max_steps", "5")
    resumed = fit("resumed", "--ckpt_path", "last")
    assert all(torch.equal(value, last[name]) for name, value in weights(resumed / "checkpoints/last.ckpt").items())
