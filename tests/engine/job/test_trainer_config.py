"""TrainerConfig: what it takes, what it refuses, and that nothing is lost on the way to JSON and back."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer import TrainerConfig, create_default_config
from lightning_trainer.engine.job.sections import Hyperparams
from lightning_trainer.types import InputError


@pytest.fixture
def config() -> TrainerConfig:
    return create_default_config("model", "rows.jsonl", "out", "base", "Qwen3ForCausalLM", 4096, 384)


def test_the_defaults_are_those_of_earlier_versions(config: TrainerConfig) -> None:
    values = config.to_dict()
    assert list(values) == [
        "config_version",
        "description",
        "hyperparams",
        "profile",
        "monitoring",
        "locked",
        "data",
        "model",
        "output",
        "environment",
    ]
    assert values["hyperparams"] == {
        "batch_size": 1,
        "gradient_accumulation": 16,
        "learning_rate": 2e-4,
        "warmup_steps": 100,
        "num_epochs": 1,
        "max_steps": None,
        "max_length": 2048,
        "max_new_tokens": 2048,
        "fp_precision": "bf16",
        "save_steps": 1000,
        "save_total_limit": 3,
        "eval_steps": 500,
        "eval_strategy": "no",
        "use_gradient_checkpointing": True,
        "effective_batch_size": 16,
    }
    assert values["profile"] == {"name": "emoji_think", "options": {}, "system_prompt_template": None}
    assert values["locked"]["model_version"] == "v1"
    assert values["environment"]["report_to"] == ["tensorboard"]


def test_a_round_trip_through_json_loses_nothing(config: TrainerConfig) -> None:
    config.profile.name, config.profile.options = "emoji_think", {"emoji_fraction": 0.5}
    config.hyperparams.max_steps, config.description = 7, "zwei 🤔"
    again = TrainerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_the_callers_values_stay_as_they_are_and_are_not_shared(config: TrainerConfig) -> None:
    given = {**config.to_dict(), "lora": None}
    before = copy.deepcopy(given)
    made = TrainerConfig.from_dict(given)
    made.profile.options["emoji_fraction"] = 0.1
    made.environment.report_to.clear()
    assert given == before
    shown = made.to_dict()
    shown["profile"]["options"]["x"] = 1
    assert made.profile.options == {"emoji_fraction": 0.1}


def test_the_effective_batch_size_is_always_current(config: TrainerConfig) -> None:
    config.hyperparams.batch_size = 4
    config.hyperparams.gradient_accumulation = 3
    assert config.hyperparams.effective_batch_size == config.to_dict()["hyperparams"]["effective_batch_size"] == 12
    with pytest.raises(InputError, match="is derived"):
        config.hyperparams.effective_batch_size = 5  # type: ignore[misc]
    values = config.to_dict()
    values["hyperparams"]["batch_size"] = 5
    with pytest.warns(UserWarning, match=r"effective_batch_size is derived: 15, not the 12 that was given"):
        assert TrainerConfig.from_dict(values).hyperparams.effective_batch_size == 15


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("hyperparams", "batch_size", 0, "hyperparams.batch_size: must be at least 1, not 0"),
        ("hyperparams", "batch_size", 2.0, "hyperparams.batch_size: must be a valid integer, not 2.0"),
        ("hyperparams", "batch_size", True, "hyperparams.batch_size: must be a valid integer, not True"),
        ("hyperparams", "learning_rate", "2e-4", "hyperparams.learning_rate: must be a valid number, not '2e-4'"),
        ("hyperparams", "learning_rate", float("nan"), "hyperparams.learning_rate: must be a finite number, not nan"),
        (
            "hyperparams",
            "fp_precision",
            "bf61",
            "hyperparams.fp_precision: must be 'fp16', 'bf16' or 'fp32', not 'bf61'; did you mean bf16?",
        ),
        (
            "hyperparams",
            "max_len",
            3,
            "hyperparams.max_len: no such field; did you mean hyperparams.max_length?",
        ),
        ("hyperparams", "seed", 3, "hyperparams.seed: no such field; did you mean data.seed?"),
        (
            "profile",
            "name",
            "regime2",
            "profile.name: unknown profile 'regime2', did you mean 'regime3'?; "
            "known profiles: plain, emoji_think, regime3",
        ),
        ("monitoring", "validation_split", 1, "monitoring.validation_split: must be at most 0.9, not 1"),
        (
            "environment",
            "optimizer_type",
            "paged_adamw_8bit",
            "environment.optimizer_type: must be 'adamw', 'adamw_8bit' or 'muon', not 'paged_adamw_8bit'; "
            "take adamw_8bit",
        ),
        ("environment", "report_to", ["wandb"], "environment.report_to.0: must be 'tensorboard', not 'wandb'"),
        ("locked", "vocab_size", None, "locked.vocab_size: must be a valid integer, not None"),
        ("output", "output_dir", "", "output.output_dir: must not be empty"),
    ],
)
def test_assignment_refuses(config: TrainerConfig, section: str, field: str, value: Any, told: str) -> None:
    before = config.to_dict()
    with pytest.raises(InputError) as caught:
        setattr(getattr(config, section), field, value)
    assert str(caught.value) == told
    assert config.to_dict() == before


def test_a_section_can_be_assigned_whole_and_a_path_is_text(config: TrainerConfig) -> None:
    config.profile = {"name": "plain"}  # type: ignore[assignment]
    config.model.model_path = Path("a/b")  # type: ignore[assignment]
    assert config.profile.name == "plain"
    assert config.model.model_path == "a/b"


def test_every_fault_of_a_dict_is_named() -> None:
    with pytest.raises(InputError) as caught:
        TrainerConfig.from_dict({"hyperparms": {}, "hyperparams": {"batch_size": "a"}, "model": {}})
    lines = str(caught.value).splitlines()
    assert "hyperparams.batch_size: must be a valid integer, not 'a'" in lines
    assert "model.model_path: is required and missing" in lines
    assert "locked: is required and missing" in lines
    assert "hyperparms: no such field; did you mean hyperparams?" in lines


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"bach_size": 3}, "bach_size: no such field; did you mean hyperparams.batch_size?"),
        ({"hyperparams": 3}, "hyperparams: must be a valid dictionary or instance of Hyperparams, not 3"),
        ({"epochs": 0}, "hyperparams.num_epochs: must be at least 1, not 0"),
    ],
)
def test_faults_at_the_top(config: TrainerConfig, extra: dict[str, Any], told: str) -> None:
    values = config.to_dict()
    values["hyperparams"] = {}
    with pytest.raises(InputError) as caught:
        TrainerConfig.from_dict({**values, **extra})
    assert str(caught.value) == told


def test_sections_made_by_hand_say_the_same() -> None:
    with pytest.raises(InputError, match=r"^hyperparams\.batch_size: must be at least 1, not 0$"):
        Hyperparams(batch_size=0)
    with pytest.raises(InputError, match="locked: is required and missing"):
        TrainerConfig()  # type: ignore[call-arg]


def test_a_flat_dict_is_taken_too(config: TrainerConfig) -> None:
    made = TrainerConfig.from_dict({**config.to_dict(), "hyperparams": {}, "epochs": 3, "batch_size": 2})
    assert (made.hyperparams.num_epochs, made.hyperparams.batch_size) == (3, 2)


def test_what_was_changed_inside_a_mapping_is_checked_before_use(config: TrainerConfig) -> None:
    config.environment.report_to.append("wandb")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"environment\.report_to"):
        config.checked()


def test_importing_it_loads_no_torch() -> None:
    code = (
        "import sys\nfrom lightning_trainer import TrainerConfig, ConfigLoader, create_default_config\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


INERT = {
    "data": {"augmentation": None},
    "model": {
        "device_map": "auto",
        "gradient_checkpointing": True,
        "freeze_vision_towers": False,
        "try_vision_model_first": False,
    },
    "environment": {"local_rank": -1, "world_size": 1, "deepspeed_config": None},
    "training_mode": "full",
    "lora": None,
    "galore": {},
    "fortune_teller": {"enabled": False},
}


def _with(config: TrainerConfig, extra: dict[str, Any]) -> dict[str, Any]:
    values = config.to_dict()
    for name, value in extra.items():
        values[name] = {**values[name], **value} if name in values else value
    return values


def test_retired_keys_at_their_inert_value_are_named_once(config: TrainerConfig) -> None:
    made = TrainerConfig.from_dict(_with(config, INERT))
    assert made.to_dict() == config.to_dict()
    assert len(made.retired_keys) == 12
    assert made.checked().retired_keys == made.retired_keys
    assert TrainerConfig.from_dict(made.to_dict()).retired_keys == ()


@pytest.mark.parametrize(
    ("extra", "way_out"),
    [
        ({"lora": {"r": 8}}, "model.lora"),
        ({"training_mode": "lora"}, "model.lora"),
        ({"galore": {"enabled": True}}, "galore"),
        ({"fortune_teller": {"enabled": True}}, "remove it"),
        ({"data": {"augmentation": {"p": 1}}}, "profiles"),
        ({"model": {"device_map": "cuda:1"}}, "trainer.strategy"),
        (
            {"model": {"gradient_checkpointing": True}, "hyperparams": {"use_gradient_checkpointing": False}},
            "hyperparams.use_gradient_checkpointing",
        ),
        ({"model": {"freeze_vision_towers": True}}, "vision towers"),
        ({"model": {"try_vision_model_first": True}}, "causal LMs"),
        ({"environment": {"deepspeed_config": "ds.json"}}, "trainer.strategy"),
        ({"environment": {"local_rank": 3}}, "trainer.devices"),
        ({"environment": {"world_size": 8}}, "trainer.devices"),
    ],
)
def test_a_retired_key_that_asks_for_something_is_refused(
    config: TrainerConfig, extra: dict[str, Any], way_out: str
) -> None:
    with pytest.raises(InputError, match=r"is no longer taken") as caught:
        TrainerConfig.from_dict(_with(config, extra))
    assert way_out in str(caught.value)
