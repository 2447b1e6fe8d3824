"""Learning-rate schedules by name, stepped once per optimizer step.

Each is a closed form of (step, total steps): a resumed run computes the same rate, and a rate changed in the YAML
takes effect at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

DEFAULT_WARMUP = 0.03


class StepSchedule(LRScheduler, ABC):
    """Warm-up, then what the subclass says.

    Args:
        optimizer: Its lr is the peak.
        warmup_steps: Optimizer steps in which the rate rises linearly to its peak; null: 3 % of the run.
        total_steps: Optimizer steps of the whole run; null: as many as the trainer will make.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int | None = None, total_steps: int | None = None) -> None:
        if warmup_steps is not None and warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {warmup_steps}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps}")
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        super().__init__(optimizer)

    def fit_to(self, steps: int) -> None:
        """Tell the length of the run, where the user did not set it."""
        self.total_steps = self.total_steps or steps
        self.apply()

    def apply(self) -> None:
        """Set the optimizer's rates to those of the present step."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            set_rate(group, rate)
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Rate of each parameter group at the present step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]

    def factor(self, step: int) -> float:
        """Share of the peak rate with which step `step + 1` is made."""
        total = self.total_steps or max(step + 1, 1)
        warmup = math.ceil(DEFAULT_WARMUP * total) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.decay(step - warmup, max(total - warmup, 1))

    @abstractmethod
    def decay(self, step: int, total: int) -> float:
        """Share of the peak rate, `step` steps after the warm-up of `total` that follow it."""

    def state_dict(self) -> dict[str, Any]:
        """The step alone: everything else is the user's to set."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved step."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self.apply()


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's rate; where it is a tensor, which compiled optimizers read, its value."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class WarmupConstant(StepSchedule):
    """Warm-up, then the peak rate for ever."""

    def decay(self, step: int, total: int) -> float:
        """1, always."""
        return 1.0


class WarmupCosine(StepSchedule):
    """Warm-up, then half a cosine down to `min_lr_ratio` of the peak.

    Args:
        optimizer: Its lr is the peak.
        warmup_steps: Optimizer steps in which the rate rises linearly to its peak; null: 3 % of the run.
        total_steps: Optimizer steps of the whole run; null: as many as the trainer will make.
        min_lr_ratio: Where the rate ends, as a share of the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        min_lr_ratio: float = 0.0,
    ) -> None:
        self.min_lr_ratio = min_lr_ratio
        super().__init__(optimizer, warmup_steps, total_steps)

    def decay(self, step: int, total: int) -> float:
        """Half a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine


class WarmupStableDecay(StepSchedule):
    """Warm-up, the peak rate, then a linear fall over the last part of the run (WSD).

    Args:
        optimizer: Its lr is the peak.
        warmup_steps: Optimizer steps in which the rate rises linearly to its peak; null: 3 % of the run.
        total_steps: Optimizer steps of the whole run; null: as many as the trainer will make.
        decay_fraction: Share of the steps after the warm-up over which the rate falls.
        min_lr_ratio: Where the rate ends, as a share of the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        decay_fraction: float = 0.2,
        min_lr_ratio: float = 0.0,
    ) -> None:
        if not 0 <= decay_fraction <= 1:
            raise ValueError(f"decay_fraction must lie in [0, 1], not {decay_fraction}")
        self.decay_fraction, self.min_lr_ratio = decay_fraction, min_lr_ratio
        super().__init__(optimizer, warmup_steps, total_steps)

    def decay(self, step: int, total: int) -> float:
        """1, then a line down."""
        falling = self.decay_fraction * total
        left = max(total - step, 0)
        share = 1.0 if left >= falling or not falling else left / falling
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * share
