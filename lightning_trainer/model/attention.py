"""Attention for packed rows: each example attends within itself, and no (T, T) mask is ever made.

Registered with transformers under `PACKED`. Only for packed training forwards: with its null mask a cached decode or a
padded batch would go wrong, so `generation.quiet` and unpacked rows use sdpa.

Shapes: B = 1 row, H query heads, K key/value heads, T tokens of the row, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "lightning_trainer_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    example_lengths: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of one packed row.

    Args:
        module: The attention layer.
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D).
        attention_mask: None; the registered mask function makes none.
        example_lengths: Tokens of each example, in order; they add up to T.
        scaling: Of the scores; None is 1/sqrt(D).
        dropout: Of the attention weights.
        sliding_window: Each token sees at most this many tokens, itself included.
        softcap: Refused: SDPA cannot bound its scores.
        s_aux: Refused: SDPA has no attention sinks.

    Returns:
        (1, T, H, D), as transformers' attention functions do, and no weights.

    Raises:
        ValueError: The model asks for what this attention cannot do.
    """
    if example_lengths is None or query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("packed attention takes one row with `example_lengths` and no mask")
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses {'attention sinks' if softcap is None else 'a score soft-cap'}")
    gqa = query.shape[1] != key.shape[1]
    lengths = list(example_lengths)
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
    return torch.cat(out, dim=2).transpose(1, 2), None


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """(T, T) bool mask of a sliding window, or None where the whole example fits into it."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def register() -> None:
    """Make `PACKED` a name that `attn_implementation` takes."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
