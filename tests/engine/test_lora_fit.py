"""A run with model.lora, whole: what it leaves behind, and going on with it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

import lightning_trainer
from lightning_trainer.cli import main
from lightning_trainer.generation import quiet

Job = Callable[..., Path]

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 2, "num_prompts": 2, "max_new_tokens": 4}}

LORA = {"rank": 4, "alpha": 8, "dropout": 0.2}

IDS = torch.arange(12)[None]


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), *words])


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Adapters and optimizer state."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer_states"][0]["state"]
    moments = {f"{key}.{name}": value for key, entry in state.items() for name, value in entry.items()}
    return {**load_file(checkpoint / "adapter_model.safetensors"), **moments}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class _Frozen(Callback):
    """The frozen weights, before and after."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {n: p.clone() for n, p in pl_module.named_parameters() if not p.requires_grad}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.equal = bool(self.before) and all(torch.equal(named[n], value) for n, value in self.before.items())
        self.moments = sum(len(optimizer.state) for optimizer in trainer.optimizers)
        with quiet(pl_module.causal_lm), torch.no_grad():
            self.logits = pl_module.causal_lm(IDS).logits


class _StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.fit_loop.epoch_loop._should_accumulate():
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # asked for by plain peft
def test_a_run_leaves_adapters_that_peft_loads(
    job: Job, tmp_path: Path, tiny_model_dir: Path, watched: Any, lines: Any, caplog: Any, capsys: Any
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    frozen = _Frozen()
    watched(frozen)
    export = {"class_path": "HuggingFaceExport", "init_args": {"merge": True}}
    config = job(model={"lora": LORA}, trainer={"callbacks": [PREVIEW, export], "max_epochs": 1})
    assert fit(config) == 0
    run, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    assert "3,712 of 31,552 parameters trained, LoRA of rank 4, alpha 8 on 14 layers" in caplog.text
    assert frozen.equal
    assert frozen.moments == 28
    assert max(t.abs().max() for n, t in load_file(last / "adapter_model.safetensors").items() if "lora_B" in n) > 1e-4
    assert not list(last.glob("model*.safetensors"))
    assert (last / "adapter_model.safetensors").stat().st_size < 4 * 3712 + 4096
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model_dir)
    for directory in (last, run / "export"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        for loaded in (
            PeftModel.from_pretrained(base, str(directory)),
            AutoPeftModelForCausalLM.from_pretrained(str(directory)),
            AutoModelForCausalLM.from_pretrained(directory),
        ):
            assert torch.equal(loaded(IDS).logits, frozen.logits)
        AutoTokenizer.from_pretrained(directory)
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    torch.testing.assert_close(merged(IDS).logits, frozen.logits, atol=1e-5, rtol=1e-4)
    _validates_and_predicts(config, tmp_path, capsys, lines)


def _validates_and_predicts(config: Path, tmp_path: Path, capsys: Any, lines: Any) -> None:
    common = ["--config", str(config), "--ckpt_path", "last"]
    status = {p["step"]: p for p in lines(tmp_path / "run" / "previews.jsonl")}
    assert status
    capsys.readouterr()
    assert main(["validate", *common]) == 0
    assert "val/loss" in capsys.readouterr().out
    words = ["--data.predict_path", str(tmp_path / "rows.jsonl"), "--prediction.max_new_tokens", "2"]
    assert main(["predict", *common, *words]) == 0
    assert len(lines(tmp_path / "run" / "predictions.jsonl")) == 40


@pytest.mark.parametrize(
    ("lora", "precision"),
    [
        ({**LORA, "use_dora": True}, "32-true"),
        ({**LORA, "dtype": "fp32", "modules_to_save": ["embed_tokens"]}, "bf16-true"),
    ],
)
def test_resume_is_bit_identical(
    lora: dict[str, Any], precision: str, job: Job, tmp_path: Path, watched: Any, caplog: Any
) -> None:
    """With dropout, gradient checkpointing and previews; ended by SIGTERM in the middle."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trainer = {"callbacks": [PREVIEW], "precision": precision, "limit_val_batches": 1}
    config = job(rows=16, model={"lora": lora, "gradient_checkpointing": True}, trainer=trainer)
    words = ["--trainer.default_root_dir", str(broken)]
    assert fit(config, "--trainer.default_root_dir", str(straight)) == 0
    assert ("adapters, their gradients and moments (fp32)" in caplog.text) == ("dtype" in lora)
    watched(_StopAt(3))
    assert fit(config, *words) == 143
    watched(Callback())
    assert fit(config, *words, "--ckpt_path", "last") == 0
    first, second = (trained(run / "checkpoints/last.ckpt") for run in (straight, broken))
    assert same(first, second)
    assert all(tensor.dtype == torch.float32 for name, tensor in first.items() if "lora_" in name)


def test_going_on_otherwise_than_it_began_is_refused(
    job: Job, tmp_path: Path, tiny_model_dir: Path, capsys: Any
) -> None:
    short = {"max_epochs": 1}
    config = job(model={"lora": LORA}, trainer=short)
    assert fit(config) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    further = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert fit(config, *further, "--model.lora", "null") == 2
    assert "holds adapters: resume with model.lora: {rank: 4, alpha: 8}" in capsys.readouterr().err
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fit(config, *further, "--model.pretrained", str(other)) == 2
    assert "are not those the adapters were trained on" in capsys.readouterr().err
    assert fit(config, *further, "--model.lora.dropout", "0.5") == 0
    whole = ["--trainer.default_root_dir", str(tmp_path / "whole")]
    assert fit(config, *whole, "--model.lora", "null") == 0
    assert fit(config, *whole, *further) == 2
    assert "holds a whole model: leave model.lora out" in capsys.readouterr().err
    assert fit(config, *whole, "--overwrite", "true", "--model.lora", "null", "--model.pretrained", str(last)) == 2
    assert "go on with them by model.lora: {rank: 4, alpha: 8}" in capsys.readouterr().err


def test_a_new_run_goes_on_with_adapters(job: Job, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = job(model={"lora": LORA}, trainer={"max_epochs": 1})
    assert fit(config) == 0
    first = tmp_path / "run/checkpoints/last.ckpt"
    words = ["--model.pretrained", str(first), "--trainer.default_root_dir", str(tmp_path / "second")]
    assert fit(config, *words, "--model.optimizer.init_args.lr", "0", "--trainer.max_steps", "1") == 0
    second = tmp_path / "second/checkpoints/last.ckpt"
    weights = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
    assert same(*weights)
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model_dir)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.lora", "{rank: 0}"], "model.lora.rank: must be at least 1, not 0"),
        (["--model.lora", "{target_modules: [q_porj]}"], "has no layer 'q_porj'"),
        (["--model.lora", "{rank: 2}", "--model.quantization", "{bits: 4}"], "model.quantization: a 4-bit base needs"),
        (["--model.quantization", "{type: nf4}"], "add model.lora: {rank: 16}"),
    ],
)
def test_what_cannot_be_is_said_before_training(words: list[str], said: str, job: Job, capsys: Any) -> None:
    assert fit(job(), *words) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


class _NoPeft:
    """An importer that refuses peft."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "peft":
            raise AssertionError("peft is imported")


def test_peft_is_not_imported_without_lora(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoPeft(), *sys.meta_path])
    config = job(rows=12, trainer={"max_steps": 1, "callbacks": [PREVIEW, "HuggingFaceExport"]})
    assert fit(config) == 0
    assert fit(config, "--model.lora", "{rank: 2}", "--overwrite", "true") == 1


def test_no_module_imports_peft_when_it_is_loaded() -> None:
    for path in Path(lightning_trainer.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("peft" in ast.unparse(node).split() for node in top), path
