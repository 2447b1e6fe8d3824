"""Optimizers by their names in the YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_trainer.cli import main

MUON = {"class_path": "CompensatedMuon", "init_args": {"lr": 1e-3}}
EIGHT_BIT = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1e-3, "bf16_stochastic_round": True}}


@pytest.fixture
def fit(job: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, optimizer: dict[str, Any], *words: str, precision: str = "bf16-true") -> Path:
        config = job(model={"optimizer": optimizer}, trainer={"precision": precision, "max_steps": 8, "max_epochs": -1})
        directory = tmp_path / name
        assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(directory), *words]) == 0
        return directory

    return run


def state_of(run: Path) -> dict[str, Any]:
    found = torch.load(run / "checkpoints/last.ckpt/trainer.pt", weights_only=True)
    return dict(found["optimizer_states"][0]["state"])


def test_muon_trains_hidden_matrices_and_resumes_bit_for_bit(fit: Any, weights: Any, scalars: Any) -> None:
    whole = fit("whole", MUON)
    kinds = [sorted(values) for values in state_of(whole).values()]
    assert kinds.count(["low_bits", "momentum_buffer"]) == 2 * 7  # of two layers: q k v o, gate up down
    assert kinds.count(["exp_avg", "exp_avg_sq", "low_bits", "step"]) == 2 * 4 + 2  # norms, the tied embedding
    assert scalars(whole)["precision/frozen_update_fraction"][-1][1] < 1e-3
    fit("halves", MUON, "--trainer.max_steps", "4", "--model.lr_scheduler.total_steps", "8")
    halves = fit("halves", MUON, "--ckpt_path", "last")
    one, two = weights(whole / "checkpoints/last.ckpt"), weights(halves / "checkpoints/last.ckpt")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_muon_is_refused_in_fp16(job: Callable[..., Path], capsys: Any) -> None:
    config = job(model={"optimizer": MUON}, trainer={"precision": "16-true"})
    assert main(["fit", "--config", str(config)]) == 2
    assert "CompensatedMuon keeps fp16 moments under 16-true" in capsys.readouterr().err


def test_moments_of_8_bits(fit: Any, weights: Any) -> None:
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    with torch.compiler.set_stance("force_eager"):  # compiled it takes half a minute to begin
        whole = fit("whole", EIGHT_BIT)
        moments = [v for values in state_of(whole).values() for v in values.values() if v.dim()]
        assert any(isinstance(moment, torchao.OptimState8bit) for moment in moments)
        fit("halves", EIGHT_BIT, "--trainer.max_steps", "4", "--model.lr_scheduler.total_steps", "8")
        halves = fit("halves", EIGHT_BIT, "--ckpt_path", "last")
    one, two = (_plain(weights(run / "checkpoints/last.ckpt")) for run in (whole, halves))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def _plain(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value.dequantize() if hasattr(value, "codes") else value for key, value in tensors.items()}
