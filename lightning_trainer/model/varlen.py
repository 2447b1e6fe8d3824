"""Kernels that take rows of unequal lengths, laid end to end, in one launch: flash attention, of torch or flash-attn.

They compute in 16 bits, on CUDA devices from Ampere on, with heads of some sizes. Where one of these does not suit a
run, None says so. They add gradients up in no fixed order, except in a run that is to be deterministic.

Shapes: T tokens of all rows, H query heads, K key/value heads, D head dimension, N rows.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
"""Of the device: Ampere."""

DTYPES = (torch.bfloat16, torch.float16)


def takes_heads_of(numbers: int) -> bool:
    """Whether heads of so many numbers are taken, backward included, on every device; none is padded here."""
    return numbers % 8 == 0 and numbers <= 256 and not 192 < numbers <= 224


class Rows(NamedTuple):  # which torch.compile looks through
    """How the tokens are laid out, and what they see of each other.

    Attributes:
        starts: (N + 1,) int32 on the device.
        longest: Tokens of the longest row.
        scaling: Of the scores; None is 1/sqrt(D).
        window: Tokens that each token sees at most, itself included; None: all before it. Kernels find out themselves
            that a window is longer than all rows; asked here, it would be another compilation.
    """

    starts: Tensor
    longest: int
    scaling: float | None
    window: int | None

    @property
    def left_right(self) -> tuple[int, int]:
        """Tokens seen to the left and right of each, besides itself; -1 is all."""
        return (-1 if self.window is None else self.window - 1, 0)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether queries, (…, D), and values, (…, D), are of a dtype and size that all kernels take."""
    return query.dtype in DTYPES and query.shape[-1] == value.shape[-1] and takes_heads_of(query.shape[-1])


Kernel = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
"""(H, T, D), (K, T, D), (K, T, D), how they are laid out -> (T, H, D). Causal within each row."""


def kernel_for(query: Tensor, value: Tensor, dropout: float) -> Kernel | None:
    """The kernel that can serve, or None.

    Args:
        query: (1, H, T, D).
        value: (1, K, T, D).
        dropout: Of the attention weights.
    """
    if dropout or not takes(query, value):  # dropout knows flash-attn alone, whose random numbers no checkpoint holds
        return None
    return kernel_on(query.device)


def kernel_on(device: torch.device) -> Kernel | None:
    """The kernel of a device, or None."""
    return _kernel() if device.type == "cuda" and _capability(device) >= LEAST_CAPABILITY else None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _kernel() -> Kernel | None:
    """torch's own, where it has what is needed; else flash-attn's, where it is installed."""
    # Of its first versions torch's has not, and is not causal.
    arguments = _torchs_arguments()
    if {"window_size", "scale"} <= arguments and torch.backends.cuda.is_flash_attention_available():
        return _torchs if "enable_gqa" in arguments else _older_torchs
    return _flash_attns if importlib.util.find_spec("flash_attn") is not None else None


@cache
def _torchs_arguments() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def is_traceable(kernel: Kernel) -> bool:
    """Whether torch.compile takes the kernel into the code of a layer."""
    return kernel in (_torchs, _older_torchs)


def _torchs(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    return _varlen_attn(query, key, value, rows, enable_gqa=query.shape[0] != key.shape[0])


def _older_torchs(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    times = query.shape[0] // key.shape[0]
    # Where tokens come first they are laid out as the kernel reads them.
    key, value = (part.transpose(0, 1).repeat_interleave(times, dim=1).transpose(0, 1) for part in (key, value))
    return _varlen_attn(query, key, value, rows)


def _varlen_attn(query: Tensor, key: Tensor, value: Tensor, rows: Rows, **grouped: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Without a window every token would see all of its row.
    window: Any = rows.left_right
    out: Any = varlen_attn(*_laid_out(query, key, value, rows), scale=rows.scaling, window_size=window, **grouped)
    return out  # type: ignore[no-any-return]


def _flash_attns(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Any = flash_attn_varlen_func(
        *_laid_out(query, key, value, rows),
        softmax_scale=rows.scaling,
        causal=True,
        window_size=rows.left_right,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # torch's own looks for itself
    )
    return out  # type: ignore[no-any-return]


def _laid_out(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> tuple[Any, ...]:
    """What both kernels take first: (T, H, D), (T, K, D), (T, K, D), and of queries and of keys starts and lengths."""
    tokens_first = (part.transpose(0, 1) for part in (query, key, value))
    return (*tokens_first, rows.starts, rows.starts, rows.longest, rows.longest)
