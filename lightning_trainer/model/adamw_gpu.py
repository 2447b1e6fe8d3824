"""A step of CompensatedAdamW on a GPU; imported where there is Triton.

One launch steps many parameters: a model of 0.6 billion has 310, of which each would cost the host a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_trainer.model.adamw_triton import adamw

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

BLOCK, PART = 1 << 10, 1 << 14
"""Elements that a program of the kernel computes at once, and in all."""

ALIGNMENT = 16
"""Of addresses, in bytes, and of a parameter's elements, from which eight numbers can be read at once."""


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """See `adamw_kernel.step`; nobody waits for `found_inf`."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    device = pieces[0].weight.device
    skip = torch.zeros((), dtype=torch.float32, device=device) if found_inf is None else found_inf
    steps = [piece.state["step"] for piece in pieces]
    if found_inf is None:
        torch._foreach_add_(steps, 1.0)
    else:
        torch._foreach_add_(steps, [(skip == 0).float()] * len(steps))
    count = torch.stack(steps).double()
    # Of each parameter, as many steps as it has taken: lr / (1 - beta1^n) and sqrt(1 - beta2^n).
    corrections = torch.stack((lr / (1 - beta1**count), (1 - beta2**count).sqrt()), dim=1).float()
    rows = [_row(piece) for piece in pieces]
    numels = tuple(row[-1] for row in rows)
    aligned = tuple(all(number % ALIGNMENT == 0 for number in row) for row in rows)
    tensors = torch.tensor(rows).to(device, non_blocking=True)  # gradients may lie elsewhere in every step
    with torch.cuda.device_of(pieces[0].weight):  # Triton starts kernels on the current device
        for fast in sorted(set(aligned)):
            parts = _parts(numels, tuple(each == fast for each in aligned), PART, device)
            adamw[(len(parts),)](
                tensors,
                corrections,
                parts,
                skip,
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                group["eps"],
                1 - lr * group["weight_decay"],
                PART=PART,
                BLOCK=BLOCK,
                ALIGNED=fast,
            )


def _row(piece: Piece) -> tuple[int, ...]:
    """Of the kernel's table of tensors."""
    weight, state = piece.weight, piece.state
    tensors = (weight, state["low_bits"], piece.grad, state["exp_avg"], state["exp_avg_sq"])
    return *(tensor.data_ptr() for tensor in tensors), weight.numel()


@lru_cache(maxsize=256)
def _parts(numels: tuple[int, ...], chosen: tuple[bool, ...], part: int, device: torch.device) -> Tensor:
    """The kernel's table of parts of the chosen parameters."""
    counts = torch.tensor([-(-n // part) if taken else 0 for n, taken in zip(numels, chosen, strict=True)])
    number = torch.arange(len(numels)).repeat_interleave(counts)
    first = torch.arange(len(number)) - (counts.cumsum(0) - counts)[number]
    return torch.stack((number, first * part), dim=1).to(device)
