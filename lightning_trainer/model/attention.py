"""Attention for packed rows: each example attends within itself, and no (T, T) mask is ever made.

On a GPU all examples go through one kernel for rows of unequal lengths (`varlen`); elsewhere, and where that kernel
cannot serve, each example through torch's SDPA.

Registered with transformers under `PACKED`. Only for packed training forwards: without a mask a cached decode or a
padded batch would go wrong, so `generation.quiet` and unpacked rows use sdpa.

Shapes: B = 1 row, H query heads, K key/value heads, T tokens of the row, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_trainer.model import varlen

PACKED = "lightning_trainer_packed"

CHANGES_SCORES = {
    "softcap": "a score soft-cap",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
"""Arguments by which a model asks for what SDPA alone does not do."""


class Examples:
    """How the examples of a packed row lie in it. A model's layers hand it on to their attention unseen.

    No tuple: torch.compile looks into those, and would compile a layer anew for each number of examples. So it would
    if what it compiles read `lengths`.

    Args:
        lengths: Tokens of each example, in order; they add up to T. On the host.
        starts: (N + 1,) int32, where each example begins, and T. On the device; None does without kernels.

    Attributes:
        longest: Tokens of the longest example.
    """

    def __init__(self, lengths: Sequence[int], starts: Tensor | None = None) -> None:
        self.lengths, self.starts = list(lengths), starts
        self.longest = max(lengths)


def packed_arguments(example_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a model's forward hands on to `packed_attention`, made once for all of its layers."""
    starts = torch.tensor([0, *accumulate(example_lengths)], dtype=torch.int32)
    # Copied without waiting for the device, which a blocking copy would.
    return {"examples": Examples(example_lengths, starts.to(device, non_blocking=True))}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    examples: Examples | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of one packed row.

    Args:
        module: The attention layer.
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D).
        attention_mask: None. transformers makes none for a name that has no mask function; with one that gives None it
            would read the positions first, and wait for the device.
        examples: How the row is laid out.
        scaling: Of the scores; None is 1/sqrt(D).
        dropout: Of the attention weights.
        sliding_window: Each token sees at most this many tokens, itself included.
        **others: What changes scores (a soft-cap, sinks, a position bias, …) is refused; the rest is not ours to read.

    Returns:
        (1, T, H, D), as transformers' attention functions do, and no weights.

    Raises:
        ValueError: The model asks for what this attention cannot do.
    """
    if examples is None:
        raise ValueError(f"this architecture does not hand `examples` on to {type(module).__name__}")
    _refuse_what_is_not_packed(query, attention_mask)
    _refuse_what_changes_scores(module, examples.longest, others)
    kernel = varlen.kernel_for(query, value, dropout)
    if kernel is not None and examples.starts is not None:
        return _all_at_once(kernel, query, key, value, examples, scaling, sliding_window), None
    return _one_by_one(query, key, value, examples.lengths, scaling, dropout, sliding_window), None


def _all_at_once(
    kernel: varlen.Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    examples: Examples,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """(1, T, H, D): all examples through one kernel."""
    assert examples.starts is not None
    packed = varlen.Rows(examples.starts, examples.longest, scaling, sliding_window)
    return kernel(query[0], key[0], value[0], packed)[None]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """(1, T, H, D): each example through SDPA."""
    gqa = query.shape[1] != key.shape[1]
    out = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=(mask := _window_mask(q, sliding_window)),
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=gqa,
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2)


def _refuse_what_is_not_packed(query: Tensor, attention_mask: Tensor | None) -> None:
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("packed attention takes one row and no mask")


def _refuse_what_changes_scores(module: nn.Module, longest: int, others: dict[str, Any]) -> None:
    for name, what in CHANGES_SCORES.items():
        if others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {what} ({name})")
    # Told to the mask alone, which here is none.
    chunk: Any = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    if chunk is not None and longest > chunk:
        raise ValueError(f"{type(module).__name__} attends in chunks of {chunk} tokens, an example has {longest}")


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """(T, T) bool mask of a sliding window, or None where the whole example fits into it."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def choose(config: PretrainedConfig, packed: bool) -> str | None:
    """The attention that suits an architecture; None is transformers' own choice, sdpa or else eager.

    Args:
        config: Of the model.
        packed: Rows hold several examples. Where the architecture cannot take `PACKED`, its own masks may still keep
            them apart, which the probe finds out.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    takes_ours = known is None or (known._supports_attention_backend and known._supports_sdpa)
    return PACKED if packed and takes_ours else None


def register(compiled: bool = False, kernel: varlen.Kernel | None = None) -> None:
    """Make `PACKED` a name that `attn_implementation` takes.

    Args:
        compiled: Layers are compiled.
        kernel: Of the device: torch.compile takes it into a layer's code, if it can. Else, and where the kernel does
            not serve, that code is in parts, between which attention is called as it is.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _for_compiled_layers(kernel) if compiled else packed_attention)


def _for_compiled_layers(kernel: varlen.Kernel | None) -> Callable[..., tuple[Tensor, None]]:
    as_it_is: Callable[..., tuple[Tensor, None]] = torch.compiler.disable(packed_attention)
    if kernel is None or not varlen.is_traceable(kernel):
        return as_it_is

    def traced(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        examples: Examples | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if examples is None or examples.starts is None or dropout or not varlen.takes(query, value):
            told = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **others}
            return as_it_is(module, query, key, value, attention_mask, examples=examples, **told)
        _refuse_what_is_not_packed(query, attention_mask)
        _refuse_what_changes_scores(module, examples.longest, others)
        # Without gaps, so that what torch.compile expects of the results does not depend on how a kernel lays them out.
        query, key, value = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value))
        return _all_at_once(kernel, query, key, value, examples, scaling, sliding_window), None

    return traced
