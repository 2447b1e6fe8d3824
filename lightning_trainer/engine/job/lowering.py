"""From a job to the configuration that runs: every value of a TrainerConfig as the command line's keys."""

from __future__ import annotations

from typing import Any

from lightning_trainer.engine.job.sections import Locked
from lightning_trainer.engine.job.trainer_config import TrainerConfig
from lightning_trainer.profiles import EmojiThink, profile_class
from lightning_trainer.types import InputError

NOT_YET: tuple[str, ...] = (
    "monitoring.micro_eval_interval",
    "monitoring.num_micro_eval_samples",
    "monitoring.enable_pattern_tracking",
    "monitoring.enable_layer_monitor",
    "monitoring.enable_evolution_tracker",
    "monitoring.enable_penalty_heatmap",
    "monitoring.prompt_snapshot_interval",
    "monitoring.max_output_tokens",
    "monitoring.max_eval_tokens",
    "monitoring.remote_3090_timeout",
    "monitoring.remote_3090_model_id",
)
"""Fields whose feature is not built yet: kept in `to_dict`, without effect, named once at start."""

QUANTISED = "set it to false, or write the job as YAML (convert) and there model.quantization: {bits: 4} and model.lora"

PRECISIONS = {"bf16": "bf16-true", "fp16": "16-true", "fp32": "32-true"}

DTYPES = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16"), "fp32": ("fp32", "float32")}
"""How model.torch_dtype may name the dtype of a precision."""


def lower(config: TrainerConfig) -> dict[str, Any]:
    """The configuration of `fit` that this job is: nested, plain values, all of them written out.

    Raises:
        InputError: A value is invalid, contradicts another, or asks for what is not built; all such are named.
    """
    config = config.checked()
    _refuse(config)
    return {
        "seed_everything": config.data.seed,
        "description": config.description,
        "model": _model(config),
        "data": _data(config),
        "trainer": _trainer(config),
        "preview_backend": _preview_backend(config),
        "checkpoint": {
            "every_n_train_steps": config.hyperparams.save_steps,
            "keep_last": config.hyperparams.save_total_limit,
        },
        "validation": {
            "every_n_steps": None if config.hyperparams.eval_strategy == "epoch" else config.hyperparams.eval_steps
        },
        "prediction": {"max_new_tokens": config.hyperparams.max_new_tokens},
        "overwrite": config.output.overwrite_output_dir,
        "ckpt_path": config.output.resume_from_checkpoint,
    }


def remarks(config: TrainerConfig) -> list[str]:
    """What of the job has no effect, each in a line: said once at start, and by `convert`."""
    lines = []
    if config.retired_keys:
        lines.append(f"keys of earlier versions, without effect: {', '.join(config.retired_keys)}")
    return [*lines, f"not built yet, without effect: {', '.join(NOT_YET)}"]


def max_length(config: TrainerConfig) -> int:
    """Most tokens of a row: data.max_length_override, else hyperparams.max_length."""
    return config.data.max_length_override or config.hyperparams.max_length


def _model(config: TrainerConfig) -> dict[str, Any]:
    return {
        "pretrained": config.model.model_path,
        "tokenizer": config.model.tokenizer_path,
        "attn_implementation": "auto" if config.model.prefer_flash_attention else "sdpa",
        "gradient_checkpointing": config.hyperparams.use_gradient_checkpointing,
        "lora": None,
        "quantization": None,
        "optimizer": _optimizer(config),
        "lr_scheduler": {
            "class_path": "WarmupCosine",
            "init_args": {"warmup_steps": config.hyperparams.warmup_steps},
        },
        "locked": {name: getattr(config.locked, name) for name in Locked.model_fields},
    }


def _optimizer(config: TrainerConfig) -> dict[str, Any]:
    named = {"adamw": "CompensatedAdamW", "muon": "CompensatedMuon", "adamw_8bit": "torchao.optim.AdamW8bit"}
    kind = config.environment.optimizer_type
    arguments: dict[str, Any] = {"lr": config.hyperparams.learning_rate}
    if kind == "adamw_8bit":  # betas and decay as ours have them
        arguments |= {"betas": [0.9, 0.95], "weight_decay": 0.0}
        arguments["bf16_stochastic_round"] = config.hyperparams.fp_precision == "bf16"
    return {"class_path": named[kind], "init_args": arguments}


def _data(config: TrainerConfig) -> dict[str, Any]:
    return {
        "train_path": config.data.dataset_path,
        "val_path": config.data.validation_dataset_path,
        "val_fraction": config.monitoring.validation_split,
        "val_max_rows": config.monitoring.validation_max_samples,
        "profile": _profile(config),
        "system_prompt": _system_prompt(config),
        "max_length": max_length(config),
        "min_length": config.data.min_length,
        "batch_size": config.hyperparams.batch_size,
        "shuffle": config.data.shuffle,
        "packing": config.data.enable_packing,
        "num_workers": config.environment.dataloader_num_workers,
        "pin_memory": config.environment.dataloader_pin_memory,
    }


def _profile(config: TrainerConfig) -> dict[str, Any]:
    name = config.profile.name
    class_path = name if "." in name else profile_class(name).__name__
    return {"class_path": class_path, **({"init_args": config.profile.options} if config.profile.options else {})}


def _system_prompt(config: TrainerConfig) -> str | None:
    """The job's; else None, by which a profile takes its own; else the base, which is emoji_think's too."""
    name, given = config.profile.name, config.profile.system_prompt_template
    general = (None, EmojiThink.system_prompt_template)
    has_own = "." in name or profile_class(name).system_prompt_template not in general
    return given if given is not None or has_own else config.monitoring.system_prompt_base


def _trainer(config: TrainerConfig) -> dict[str, Any]:
    steps = config.hyperparams.max_steps
    return {
        "precision": PRECISIONS[config.hyperparams.fp_precision],
        "default_root_dir": config.output.output_dir,
        "max_epochs": config.hyperparams.num_epochs if steps is None else -1,
        "max_steps": -1 if steps is None else steps,
        "accumulate_grad_batches": config.hyperparams.gradient_accumulation,
        "gradient_clip_val": config.environment.max_grad_norm or None,
        "log_every_n_steps": config.environment.logging_steps,
        "limit_val_batches": 0 if config.hyperparams.eval_strategy == "no" else 1.0,
        "val_check_interval": 1.0,  # of an epoch, where validation.every_n_steps is null
        "check_val_every_n_epoch": 1,
        "logger": _logger(config),
        "callbacks": _callbacks(config),
    }


def _logger(config: TrainerConfig) -> Any:
    if not config.environment.report_to:
        return False
    directory = config.output.logging_dir
    return True if directory is None else {"class_path": "RunLogger", "init_args": {"directory": directory}}


def _preview_backend(config: TrainerConfig) -> dict[str, Any]:
    watched = config.monitoring
    if watched.preview_backend == "local":
        return {"class_path": "LocalPreviewBackend"}
    host = watched.remote_3090_host
    host = f"[{host}]" if ":" in host else host
    options: dict[str, Any] = {"address": f"{host}:{watched.remote_3090_port}"}
    options |= {"ca": watched.remote_3090_ca} if watched.remote_3090_ca else {}
    options |= {"token_file": watched.remote_3090_token_file} if watched.remote_3090_token_file else {}
    return {"class_path": "GrpcPreviewBackend", "init_args": options}


def _callbacks(config: TrainerConfig) -> list[dict[str, Any]]:
    watched = config.monitoring
    status = {"every_n_steps": watched.status_update_interval, "recent_examples": watched.max_output_samples}
    previews = {
        "every_n_steps": watched.inference_interval,
        "num_prompts": watched.num_eval_samples,
        "max_new_tokens": watched.preview_max_tokens,
        "temperature": watched.preview_temperature,
    }
    return [
        {"class_path": "PreviewCallback", "init_args": previews},
        {"class_path": "StatusFile", "init_args": status},
        {"class_path": "HuggingFaceExport"},
    ]


def _refuse(config: TrainerConfig) -> None:
    faults = [*_not_offered(config), *_contradictions(config)]
    if faults:
        raise InputError("\n".join(faults), key=faults[0].partition(":")[0])


def _not_offered(config: TrainerConfig) -> list[str]:
    asked = {
        "model.load_in_8bit": (config.model.load_in_8bit, f"a base of 8 bits is not offered; {QUANTISED}"),
        "model.load_in_4bit": (config.model.load_in_4bit, f"a job has no adapters to train on it; {QUANTISED}"),
        "model.use_cache": (
            config.model.use_cache,
            "with a cache packed examples would see each other: set it to false",
        ),
        "output.save_only_model": (
            config.output.save_only_model,
            "such a checkpoint cannot be resumed; the export is it",
        ),
        "output.save_safetensors": (not config.output.save_safetensors, "weights are written as safetensors only"),
        "environment.nan_detection": (not config.environment.nan_detection, "it cannot be switched off"),
        "environment.optimizer_type": (
            config.environment.optimizer_type != "adamw" and config.hyperparams.fp_precision == "fp16",
            "is not for fp16, in which squares of gradients are 0: take adamw, or fp_precision bf16",
        ),
    }
    values = config.to_dict()
    return [f"{key}: {_at(values, key)!r}: {why}" for key, (is_asked, why) in asked.items() if is_asked]


def _contradictions(config: TrainerConfig) -> list[str]:
    faults = []
    dtype, precision = config.model.torch_dtype, config.hyperparams.fp_precision
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES[precision]:
        faults.append(
            f"model.torch_dtype: {dtype!r} does not agree with hyperparams.fp_precision {precision!r}, which alone "
            "decides: set it to null"
        )
    if max_length(config) > config.locked.max_context_length:
        where = "data.max_length_override" if config.data.max_length_override else "hyperparams.max_length"
        faults.append(
            f"{where}: {max_length(config)} is more than locked.max_context_length {config.locked.max_context_length}"
        )
    return faults


def _at(values: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]
