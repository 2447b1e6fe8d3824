"""A step of CompensatedAdamW on a GPU, in Triton's language; imported where there is Triton."""
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

BLOCK = 1024


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """See `adamw_kernel.step`; nobody waits for `found_inf`."""
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


@triton.jit
def adamw(
    high_bits, low_bits, grads, exp_avgs, exp_avg_sqs, corrections, skip, numbers,
    beta1, one_less_beta1, beta2, one_less_beta2, eps, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of numbers of one parameter; weights as the 16 + 16 bits that `optim` shows."""
    if tl.load(skip) == 0.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < numbers
        high = tl.load(high_bits + places, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_bits + places, mask=inside, other=0).to(tl.int32)
        weight = ((high << 16) + low).to(tl.float32, bitcast=True)
        grad = tl.load(grads + places, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(exp_avgs + places, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(exp_avg_sqs + places, mask=inside, other=0.0).to(tl.float32)
        first = beta1 * first + one_less_beta1 * grad
        second = beta2 * second + one_less_beta2 * grad * grad
        rate, root = tl.load(corrections), tl.load(corrections + 1)
        weight = weight * decay - rate * first / (tl.sqrt(second) / root + eps)
        # One pattern for all that is no number: others could be rounded into one.
        bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), 0x7FC00000)
        high = (bits + 32768) >> 16
        tl.store(high_bits + places, high.to(tl.int16), mask=inside)
        tl.store(low_bits + places, (bits - (high << 16)).to(tl.int16), mask=inside)
        tl.store(exp_avgs + places, first.to(tl.bfloat16), mask=inside)
        tl.store(exp_avg_sqs + places, second.to(tl.bfloat16), mask=inside)
