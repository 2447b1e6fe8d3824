"""How many updates rounding swallows, measured on a sample of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PER_TENSOR = 4096
"""Weights looked at in each tensor, spread over it: a few MB in all, whatever the model's size."""


class UpdateSample:
    """Some weights before an optimizer step, to be compared with themselves after it.

    What the optimizer keeps beside a weight counts as part of it (`exact_weight` of CompensatedAdamW).

    Args:
        optimizer: Its gradients are in place, its step is not yet made.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Any = optimizer
        params = (p for group in optimizer.param_groups for p in group["params"])
        self.places = [(p, slice(None, None, max(1, p.numel() // PER_TENSOR))) for p in params if p.grad is not None]
        self.asked = [p.grad.reshape(-1)[place] != 0 for p, place in self.places]
        self.before = self._weights()

    @torch.no_grad()
    def frozen_fraction(self) -> float:
        """Share of the weights with a gradient that are the same after the step as before it.

        Waits for the device.
        """
        same = [a.eq(b) & asked for a, b, asked in zip(self.before, self._weights(), self.asked, strict=True)]
        return _count(same) / max(_count(self.asked), 1)

    @torch.no_grad()
    def _weights(self) -> list[Tensor]:
        exact = getattr(self.optimizer, "exact_weight", None)
        if exact is not None:
            return [exact(p, place) for p, place in self.places]
        return [p.detach().reshape(-1)[place].clone() for p, place in self.places]


def _count(marks: list[Tensor]) -> int:
    """True ones among all; waits for each device once."""
    sums: dict[torch.device, list[Tensor]] = {}
    for mark in marks:
        sums.setdefault(mark.device, []).append(mark.sum())
    return sum(int(torch.stack(found).sum()) for found in sums.values())
