"""The lock in a run: recorded, compared before anything loads and on resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer.cli import main

Job = Callable[..., Path]

LOCKED = {
    "base_model": "tiny",
    "model_architecture": "Qwen3ForCausalLM",
    "max_context_length": 2048,
    "vocab_size": 384,
}


def _locked(path: Path, **changes: Any) -> list[str]:
    fields = {**LOCKED, **changes}
    words = [word for name, value in fields.items() for word in (f"--model.locked.{name}", str(value))]
    return ["fit", "--config", str(path), *words]


def test_a_lock_is_recorded_and_kept_on_resume(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job(trainer={"max_steps": 2}, description="a first try")
    assert main(_locked(path)) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["lock"] == {**LOCKED, "model_version": "v1", "created_at": ""}
    assert manifest["description"] == "a first try"

    resume = ["--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert main([*_locked(path, base_model="another", max_context_length=4096), *resume]) == 2
    told = capsys.readouterr().err
    assert "base_model: was 'tiny', is 'another'" in told
    assert "max_context_length: was 2048, is 4096" in told

    assert main(["fit", "--config", str(path), "--data.max_length", "160", *resume]) == 0  # the run's lock holds on
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["lock"]["base_model"] == "tiny"
    longer = ["--ckpt_path", "last", "--trainer.max_steps", "4", "--allow-changed", "lock"]
    assert main([*_locked(path, base_model="another"), *longer]) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 385}, "vocab_size: the lock says 385, the model has 384"),
        ({"model_architecture": "LlamaForCausalLM"}, "the model has 'Qwen3ForCausalLM'"),
        ({"max_context_length": 4096}, "max_context_length: the lock says 4096, the model has 2048"),
        ({"max_context_length": 100}, "data.max_length: max_length is 160, the lock's max_context_length 100"),
    ],
)
def test_a_mismatch_ends_before_anything_loads(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    assert main(_locked(job(), **changes)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
