"""Planted faults, each caught before the first step with a message that names it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_trainer.cli import main
from lightning_trainer.data import collate

Job = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

NO_STOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_whose_end_of_turn_is_not_trained(
    job: Job, make_tokenizer: Any, tmp_path: Path, capsys: Capture
) -> None:
    make_tokenizer(NO_STOP).save_pretrained(tmp_path / "tokenizer")
    path = job(model={"tokenizer": str(tmp_path / "tokenizer")})
    assert main(["fit", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert "the token that ends an answer ('<|im_end|>') is trained in none of" in told
    assert "never learn to stop" in told
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert main(["fit", "--config", str(path), "--self_check", "false", "--trainer.max_steps", "1"]) == 0


@pytest.mark.parametrize("packing", [True, False])
def test_labels_that_are_all_masked(job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    _patch_batches(monkeypatch, lambda batch: replace(batch, labels=torch.full_like(batch.labels, -100)))
    assert main(["fit", "--config", str(job(data={"packing": packing}))]) == 2
    assert "all labels are masked" in capsys.readouterr().err


def test_an_attention_mask_of_ones_over_packed_examples(
    job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patch_batches(monkeypatch, lambda batch: replace(batch, attention_mask=torch.ones_like(batch.input_ids)))
    assert main(["fit", "--config", str(job(model={"attn_implementation": "sdpa"}))]) == 2
    told = capsys.readouterr().err
    assert "data.packing: examples of a packed batch do not stay apart" in told
    assert "Attention mask, position ids and model.attn_implementation (sdpa)" in told


def test_rows_that_are_swapped(job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _patch_batches(monkeypatch, lambda batch: replace(batch, input_ids=batch.input_ids.roll(1, dims=0)))
    assert main(["fit", "--config", str(job(data={"packing": False}))]) == 2
    assert "labels, targets and tokens of a batch do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predict_at", "targets", "labels"])
def test_labels_that_are_shifted(name: str, job: Job, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    _patch_batches(monkeypatch, lambda batch: replace(batch, **{name: getattr(batch, name).roll(1)}))
    assert main(["fit", "--config", str(job())]) == 2
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.* examples do not train a stop token")
def test_texts_that_are_all_cut_are_no_fault(job: Job, write_rows: Any) -> None:
    path = write_rows([{"text": f"{number} " + "word " * 200} for number in range(20)], "texts.jsonl")
    config = job(data={"train_path": str(path), "on_long_row": "truncate", "max_length": 64})
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "1"]) == 0


@pytest.mark.parametrize("packing", [True, False])
def test_weights_that_are_not_finite(
    packing: bool, job: Job, tiny_model_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = job(model={"pretrained": str(broken), "loss": "full"}, data={"packing": packing})
    assert main(["fit", "--config", str(path)]) == 2
    assert "logits that are not finite: its weights are damaged" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(
    job: Job, tiny_config: Any, tokenizer: Any, tmp_path: Path, capsys: Capture
) -> None:
    tiny_config(vocab_size=280).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    path = job(model={"pretrained": str(tmp_path / "small"), "from_scratch": True})
    assert main(["fit", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert "model.tokenizer: the tokenizer's largest token id is 290, the model's embedding has 280 rows" in told
    assert not (tmp_path / "run").exists()


def test_the_check_changes_training_by_no_bit(job: Job, tmp_path: Path, weights: Any) -> None:
    path = job(trainer={"max_steps": 3})
    for name in ("true", "false"):
        words = ["--self_check", name, "--trainer.default_root_dir", str(tmp_path / name)]
        assert main(["fit", "--config", str(path), *words]) == 0
    with_check, without = (weights(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("true", "false"))
    assert with_check.keys() == without.keys()
    assert all(torch.equal(with_check[name], without[name]) for name in with_check)


def _patch_batches(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    stock = collate.Collator.__call__
    monkeypatch.setattr(collate.Collator, "__call__", lambda self, *given: change(stock(self, *given)))
