"""torch's attention for rows of unequal lengths, which runs on CUDA alone, on a CPU: forward and backward by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _rows(starts: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(heads, tokens, D) of each row, keys and values once for each query head."""
    heads = parts[0].shape[1]
    for first, last in pairwise(starts.tolist()):
        row = (part[first:last].transpose(0, 1).double() for part in parts)
        yield tuple(part.repeat_interleave(heads // len(part), 0) for part in row)


def _probabilities(query: Tensor, key: Tensor, scale: float, window: list[int]) -> Tensor:
    places = torch.arange(query.shape[1])
    distance = places[:, None] - places[None, :]
    left, right = (len(places) if side < 0 else side for side in window)
    hidden = (distance > left) | (-distance > right)
    return (query @ key.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, longest: int, __: int,
    is_causal: bool = False, scale: float | None = None, window_size: Any = None, *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lengths = starts.diff()
    assert (starts.dtype, int(lengths.max()), int(starts[-1])) == (torch.int32, longest, len(query))
    assert is_causal == (list(window_size) == [-1, 0])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = [_probabilities(q, k, scale, window_size) @ v for q, k, v in _rows(starts, query, key, value)]
    out = torch.cat(rows, 1).transpose(0, 1).to(query).contiguous()
    return out, out.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, _: Tensor,
    longest: int, __: int, is_causal: bool, rng_state: Tensor, scale: float | None = None, window_size: Any = None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made: list[list[Tensor]] = [[], [], []]
    for q, k, v, g in _rows(starts, query, key, value, grad):
        weights = _probabilities(q, k, scale, window_size)
        inner = g @ v.mT
        scores = weights * (inner - (inner * weights).sum(-1, keepdim=True)) * scale
        for rows, of_heads in zip(made, (scores @ k, scores.mT @ q, weights.mT @ g), strict=True):
            rows.append(of_heads)
    return tuple(  # type: ignore[return-value]
        torch.cat(rows, 1).view(part.shape[1], -1, *part.shape[::2]).sum(1).transpose(0, 1).to(part).contiguous()
        for rows, part in zip(made, (query, key, value), strict=True)
    )


def install() -> None:
    """Let the operators that torch defines take tensors of a CPU."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
