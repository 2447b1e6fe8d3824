"""What is minimised: the nats of a batch's trained tokens, by one of two ways to the same number.

`full` lets the model make its logits. `chunked` takes hidden states and the output layer's matrix; it knows no more, so
a model that does more to its logits takes `full`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model.loss import LogitsBuffer, evaluate, evaluate_chunked, nats_chunked, nats_from_logits
from lightning_trainer.model.probe import evaluating, packed_inputs
from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import Batch

LossName = Literal["chunked", "full"]

TRANSFORMS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Names by which configurations say that logits are changed; a soft-cap does not show at small logits."""


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Why `chunked` would not be this model's loss, or None where it is.

    Besides the names we know, the model itself is asked: its logits for a few tokens must be its output layer applied
    to its hidden states.
    """
    said = changed_logits(model)
    if said is not None:
        return said
    head = output_layer(model)
    inputs = packed_inputs(model, [torch.arange(8) * 7 % embedding_rows(model)])
    with evaluating(model), torch.no_grad():
        hidden = getattr(model.base_model(**inputs), "last_hidden_state", None)
        if hidden is None:
            return f"{type(model.base_model).__name__} gives no hidden states"
        logits, made = model(**inputs).logits.float(), head(hidden).float()
    if logits.shape != made.shape or not (logits - made).abs().max() <= 1e-3 * logits.abs().max():
        return "its logits are not its output layer applied to its hidden states"
    return None


def output_layer(model: PreTrainedModel) -> Any:
    """The layer that makes the logits; its trained copy, where peft keeps one (model.lora.modules_to_save)."""
    head: Any = model.get_output_embeddings()
    copies: Any = getattr(head, "modules_to_save", None)
    return head if copies is None else next(iter(copies.values()))


def changed_logits(model: PreTrainedModel) -> str | None:
    """What its class and configuration alone say against `chunked`, or None; no weight is looked at."""
    head = output_layer(model)
    if hasattr(head, "base_layer"):
        return "its output layer has an adapter"
    if not isinstance(head, torch.nn.Linear):
        return f"its output layer is {type(head).__name__}, not Linear"
    config = model.config.get_text_config()
    changed = [name for name in TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)]
    return f"it changes its logits ({changed[0]}={getattr(config, changed[0])})" if changed else None


class Objective:
    """The loss of a model's batches.

    Args:
        name: Which way to take.

    Attributes:
        name: Which way is taken: full, once `settle` has fallen back to it.
    """

    def __init__(self, name: LossName) -> None:
        self.name = name
        self._is_settled = False
        self._buffer = LogitsBuffer()

    def settle(self, model: PreTrainedModel) -> None:
        """Take `full`, with a warning, where the model cannot take `chunked`; asked once."""
        why = why_not_chunked(model) if self.name == "chunked" and not self._is_settled else None
        if why is not None:
            rank_zero_warn(f"model.loss: {type(model).__name__} takes full instead of chunked: {why}")
            self.name = "full"
        self._is_settled = True

    def nats(self, model: PreTrainedModel, inputs: dict[str, Any], batch: Batch, expected: float) -> Tensor:
        """Sum of nats over the trained tokens; fp32 scalar.

        Args:
            model: A causal LM.
            inputs: Its arguments for the batch.
            batch: Rows, with the places and targets of their trained tokens.
            expected: What the gradient of the sum will be, about.
        """
        if self.name == "full":
            return nats_from_logits(_logits(model, inputs, batch), batch.targets)
        return nats_chunked(*_output_product(model, inputs, batch), batch.targets, expected, self._buffer)

    def evaluate(self, model: PreTrainedModel, inputs: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of nats (fp32) and count of tokens guessed right (int64); arguments as of `nats`."""
        if self.name == "full":
            return evaluate(_logits(model, inputs, batch), batch.targets)
        return evaluate_chunked(*_output_product(model, inputs, batch), batch.targets, self._buffer)


def _logits(model: PreTrainedModel, inputs: dict[str, Any], batch: Batch) -> Tensor:
    """(N, V) of the trained tokens."""
    logits: Tensor = model(**inputs).logits
    return logits.flatten(0, 1)[batch.predict_at]


def _output_product(
    model: PreTrainedModel, inputs: dict[str, Any], batch: Batch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, C) hidden states that predict the trained tokens; weight and bias of the output layer."""
    head, hidden = output_layer(model), model.base_model(**inputs).last_hidden_state
    return hidden.flatten(0, 1)[batch.predict_at], head.weight, head.bias
