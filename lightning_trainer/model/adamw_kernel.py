"""Which kernel makes a step of CompensatedAdamW: one pass, in which each number is read and written once at most.

In torch the same takes some fifteen passes over the memory. A GPU's kernel is in Triton, which comes with torch's
builds for GPUs; a CPU's is in C. Where Triton or a compiler is missing or does not work, which is tried out on the
device before the first step, those passes are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lightning_trainer.model import adamw_cpu

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

log = logging.getLogger(__name__)

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors whose numbers lie where they say."""

Step = Callable[["Sequence[Piece]", dict[str, Any], Tensor | None], None]


def fits(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether the kernel takes this parameter: plain bf16 tensors of one shape without gaps, on one device."""
    grad, low_bits = param.grad, state.get("low_bits")
    if grad is None or low_bits is None or grad.layout != torch.strided or low_bits.dtype != torch.int16:
        return False
    first, second = state["exp_avg"], state["exp_avg_sq"]
    # Written out: this is asked for every parameter in every step.
    return (
        type(param) in PLAIN
        and not isinstance(group["lr"], Tensor)
        and param.dtype == grad.dtype == first.dtype == second.dtype == torch.bfloat16
        and param.shape == grad.shape == low_bits.shape == first.shape == second.shape
        and param.device == grad.device == low_bits.device == first.device == second.device
        and param.is_contiguous()
        and grad.is_contiguous()
        and low_bits.is_contiguous()
        and first.is_contiguous()
        and second.is_contiguous()
    )


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None = None) -> None:
    """One step of bf16 weights, in place.

    Args:
        pieces: Weights, gradients and states that `fits` takes, all on one device.
        group: `lr`, `betas`, `eps`, `weight_decay`.
        found_inf: Other than 0 where nothing may change; on the device.
    """
    _step_on(pieces[0].weight.device)(pieces, group, found_inf)
    increment_version([piece.weight for piece in pieces])  # autograd does not see what a kernel writes


def _step_on(device: torch.device) -> Step:
    if device.type == "cpu":
        return adamw_cpu.step
    from lightning_trainer.model import adamw_gpu  # only where there is Triton

    return adamw_gpu.step


@lru_cache(maxsize=8)
def works_on(device: torch.device, reference: Callable[[torch.device], tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernel can be used on a device, and comes to what the passes come to.

    Args:
        device: Of the parameters.
        reference: Gives the exact fp32 weights after a step on the device, by the passes and by the kernel.
    """
    if device.type not in ("cpu", "cuda"):
        return False
    try:
        passes, kernel = reference(device)
        same = bool(torch.isclose(kernel, passes, rtol=1e-6, atol=1e-6).all())
        reason = "" if same else "it comes to other numbers"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler, a device it does not know: the passes take its place
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        log.warning("CompensatedAdamW steps on %s without its kernel, several times slower: %s", device, reason)
    return not reason
