"""Optimizers by their names in the YAML."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("back", [False, True])
def test_a_checkpoint_of_another_optimizer_is_refused_in_words(
    back: bool, job: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    adam = {"class_path": "CompensatedAdamW", "init_args": {"lr": 1e-3}}
    first, second = (MUON, adam) if back else (adam, MUON)
    short = {"max_steps": 2, "max_epochs": -1}
    assert main(["fit", "--config", str(job(model={"optimizer": first}, trainer=short))]) == 0
    config = job(model={"optimizer": second}, trainer={**short, "max_steps": 4})
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 2
    assert "it is another optimizer's or another precision's" in " ".join(capsys.readouterr().err.split())


def test_check_counts_muons_memory_of_one_hidden_matrix(job: Callable[..., Path], capsys: Any) -> None:
    assert main(["check", "--json", "--config", str(job(model={"optimizer": MUON}))]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found["update"] == 48 * 32 * 28  # the largest is of the MLP; the embedding is AdamW's
