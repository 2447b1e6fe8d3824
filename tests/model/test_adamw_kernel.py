"""The kernel comes to what the passes come to; and it is asked for nothing it does not take.

Without a GPU it runs in Triton's interpreter, where Triton is installed.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_trainer.model import adamw_kernel
from lightning_trainer.model.optim import CompensatedAdamW, Piece, _both_ways

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")


def made(shape: tuple[int, ...], seed: int) -> nn.Parameter:
    rng = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(shape, generator=rng).to(DEVICE, torch.bfloat16))
    param.grad = torch.randn(shape, generator=rng).to(DEVICE, torch.bfloat16)
    return param


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_that_of_the_passes(weight_decay: float) -> None:
    group: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    shapes = [(7,), (1024,), (33, 65), (2, 2049)]
    ours, theirs = ([made(shape, seed) for seed, shape in enumerate(shapes)] for _ in range(2))
    kernel, passes = CompensatedAdamW(ours, **group), CompensatedAdamW(theirs, **group)
    passes.kernel = False
    for param in theirs:
        passes._state_of(param)
    for turn in range(4):
        for one, other in zip(ours, theirs, strict=True):
            # From where the passes have got to: the interpreter cuts moments off to bf16, a GPU rounds them.
            one.data.copy_(other.data)
            one.grad = other.grad = made(tuple(one.shape), turn).grad
            for name, value in passes.state[other].items():
                kernel._state_of(one)[name].copy_(value)
        adamw_kernel.step([Piece.of(param, kernel._state_of(param)) for param in ours], group)
        passes.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(kernel.exact_weight(one), passes.exact_weight(other), rtol=3e-7, atol=3e-8)
            torch.testing.assert_close(one.detach(), kernel.exact_weight(one).bfloat16(), rtol=2**-7, atol=0)
            torch.testing.assert_close(kernel.state[one]["step"], passes.state[other]["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(kernel.state[one][name], passes.state[other][name], rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("triton")
def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    param = made((50,), 0)
    optimizer, group = CompensatedAdamW([param]), {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    state = optimizer._state_of(param)
    adamw_kernel.step([Piece.of(param, state)], group)
    before = [tensor.clone() for tensor in (param.detach(), *state.values())]
    assert param.grad is not None
    param.grad[3] = float("nan")
    adamw_kernel.step([Piece.of(param, state)], group, torch.full((), 2.0, device=DEVICE))
    assert all(map(torch.equal, before, (param.detach(), *state.values())))


@pytest.mark.usefixtures("triton")
def test_it_is_tried_out_before_it_is_used() -> None:
    passes, kernel = _both_ways(DEVICE)
    torch.testing.assert_close(kernel, passes, rtol=1e-6, atol=1e-6)
    if DEVICE.type == "cuda":
        assert adamw_kernel.works_on(DEVICE, _both_ways)


# --- who is given to it


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Weights given to a kernel that takes whatever `fits` takes, and does nothing."""
    weights: list[Tensor] = []
    monkeypatch.setattr(adamw_kernel, "works_on", lambda device, reference: True)
    monkeypatch.setattr(
        adamw_kernel, "step", lambda pieces, group, found_inf: weights.extend(piece.weight for piece in pieces)
    )
    return weights


def test_plain_bf16_weights_are_given_to_the_kernel_and_others_are_not(taken: list[Tensor]) -> None:
    fits, wide, gaps = made((4, 4), 0), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4).bfloat16().t()[:2])
    other_grad = made((4,), 1)
    wide.grad, gaps.grad = torch.ones(4), torch.ones(2, 4).bfloat16()
    without = nn.Parameter(torch.ones(4).bfloat16())
    before = fits.detach().clone()
    CompensatedAdamW([fits, wide, gaps, without], lr=0.1).step()
    assert [tensor.data_ptr() for tensor in taken] == [fits.data_ptr()]
    assert torch.equal(fits, before)
    assert not torch.equal(wide, torch.ones(4))
    assert not torch.equal(gaps, torch.ones(2, 4).bfloat16())
    optimizer = CompensatedAdamW([other_grad], lr=0.1)
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
    optimizer.step()
    assert len(taken) == 1


def test_a_kernel_that_does_not_work_is_told_of_once_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def broken(device: torch.device) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        raise RuntimeError("no C compiler\nand more")

    device = torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        assert not adamw_kernel.works_on(device, broken)
        assert not adamw_kernel.works_on(device, broken)
    assert (calls, caplog.messages) == (
        1,
        ["CompensatedAdamW steps without its kernel, several times slower: no C compiler"],
    )
    assert not adamw_kernel.works_on(device, lambda device: (torch.ones(1), torch.zeros(1)))
    assert caplog.messages[1:] == [
        "CompensatedAdamW steps without its kernel, several times slower: on this device it comes to other numbers"
    ]
    assert not adamw_kernel.works_on(torch.device("cpu"), broken)
