"""The share of frozen updates, against a count over all weights."""

from typing import Any

import pytest
import torch

from lightning_trainer.model.frozen import UpdateSample
from lightning_trainer.model.optim import CompensatedAdamW


def _step(make: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Sampled share, and the share over all weights, of one step at lr 1e-5."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 100, generator=generator).mul_(0.02).to(dtype))
    optimizer = make([weight])
    weight.grad = torch.randn(300, 100, generator=generator).to(dtype)
    before = weight.detach().clone()
    sample = UpdateSample(optimizer)
    optimizer.step()
    return sample.frozen_fraction(), float((weight == before).float().mean())


def test_plain_bf16_loses_four_of_five_updates_at_1e_5() -> None:
    sampled, counted = _step(lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0), torch.bfloat16)
    assert counted == pytest.approx(0.84, abs=0.02)
    assert sampled == pytest.approx(counted, abs=0.02)


def test_compensated_bf16_and_fp32_lose_none() -> None:
    assert _step(lambda p: CompensatedAdamW(p, lr=1e-5), torch.bfloat16)[0] == 0.0
    assert _step(lambda p: torch.optim.AdamW(p, lr=1e-5), torch.float32)[0] == 0.0


def test_weights_without_a_gradient_do_not_count() -> None:
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([1.0, 1e-6, 0, 0, 0, 0, 0, 0], dtype=torch.bfloat16)
    sample = UpdateSample(optimizer)
    optimizer.step()
    assert sample.frozen_fraction() == 0.5  # 1 - 1 moves, 1 - 1e-6 does not
