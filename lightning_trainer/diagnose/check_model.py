"""The model of a run, built without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from lightning_trainer import adapters, pretrained
from lightning_trainer.model import CausalLMModule, attention
from lightning_trainer.model.objective import LossName, changed_logits
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class ModelFacts:
    """The model as a run would train it.

    Attributes:
        parameters: Tied weights counted once.
        adapters: What is trained beside the frozen model, or empty.
        quantized: Whether the frozen model is packed into 4 bits.
        loss: The one that will be used.
        why_full: Why it is not the chunked one that was asked for, or empty.
        positions: Tokens the architecture is made for; None where it does not say.
        embedding_rows: Token ids lie below it.
        vocabulary: Tokens of the tokenizer.
        has_weights: False where the directory holds none.
    """

    name: str
    parameters: int
    trainable: int
    frozen: int
    adapters: str
    quantized: bool
    precision: str
    dtype: str
    attention: str
    loss: LossName
    why_full: str
    gradient_checkpointing: bool
    compiled: bool
    positions: int | None
    embedding_rows: int
    vocabulary: int
    from_scratch: bool
    has_weights: bool


def run_dtype(trainer: Trainer) -> torch.dtype:
    """The run's one dtype.

    Raises:
        InputError: The Trainer has another precision plugin than ours.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, SingleDtypePrecision):
        raise InputError(
            f"the Trainer's precision plugin is {type(plugin).__name__}; give it SingleDtypePrecision",
            key="trainer.precision",
        )
    return plugin.dtype


def empty_model(module: CausalLMModule, dtype: torch.dtype, packing: bool) -> PreTrainedModel:
    """The model on the meta device, adapters included: shapes and dtypes of its weights, not one number.

    Raises:
        InputError: There is no configuration, it takes no such attention, or no such adapters.
    """
    attention.register()
    with torch.device("meta"):
        model = pretrained.load_model(
            module.pretrained, dtype, from_scratch=True, attn_implementation=module.attention(packing)
        )
        if module.lora is not None:
            adapters.put_in(model, module.lora, module.pretrained)
    return model


def base_model(module: CausalLMModule, dtype: torch.dtype) -> PreTrainedModel:
    """The model that adapters lie on, with its weights, on the CPU."""
    return pretrained.load_model(module.pretrained, dtype)


def model_facts(module: CausalLMModule, model: PreTrainedModel, trainer: Trainer) -> ModelFacts:
    """What `empty_model` shows."""
    config: Any = model.config.get_text_config()
    trainable, total = pretrained.count_parameters(model)
    why_full = (changed_logits(model) or "") if module.objective.name == "chunked" else ""
    return ModelFacts(
        name=type(model).__name__,
        parameters=total,
        trainable=trainable,
        frozen=total - trainable,
        adapters="" if module.lora is None else str(module.lora),
        quantized=module.quantization is not None,
        precision=str(trainer.precision_plugin.precision),
        dtype=str(run_dtype(trainer)).removeprefix("torch."),
        attention=str(config._attn_implementation),
        loss="full" if why_full else module.objective.name,
        why_full=why_full,
        gradient_checkpointing=module.gradient_checkpointing,
        compiled=module.compiles,
        positions=getattr(config, "max_position_embeddings", None),
        embedding_rows=pretrained.embedding_rows(model),
        vocabulary=len(module.tokenizer),
        from_scratch=module.from_scratch,
        has_weights=_has_weights(module.pretrained),
    )


def _has_weights(name: str) -> bool:
    folder = Path(name).expanduser()
    return not folder.is_dir() or any(found for pattern in WEIGHTS for found in folder.glob(pattern))
