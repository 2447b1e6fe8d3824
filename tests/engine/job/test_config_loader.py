"""ConfigLoader and job files: command line before JSON before defaults; nested and flat."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer import ConfigLoader, TrainerConfig, create_default_config
from lightning_trainer.engine.job.flat import nested
from lightning_trainer.engine.job.job_file import read_job
from lightning_trainer.types import InputError


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A job's JSON file; sections are merged over a small whole one."""

    def write(name: str = "job.json", **values: Any) -> Path:
        sections: dict[str, Any] = {
            "model": {"model_path": str(tiny_model_dir)},
            "data": {"dataset_path": "rows.jsonl"},
            "output": {"output_dir": "out"},
        }
        for section, fields in values.items():
            sections[section] = {**sections[section], **fields} if section in sections else fields
        path = tmp_path / name
        path.write_text(json.dumps(sections), encoding="utf-8")
        return path

    return write


def test_command_line_before_json_before_defaults(job: Callable[..., Path]) -> None:
    path = job(hyperparams={"batch_size": 4, "max_steps": 9, "fp_precision": "fp32"})
    config = ConfigLoader.from_args_and_json(["--batch-size", "8", "--bf16"], base_config_path=path)
    assert (config.hyperparams.batch_size, config.hyperparams.max_steps) == (8, 9)
    assert config.hyperparams.fp_precision == "bf16"
    assert config.hyperparams.warmup_steps == 100


def test_every_flag_reaches_its_field(job: Callable[..., Path]) -> None:
    words = (
        "--dataset d.jsonl --output-dir o --batch-size 2 --learning-rate 1e-5 --warmup-steps 3 --epochs 4 "
        "--max-steps 5 --save-steps 6 --eval-steps 7 --max-length 80 --fp16 --profile regime3 --num-eval-samples 8 "
        "--resume-from-checkpoint last"
    ).split()
    config = ConfigLoader.from_args_and_json([*words, "--config", str(job())])
    h = config.hyperparams
    assert config.data.dataset_path == "d.jsonl"
    assert config.output.output_dir == "o"
    assert (h.batch_size, h.learning_rate, h.warmup_steps, h.num_epochs, h.max_steps) == (2, 1e-5, 3, 4, 5)
    assert (h.save_steps, h.eval_steps, h.eval_strategy, h.max_length, h.fp_precision) == (6, 7, "steps", 80, "fp16")
    assert config.profile.name == "regime3"
    assert config.monitoring.num_eval_samples == 8
    assert config.output.resume_from_checkpoint == "last"


def test_config_on_the_command_line_wins_over_the_base(job: Callable[..., Path]) -> None:
    base, other = job(hyperparams={"batch_size": 4}), job("other.json", hyperparams={"batch_size": 5})
    config = ConfigLoader.from_args_and_json(["--config", str(other)], base_config_path=base)
    assert config.hyperparams.batch_size == 5


def test_a_callers_own_namespace(job: Callable[..., Path]) -> None:
    args = argparse.Namespace(batch_size=3, model=None, fp16=False, bf16=False, verbose=True)
    config = ConfigLoader.from_args_and_json(args, base_config_path=job())
    assert config.hyperparams.batch_size == 3


def test_a_lock_that_is_not_given_is_read_off_the_model(tiny_model_dir: Path) -> None:
    config = ConfigLoader.from_args_and_json(["--dataset", "d.jsonl", "--model", str(tiny_model_dir)])
    assert config.locked.model_dump() == {
        "base_model": str(tiny_model_dir),
        "model_architecture": "Qwen3ForCausalLM",
        "max_context_length": 2048,
        "vocab_size": 384,
        "model_version": "v1",
        "created_at": "",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "model.model_path: is required; give it in the JSON, or as --model\ndata.dataset_path: is required"),
        (["--datset", "x"], "unrecognized arguments: --datset x; did you mean --dataset?"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--fp16", "--bf16"], "argument --bf16: not allowed with argument --fp16"),
        (["--config", "nowhere.json"], "nowhere.json: cannot be read: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], told: str) -> None:
    with pytest.raises(InputError) as caught:
        ConfigLoader.from_args_and_json(words)
    assert str(caught.value).startswith(told)


def test_the_flat_form() -> None:
    flat = {
        "current_model_dir": "m",
        "dataset_path": "d.jsonl",
        "output_dir": "o",
        "epochs": 3,
        "max_length": 512,
        "batch_size": 2,
        "eval_max_tokens": 99,
        "profile": "plain",
        "base_model": "b",
        "device_map": "auto",
        "hyperparams": {"learning_rate": 1e-5},
    }
    before = json.dumps(flat)
    assert nested(flat) == {
        "model": {"model_path": "m", "device_map": "auto"},
        "data": {"dataset_path": "d.jsonl"},
        "output": {"output_dir": "o"},
        "hyperparams": {"num_epochs": 3, "max_length": 512, "batch_size": 2, "learning_rate": 1e-5},
        "monitoring": {"max_eval_tokens": 99},
        "profile": {"name": "plain"},
        "locked": {"base_model": "b"},
    }
    assert json.dumps(flat) == before


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"epochs": 3, "hyperparams": {"num_epochs": 2}}, "hyperparams.num_epochs: is given twice"),
        ({"hyperparams": {"num_epochs": 2}, "epochs": 3}, "hyperparams.num_epochs: is given twice"),
    ],
)
def test_faults_of_the_flat_form(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        nested(values)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not a job's JSON"),
        ("[]", "a job is a JSON object, not list"),
        ('{"epochs": 1, "epochs": 2}', "the key 'epochs' stands there twice"),
    ],
)
def test_faults_of_the_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told) as caught:
        read_job(path)
    assert str(path) in str(caught.value)


def test_the_lock_is_compared_with_the_model_and_with_the_job_before(tiny_model_dir: Path) -> None:
    def make(**locked: Any) -> TrainerConfig:
        values = {"base_model": "b", "model_architecture": "Qwen3ForCausalLM", "vocab_size": 384, **locked}
        return create_default_config(str(tiny_model_dir), "d", "o", max_context_length=2048, **values)

    ConfigLoader.validate_locked_config(make())
    ConfigLoader.validate_locked_config(make(), make())
    with pytest.raises(InputError, match=r"vocab_size: the lock says 385, the model has 384"):
        ConfigLoader.validate_locked_config(make(vocab_size=385))
    with pytest.raises(InputError, match=r"base_model: was 'a', is 'b'"):
        ConfigLoader.validate_locked_config(make(), make(base_model="a"))
    long = make()
    long.hyperparams.max_length = 4096
    with pytest.raises(InputError, match=r"max_length is 4096, the lock's max_context_length 2048"):
        ConfigLoader.validate_locked_config(long)
