"""A step of CompensatedAdamW on a GPU; imported where there is Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_trainer.model.adamw_triton import adamw

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

BLOCK = 1024


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """See `adamw_kernel.step`; nobody waits for `found_inf`."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    device = pieces[0].weight.device
    skip = torch.zeros((), dtype=torch.float32, device=device) if found_inf is None else found_inf
    steps = [piece.state["step"] for piece in pieces]
    torch._foreach_add_(steps, (skip == 0).float())
    count = torch.stack(steps).double()
    # Of each parameter, as many steps as it has taken: lr / (1 - beta1^n) and sqrt(1 - beta2^n). Twice: Triton makes
    # another kernel for pointers that are no multiples of 16 bytes.
    corrections = torch.stack((lr / (1 - beta1**count), (1 - beta2**count).sqrt()) * 2, dim=1).float()
    with torch.cuda.device_of(pieces[0].weight):  # Triton starts kernels on the current device
        for number, piece in enumerate(pieces):
            numel = piece.weight.numel()
            adamw[((numel + BLOCK - 1) // BLOCK,)](
                piece.weight.view(torch.int16),
                piece.state["low_bits"],
                piece.grad,
                piece.state["exp_avg"],
                piece.state["exp_avg_sq"],
                corrections[number],
                skip,
                numel,
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                group["eps"],
                1 - lr * group["weight_decay"],
                BLOCK=BLOCK,
            )
