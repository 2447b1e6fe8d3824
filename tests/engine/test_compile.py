"""Runs under model.compile, with machine code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_trainer.cli import main

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # torch.compile's own warnings; a minute

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
