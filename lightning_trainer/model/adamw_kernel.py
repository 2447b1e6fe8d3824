"""One kernel for a step of CompensatedAdamW on a GPU: every number is read once and written once.

In torch the same takes some fifteen passes over the memory. Triton comes with torch's builds for GPUs; where it is
missing or does not work, which is tried out on the device before the first step, those passes are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

log = logging.getLogger(__name__)

BLOCK = 1024


def fits(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether the kernel takes this parameter: plain bf16 tensors without gaps."""
    grad = param.grad
    assert grad is not None
    tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"], state["low_bits"]) if "low_bits" in state else ()
    return (
        len(tensors) > 0
        and not isinstance(group["lr"], Tensor)
        and type(param.data) is Tensor
        and grad.dtype == param.dtype
        and not grad.is_sparse
        and all(tensor.is_contiguous() for tensor in tensors)
    )


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None = None) -> None:
    """One step of bf16 weights, in place.

    Args:
        pieces: Weights, gradients and states that `fits` takes, all on one device.
        group: `lr`, `betas`, `eps`, `weight_decay`.
        found_inf: Other than 0 where nothing may change; on the device, so that nobody waits for it.
    """
    from lightning_trainer.model.adamw_triton import adamw  # only where there is Triton

    (beta1, beta2), lr = group["betas"], group["lr"]
    device = pieces[0].weight.device
    skip = torch.zeros((), device=device) if found_inf is None else found_inf
    steps = [piece.state["step"] for piece in pieces]
    torch._foreach_add_(steps, (skip == 0).float())
    count = torch.stack(steps).double()
    # Of each parameter, as many steps as it has taken: lr / (1 - beta1^n) and sqrt(1 - beta2^n).
    corrections = torch.stack((lr / (1 - beta1**count), (1 - beta2**count).sqrt()), dim=1).float()
    for place, piece in enumerate(pieces):
        numbers = piece.weight.numel()
        adamw[((numbers + BLOCK - 1) // BLOCK,)](
            piece.weight.view(torch.int16),
            piece.state["low_bits"],
            piece.grad,
            piece.state["exp_avg"],
            piece.state["exp_avg_sq"],
            corrections[place],
            skip,
            numbers,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            group["eps"],
            1 - lr * group["weight_decay"],
            BLOCK=BLOCK,
        )


@lru_cache(maxsize=8)
def works_on(device: torch.device, reference: Callable[[torch.device], tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernel can be used on a device, and comes to what the passes come to.

    Args:
        reference: Gives the exact fp32 weights after a step on the device, by the passes and by the kernel.
    """
    if device.type != "cuda":
        return False
    try:
        passes, kernel = reference(device)
        same = bool(torch.isclose(kernel, passes, rtol=1e-6, atol=1e-6).all())
        reason = "" if same else "on this device it comes to other numbers"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton is not there, finds no compiler, does not know the device: never a run's end
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        log.warning("CompensatedAdamW steps without its kernel, several times slower: %s", reason)
    return not reason
