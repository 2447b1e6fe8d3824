"""Whether an optimizer suits the run's one dtype."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_trainer.model.muon import CompensatedMuon
from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.types import InputError

KEY = "model.optimizer"


def loses_nothing(optimizer: Optimizer, dtype: torch.dtype) -> bool:
    """Whether small updates of weights of this dtype add up; on average suffices, which torchao's optimizers offer."""
    rounds_stochastically = bool(getattr(optimizer, "bf16_stochastic_round", False))
    return dtype == torch.float32 or isinstance(optimizer, CompensatedAdamW) or rounds_stochastically


def check_optimizer(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Refuse what cannot train in this dtype, and say what learns little.

    Args:
        dtype: Of the weights that are trained.

    Raises:
        InputError: The moments would be fp16.
    """
    name = type(optimizer).__name__
    keeps_fp32_moments = isinstance(optimizer, CompensatedAdamW) and not isinstance(optimizer, CompensatedMuon)
    if dtype == torch.float16 and not keeps_fp32_moments:
        raise InputError(
            f"{name} keeps fp16 moments under 16-true, in which squares of gradients are 0; take "
            "CompensatedAdamW (fp32 moments) or trainer.precision: bf16-true",
            key=KEY,
        )
    if not loses_nothing(optimizer, dtype):
        rank_zero_warn(
            f"{KEY}: {name} rounds bf16 weights to nearest: updates smaller than half a bf16 step are "
            "lost (four of five weights at lr 1e-5); CompensatedAdamW loses none"
        )
