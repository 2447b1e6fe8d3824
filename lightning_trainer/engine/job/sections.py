"""The sections of a TrainerConfig: fields, defaults, and what each value may be.

A value is checked when it is assigned. The defaults are those of earlier versions, whose JSON files these sections
read; `lowering` writes every one of them out, so that no other default shows through.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, computed_field, field_validator

from lightning_trainer.engine.job.faults import in_words, unknown_name
from lightning_trainer.profiles import EmojiThink, profile_class

Count = Annotated[int, Field(ge=1)]
PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
Name = Annotated[PathText, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown names.

    Raises:
        InputError: A value of another type, out of range or unknown, when made and at assignment.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, validate_default=True)
    key: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise in_words(error, type(self)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise in_words(error, type(self)) from error
        except AttributeError as error:  # a derived one
            raise unknown_name(type(self), name) from error


class Hyperparams(Section):
    """How the model is trained.

    Attributes:
        batch_size: Rows per device and micro-batch; with packing a row is one pack of max_length tokens.
        gradient_accumulation: Micro-batches per optimizer step.
        warmup_steps: Optimizer steps in which the rate rises to its peak.
        max_steps: Optimizer steps of the run; overrides num_epochs.
        max_length: Most tokens of a row.
        max_new_tokens: Most tokens of an answer of `predict`.
        fp_precision: The one dtype of weights, gradients and moments.
        save_steps: Optimizer steps between checkpoints.
        save_total_limit: Newest checkpoints kept.
        eval_steps: Optimizer steps between validations, where eval_strategy is `steps`.
    """

    key = "hyperparams"
    batch_size: Count = 1
    gradient_accumulation: Count = 16
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=100, ge=0)
    num_epochs: Count = 1
    max_steps: Count | None = None
    max_length: int = Field(default=2048, ge=2)
    max_new_tokens: Count = 2048
    fp_precision: Literal["fp16", "bf16", "fp32"] = "bf16"
    save_steps: Count = 1000
    save_total_limit: Count = 3
    eval_steps: Count = 500
    eval_strategy: Literal["steps", "epoch", "no"] = "no"
    use_gradient_checkpointing: bool = True

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated properties
    @property
    def effective_batch_size(self) -> int:
        """Rows per device and optimizer step: batch_size x gradient_accumulation."""
        return self.batch_size * self.gradient_accumulation


class Profile(Section):
    """How a row becomes a conversation.

    Attributes:
        name: emoji_think, regime3, plain, or the dotted path of a class of your own.
        options: Its constructor's arguments.
        system_prompt_template: May hold {date}; None: monitoring.system_prompt_base, but for regime3 and profiles of
            your own, which have theirs.
    """

    key = "profile"
    name: Name = "emoji_think"
    options: dict[str, Any] = Field(default_factory=dict)
    system_prompt_template: str | None = None

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if "." not in name:
            profile_class(name)
        return name


class Monitoring(Section):
    """What is seen of a run while it trains.

    Attributes:
        status_update_interval: Optimizer steps between updates of status.json.
        inference_interval: Optimizer steps between previews.
        num_eval_samples: Prompts previewed.
        validation_split: Share of the rows held out when there is no validation_dataset_path.
        validation_max_samples: Most rows held out that way.
        system_prompt_base: System prompt of emoji_think and plain where profile.system_prompt_template is None.
        max_output_samples: Newest previews kept in status.json.
        preview_max_tokens: Most tokens of a preview.
        preview_temperature: 0 is greedy.
    """

    key = "monitoring"
    status_update_interval: Count = 2
    inference_interval: Count = 50
    micro_eval_interval: Count = 200
    num_eval_samples: Count = 4
    num_micro_eval_samples: Count = 20
    validation_split: float = Field(default=0.05, ge=0, le=0.9)
    validation_max_samples: int = Field(default=500, ge=0)
    system_prompt_base: str = EmojiThink.system_prompt_template or ""
    enable_pattern_tracking: bool = True
    enable_layer_monitor: bool = False
    enable_evolution_tracker: bool = True
    enable_penalty_heatmap: bool = True
    max_output_samples: Count = 5
    prompt_snapshot_interval: Count = 20
    max_output_tokens: Count = 2048
    max_eval_tokens: Count = 2048
    preview_backend: Literal["local", "remote_3090"] = "local"
    preview_max_tokens: Count = 256
    preview_temperature: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    remote_3090_host: Name = "localhost"
    remote_3090_port: int = Field(default=8765, ge=1, le=65535)
    remote_3090_timeout: float = Field(default=30, gt=0, allow_inf_nan=False)
    remote_3090_model_id: str | None = None
    remote_3090_ca: PathText | None = None
    remote_3090_token_file: PathText | None = None


class Locked(Section):
    """What may not change while a model is trained on and on.

    Attributes:
        base_model: A name of the user's for what this model began as.
        model_architecture: Class of the model, such as Qwen3ForCausalLM.
        max_context_length: Most tokens the model is trained for; may shrink, never grow.
        vocab_size: Rows of the embedding.
        model_version: A name of the user's.
        created_at: For the reader; never compared.
    """

    key = "locked"
    base_model: Name
    model_architecture: Name
    max_context_length: Count
    vocab_size: Count
    model_version: str = "v1"
    created_at: str = ""


class Data(Section):
    """What is trained on.

    Attributes:
        dataset_path: JSONL, JSON or parquet file, or Hub id.
        shuffle: False keeps the order of the file.
        seed: Of everything random in the run.
        min_length: Shorter rows are dropped, in tokens.
        max_length_override: Takes the place of hyperparams.max_length.
        enable_packing: Several examples in a row, each attending within itself.
        packing_strategy: bfd: best fit, longest first.
    """

    key = "data"
    dataset_path: Name
    validation_dataset_path: Name | None = None
    shuffle: bool = True
    seed: int = Field(default=42, ge=0)
    min_length: int = Field(default=10, ge=0)
    max_length_override: int | None = Field(default=None, ge=2)
    enable_packing: bool = True
    packing_strategy: Literal["bfd"] = "bfd"


class Model(Section):
    """Which model.

    Attributes:
        tokenizer_path: None: the one at model_path.
        torch_dtype: None, or the dtype that hyperparams.fp_precision names.
        prefer_flash_attention: The fastest attention there is for packed rows; False: transformers' sdpa.
    """

    key = "model"
    model_path: Name
    tokenizer_path: Name | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    torch_dtype: str | None = None
    use_cache: bool = False
    prefer_flash_attention: bool = True


class Output(Section):
    """Where it goes.

    Attributes:
        logging_dir: Of TensorBoard; None: `tensorboard` in output_dir.
        resume_from_checkpoint: `last`, `auto`, or the path of a checkpoint.
        overwrite_output_dir: Move an old run in output_dir aside.
    """

    key = "output"
    output_dir: Name
    logging_dir: Name | None = None
    resume_from_checkpoint: Name | None = None
    overwrite_output_dir: bool = False
    save_safetensors: bool = True
    save_only_model: bool = False


def _tensorboard() -> list[Literal["tensorboard"]]:
    return ["tensorboard"]


class Environment(Section):
    """The machine, and what is left.

    Attributes:
        dataloader_num_workers: Processes that make batches ahead.
        dataloader_pin_memory: Batches in page-locked memory, where there is a GPU.
        report_to: ["tensorboard"], or [] for no curves.
        logging_steps: Optimizer steps between points of the curves.
        max_grad_norm: Gradients are clipped to this norm; 0: not at all.
    """

    key = "environment"
    dataloader_num_workers: int = Field(default=4, ge=0)
    dataloader_pin_memory: bool = True
    optimizer_type: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    report_to: list[Literal["tensorboard"]] = Field(default_factory=_tensorboard)
    logging_steps: Count = 10
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    nan_detection: bool = True
