"""CompensatedMuon against torch's own Muon and AdamW."""

from typing import Any

import pytest
import torch

from lightning_trainer.model import CompensatedMuon

LR = 1e-3


def params_of(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (24, 8), "down": (8, 24), "norm": (8,), "embedding": (40, 8)}
    drawn = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {name: torch.nn.Parameter(value.to(dtype)) for name, value in drawn.items()}


def set_grads(params: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-2).to(p.dtype)


def ours(params: dict[str, torch.nn.Parameter], **more: Any) -> CompensatedMuon:
    optimizer = CompensatedMuon(list(params.values()), lr=LR, **more)
    optimizer.leave_to_adamw([params["embedding"]])
    return optimizer


def torchs(params: dict[str, torch.nn.Parameter], decay: float = 0.0) -> list[torch.optim.Optimizer]:
    matrices, rest = [params["up"], params["down"]], [params["norm"], params["embedding"]]
    return [
        torch.optim.Muon(matrices, lr=LR, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR, weight_decay=decay, betas=(0.9, 0.95), fused=True),
    ]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_is_torchs_muon_and_adamw(decay: float) -> None:
    mine, theirs = params_of(torch.float32), params_of(torch.float32)
    optimizer, references = ours(mine, weight_decay=decay), torchs(theirs, decay)
    for step in range(10):
        set_grads(mine, step)
        set_grads(theirs, step)
        optimizer.step()
        for reference in references:
            reference.step()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert {name: sorted(optimizer.state[p]) for name, p in mine.items()} == {
        "up": ["momentum_buffer"],
        "down": ["momentum_buffer"],
        "norm": ["exp_avg", "exp_avg_sq", "step"],
        "embedding": ["exp_avg", "exp_avg_sq", "step"],
    }


def test_bf16_weights_lose_no_update() -> None:
    """Muon in fp32 on the same bf16 gradients; its momentum is rounded to bf16 after every step, as ours is."""
    mine = params_of(torch.bfloat16)
    optimizer = CompensatedMuon(list(mine.values()), lr=1e-6)
    optimizer.leave_to_adamw([mine["embedding"]])
    exact = torch.nn.Parameter(mine["up"].detach().float())
    reference = torch.optim.Muon([exact], lr=1e-6, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    start = exact.detach().clone()
    for step in range(40):
        set_grads(mine, step)
        assert mine["up"].grad is not None
        exact.grad = mine["up"].grad.float()
        optimizer.step()
        reference.step()
        buffer = reference.state[exact]["momentum_buffer"]
        buffer.copy_(buffer.bfloat16())
    assert torch.equal(optimizer.exact_weight(mine["up"]), exact)
    assert (exact - start).abs().max() > 0
    assert mine["up"].dtype == optimizer.state[mine["up"]]["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    params = params_of(dtype)
    optimizer = ours(params)
    set_grads(params, 0)
    optimizer.step()
    before = [t.clone() for p in params.values() for t in (p.detach(), *optimizer.state[p].values())]
    set_grads(params, 1)
    for p in params.values():
        assert p.grad is not None
        p.grad[0] = float("nan")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [t for p in params.values() for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_saved_state_goes_on_bit_for_bit() -> None:
    one, two = params_of(torch.bfloat16), params_of(torch.bfloat16)
    first, second = ours(one), ours(two)
    for step in range(3):
        set_grads(one, step)
        first.step()
    for name in one:
        two[name].data.copy_(one[name])
    second.load_state_dict(first.state_dict())
    for params, optimizer in ((one, first), (two, second)):
        set_grads(params, 9)
        optimizer.step()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(
        torch.equal(first.state[one[name]][key], second.state[two[name]][key])
        for name in one
        for key in first.state[one[name]]
    )


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_that_makes_no_sense_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum must lie in"):
        CompensatedMuon([torch.nn.Parameter(torch.zeros(2, 2))], momentum=momentum)
