"""Cross entropy over the trained tokens: the sum of nats, in fp32.

Two ways to the same number. `full` lets the model make its logits. `chunked` takes the hidden states of the trained
tokens to the output layer a chunk at a time and recomputes each chunk in the backward pass, so the (tokens, vocabulary)
logits never exist; it knows hidden states and one matrix only, so a model that does more to its logits takes `full`.

Shapes: N trained tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lightning_trainer.model.probe import evaluating, packed_inputs
from lightning_trainer.pretrained import embedding_rows

LossName = Literal["chunked", "full"]

CHUNK = 256
"""Tokens whose logits exist at once: 256 x 151,936 fp32 logits are 156 MB."""

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


def nats_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of nats.

    Args:
        logits: (N, V), of any float dtype.
        targets: (N,) int64.

    Returns:
        fp32 scalar.
    """
    # fp32: a bf16 log-softmax is off by up to 0.03 nats a token
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def nats_chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of nats without ever holding all logits.

    Args:
        hidden: (N, C).
        weight: (V, C), of the output layer.
        bias: (V,) or None.
        targets: (N,) int64.

    Returns:
        fp32 scalar; 0, with a gradient of zero, where N is 0.
    """
    if not len(targets):
        return hidden.sum().float() + weight.flatten()[:0].sum().float()
    if bias is None and hasattr(torch.nn, "LinearCrossEntropyOptions") and hasattr(F, "linear_cross_entropy"):
        return _linear_cross_entropy(hidden, weight, targets)
    total = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_chunk_nats, h, weight, bias, t, use_reentrant=False)
    return total


def _chunk_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return nats_from_logits(F.linear(hidden, weight, bias), targets)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch 2.13's own chunked loss.

    Its options by default run 3 to 5 times slower than full logits, and its own sum is rounded to the dtype of
    `hidden`: so the chunks are named and the tokens' nats are summed here.
    """
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=CHUNK, chunking_method=None, acc_policy="accurate", acc_dtype=torch.float32
    )
    nats = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    return nats.float().sum()


@torch.no_grad()
def evaluate_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64), a chunk of logits at a time."""
    nats, right = torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = F.linear(h, weight, bias)
        nats += nats_from_logits(logits, t)
        right += (logits.argmax(-1) == t).sum()
    return nats, right
