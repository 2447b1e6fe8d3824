"""Lowering: no field of a job is unread."""

import copy
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from lightning_trainer import TrainerConfig, create_default_config
from lightning_trainer.engine.job.lowering import NOT_YET, lower, remarks
from lightning_trainer.engine.job.sections import Section
from lightning_trainer.engine.job.yaml_text import as_yaml
from lightning_trainer.types import InputError

FIELDS = [f"{cls.key}.{name}" for cls in Section.__subclasses__() if cls.key for name in cls.model_fields]

OTHER: dict[str, Any] = {
    "profile.name": "regime3",
    "profile.options": {"emoji_fraction": 0.5},
    "profile.system_prompt_template": "Be brief.",
    "environment.report_to": [],
    "data.validation_dataset_path": "val.jsonl",
    "data.max_length_override": 1024,
    "model.torch_dtype": "float32",
    "hyperparams.max_length": 1024,
    "hyperparams.max_steps": 3,
    "data.packing_strategy": "wrapped",
}
"""Another valid value, where a rule does not find one."""


@pytest.fixture
def config() -> TrainerConfig:
    return create_default_config("model", "rows.jsonl", "out", "base", "Qwen3ForCausalLM", 4096, 384)


def _other_value(dotted: str, annotation: Any, value: Any) -> Any:
    if dotted in OTHER:
        return OTHER[dotted]
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if value >= 1 else value / 2
    return 3 if int in get_args(annotation) else f"{value or ''}x"


@pytest.mark.parametrize("dotted", FIELDS)
def test_changing_any_field_changes_what_runs_or_is_refused(config: TrainerConfig, dotted: str) -> None:
    section_name, _, name = dotted.partition(".")
    section = getattr(config, section_name)
    if name.startswith("remote_3090"):
        config.monitoring.preview_backend = "remote_3090"
    before = lower(config)
    field = type(section).model_fields[name]
    value = _other_value(dotted, field.annotation, getattr(section, name))
    refusal = _why_refused(config, dotted, value)
    if refusal is None:
        assert (lower(config) == before) == (dotted in NOT_YET)
    else:
        assert dotted in refusal
        assert dotted not in NOT_YET


def _why_refused(config: TrainerConfig, dotted: str, value: Any) -> str | None:
    section, _, name = dotted.partition(".")
    try:
        setattr(getattr(config, section), name, value)
        lower(config)
    except InputError as error:
        return str(error)
    return None


def test_the_top_level_is_read_too(config: TrainerConfig) -> None:
    before = lower(config)
    config.description = "a try"
    assert lower(config) != before
    with pytest.raises(InputError, match=r"config_version: must be '2\.0'"):
        config.config_version = "1.0"  # type: ignore[assignment]


def test_lowering_shares_nothing_with_the_job(config: TrainerConfig) -> None:
    config.profile.options = {"emoji_fraction": 0.5}
    before = copy.deepcopy(config.to_dict())
    lower(config)["data"]["profile"]["init_args"]["emoji_fraction"] = 7
    assert config.to_dict() == before


def test_values_worked_out_by_hand(config: TrainerConfig) -> None:
    config.hyperparams.eval_strategy, config.hyperparams.eval_steps = "steps", 10
    config.hyperparams.gradient_accumulation, config.hyperparams.max_steps = 4, 50
    config.environment.max_grad_norm = 0
    assert lower(config)["validation"] == {"every_n_steps": 10}
    trainer = lower(config)["trainer"]
    assert (trainer["limit_val_batches"], trainer["val_check_interval"]) == (1.0, 1.0)
    assert (trainer["max_steps"], trainer["max_epochs"]) == (50, -1)
    assert trainer["gradient_clip_val"] is None
    assert trainer["precision"] == "bf16-true"
    config.hyperparams.eval_strategy = "epoch"
    assert lower(config)["validation"] == {"every_n_steps": None}
    config.hyperparams.eval_strategy = "no"
    assert lower(config)["trainer"]["limit_val_batches"] == 0


@pytest.mark.parametrize(
    ("profile", "template", "lowered"),
    [
        ("emoji_think", None, "Today is {date}. You are happy. You enjoy helping others."),
        ("plain", None, "Today is {date}. You are happy. You enjoy helping others."),
        ("regime3", None, None),
        ("my.Profile", None, None),
        ("regime3", "Short.", "Short."),
        ("plain", "", ""),
    ],
)
def test_the_system_prompt(config: TrainerConfig, profile: str, template: str | None, lowered: str | None) -> None:
    config.profile.name, config.profile.system_prompt_template = profile, template
    assert lower(config)["data"]["system_prompt"] == lowered


def test_every_refusal_is_named_with_its_way_out(config: TrainerConfig) -> None:
    config.model.load_in_4bit = config.model.load_in_8bit = True
    config.model.torch_dtype, config.hyperparams.fp_precision = "bfloat16", "fp16"
    config.hyperparams.max_length = 8192
    config.environment.optimizer_type = "muon"
    with pytest.raises(InputError) as caught:
        lower(config)
    assert str(caught.value).splitlines() == [
        "model.load_in_8bit: True: a base of 8 bits is not offered; set it to false, or write the job as YAML "
        "(convert) and there model.quantization: {bits: 4} and model.lora",
        "model.load_in_4bit: True: a job has no adapters to train on it; set it to false, or write the job as YAML "
        "(convert) and there model.quantization: {bits: 4} and model.lora",
        "environment.optimizer_type: 'muon': is not for fp16, in which squares of gradients are 0: take adamw, or "
        "fp_precision bf16",
        "model.torch_dtype: 'bfloat16' does not agree with hyperparams.fp_precision 'fp16', which alone decides: "
        "set it to null",
        "hyperparams.max_length: 8192 is more than locked.max_context_length 4096",
    ]


def test_optimizers_by_the_names_of_jobs(config: TrainerConfig) -> None:
    found = {}
    for name in ("adamw", "muon", "adamw_8bit"):
        config.environment.optimizer_type = name  # type: ignore[assignment]
        found[name] = lower(config)["model"]["optimizer"]
    assert {name: given["class_path"] for name, given in found.items()} == {
        "adamw": "CompensatedAdamW",
        "muon": "CompensatedMuon",
        "adamw_8bit": "torchao.optim.AdamW8bit",
    }
    assert found["adamw_8bit"]["init_args"] == {
        "lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0, "bf16_stochastic_round": True
    }  # fmt: skip
    assert found["muon"]["init_args"] == {"lr": 2e-4}


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", "bf16"])
def test_a_dtype_that_agrees_is_taken(config: TrainerConfig, dtype: str) -> None:
    config.model.torch_dtype = dtype
    assert lower(config)["trainer"]["precision"] == "bf16-true"


def test_previews_on_a_second_gpu(config: TrainerConfig) -> None:
    config.monitoring.preview_backend = "remote_3090"
    config.monitoring.remote_3090_host, config.monitoring.remote_3090_port = "::1", 9000
    config.monitoring.remote_3090_ca, config.monitoring.remote_3090_token_file = "ca.pem", "token"
    options = {"address": "[::1]:9000", "ca": "ca.pem", "token_file": "token"}
    assert lower(config)["preview_backend"] == {"class_path": "GrpcPreviewBackend", "init_args": options}


def test_what_has_no_effect_is_said(config: TrainerConfig) -> None:
    assert remarks(config) == [f"not built yet, without effect: {', '.join(NOT_YET)}"]
    assert set(NOT_YET) <= set(FIELDS)


def test_the_yaml_is_the_lowered_job_with_comments(config: TrainerConfig) -> None:
    config.description = 'two\nlines: # "quoted"'
    config.profile.system_prompt_template = "a: {date}\n\n# b"
    config.profile.options = {"emoji_fraction": 0.25}
    config.hyperparams.learning_rate = 1e-5
    text = as_yaml(config, "job.json", "mine.yaml")
    assert yaml.safe_load(text) == lower(config)
    assert text.startswith("# lightning-trainer fit --config mine.yaml\n# Made from job.json.\n")
    assert "accumulate_grad_batches: 16  # 16 x 1 = 16 rows per device and optimizer step\n" in text
