"""The kernels come to what the passes come to; and they are asked for nothing they do not take.

Without a GPU Triton's runs in Triton's interpreter, where Triton is installed.
"""

import importlib
import logging
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_trainer.model import adamw_cpu, adamw_kernel
from lightning_trainer.model.optim import CompensatedAdamW, Piece, _both_ways

CPU = torch.device("cpu")
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILER = next(filter(None, map(shutil.which, adamw_cpu.COMPILERS)), None)
GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

Step = Callable[..., None]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(params=[pytest.param("c", marks=needs_compiler), pytest.param("triton", marks=pytest.mark.gpu)])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Step, torch.device]:
    """A kernel's step, and a device it runs on."""
    if request.param == "c":
        return adamw_cpu.step, CPU
    if GPU.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    gpu: Any = importlib.import_module("lightning_trainer.model.adamw_gpu")
    monkeypatch.setattr(gpu, "PART", 2048)  # two blocks; some parameters have several
    return gpu.step, GPU


def made(shape: tuple[int, ...], seed: int, device: torch.device = CPU) -> nn.Parameter:
    rng = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(shape, generator=rng).to(device, torch.bfloat16))
    param.grad = torch.randn(shape, generator=rng).to(device, torch.bfloat16)
    return param


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_that_of_the_passes(weight_decay: float, kernel: tuple[Step, torch.device]) -> None:
    step, device = kernel
    group = GROUP | {"weight_decay": weight_decay}
    shapes = [(7,), (1024,), (33, 65), (2, 2049), (50, 64)]
    ours, theirs = ([made(shape, seed, device) for seed, shape in enumerate(shapes)] for _ in range(2))
    one_pass, passes = CompensatedAdamW(ours, **group), CompensatedAdamW(theirs, **group)
    passes.kernel = False
    for param in theirs:
        passes._state_of(param)
    for turn in range(4):
        for one, other in zip(ours, theirs, strict=True):
            # From where the passes have got to: the interpreter cuts moments off to bf16, others round them.
            one.data.copy_(other.data)
            one.grad = other.grad = made(tuple(one.shape), turn, device).grad
            for name, value in passes.state[other].items():
                one_pass._state_of(one)[name].copy_(value)
        step([Piece.of(param, one_pass._state_of(param)) for param in ours], group, None)
        passes.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one_pass.exact_weight(one), passes.exact_weight(other), rtol=3e-7, atol=3e-8)
            torch.testing.assert_close(one.detach(), one_pass.exact_weight(one).bfloat16(), rtol=2**-7, atol=0)
            torch.testing.assert_close(one_pass.state[one]["step"], passes.state[other]["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(one_pass.state[one][name], passes.state[other][name], rtol=2**-7, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing_where_that_is_found(kernel: tuple[Step, torch.device]) -> None:
    step, device = kernel
    param = made((50,), 0, device)
    state = CompensatedAdamW([param])._state_of(param)
    step([Piece.of(param, state)], GROUP, None)
    before = [tensor.clone() for tensor in (param.detach(), *state.values())]
    assert param.grad is not None
    param.grad[3] = float("nan")
    step([Piece.of(param, state)], GROUP, torch.full((), 2.0, device=device))
    assert all(map(torch.equal, before, (param.detach(), *state.values())))


def test_nan_stays_nan(kernel: tuple[Step, torch.device]) -> None:
    step, device = kernel
    param = made((50,), 0, device)
    optimizer = CompensatedAdamW([param])
    state = optimizer._state_of(param)
    assert param.grad is not None
    param.grad[3] = float("nan")
    # 0x7FFFFFFF and 0xFFFFFFFF: what a GPU's arithmetic gives for NaN would carry into the sign.
    param.data.view(torch.int16)[4:6], state["low_bits"][4:6] = torch.tensor([-(1 << 15), 0]), -1
    for _ in range(2):
        step([Piece.of(param, state)], GROUP, None)
        for numbers in (param.detach(), optimizer.exact_weight(param)):
            assert numbers.isnan().nonzero().flatten().tolist() == [3, 4, 5]
        assert state["exp_avg"].isnan().nonzero().flatten().tolist() == [3]


@needs_compiler
@pytest.mark.gpu
@pytest.mark.parametrize("device", sorted({CPU.type, GPU.type}))
def test_the_trial_passes_where_the_kernel_works(device: str) -> None:
    passes, kernel = _both_ways(torch.device(device))
    torch.testing.assert_close(kernel, passes, rtol=1e-6, atol=1e-6)
    assert adamw_kernel.works_on(torch.device(device), _both_ways)


def test_autograd_sees_that_weights_have_changed() -> None:
    param = made((4,), 0)
    loss = (param * param).sum()
    CompensatedAdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- C


@needs_compiler
@pytest.mark.parametrize("elements_per_call", [100, 1 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_bit_is_that_of_the_formula(
    threads: int, elements_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw_cpu, "ELEMENTS_PER_CALL", elements_per_call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    param = made((1050,), 0)
    optimizer = CompensatedAdamW([param], **GROUP)
    start = param.detach().float().numpy()
    weight, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    beta1, less1, beta2, less2, eps, decay = map(np.float32, (0.9, 1 - 0.9, 0.95, 1 - 0.95, 1e-8, 1 - 1e-2 * 0.1))
    for turn in range(1, 11):
        param.grad = made((1050,), turn).grad
        assert param.grad is not None
        grad = param.grad.float().numpy()
        first, second = beta1 * first + less1 * grad, beta2 * second + less2 * grad * grad
        rate, root = np.float32(1e-2 / (1 - 0.9**turn)), np.float32((1 - 0.95**turn) ** 0.5)
        weight = weight * decay - rate * first / (np.sqrt(second) / root + eps)
        first, second = (torch.from_numpy(x).bfloat16().float().numpy() for x in (first, second))
        optimizer.step()
        assert np.array_equal(optimizer.exact_weight(param).numpy(), weight)
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            assert np.array_equal(optimizer.state[param][name].float().numpy(), moment)


@needs_compiler
def test_what_goes_wrong_in_a_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(adamw_cpu, "kernel", lambda: broken)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    param = made((4,), 0)
    state = CompensatedAdamW([param])._state_of(param)
    with pytest.raises(OSError, match="broken"):
        adamw_cpu.step([Piece.of(param, state)] * 2, GROUP, None)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no C compiler (cc, gcc, clang)"),
        ("echo In file included >&2; echo 'fatal error: no math.h' >&2; exit 1", "/cc: fatal error: no math.h"),
        ("exit 3", "/cc: exit status 3"),
    ],
)
def test_a_compiler_that_is_missing_or_fails_is_named(
    script: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        adamw_cpu.kernel.__wrapped__()
    assert str(caught.value).endswith(said)


def test_the_c_file_is_part_of_the_package() -> None:
    root = Path(adamw_cpu.__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["lightning_trainer"]
    assert adamw_cpu.SOURCE in {file for pattern in patterns for file in (root / "lightning_trainer").glob(pattern)}


@needs_compiler
def test_the_c_file_compiles_without_a_warning(tmp_path: Path) -> None:
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion")
    command = [str(COMPILER), *warnings, "-c", str(adamw_cpu.SOURCE), "-o", str(tmp_path / "adamw.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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


def test_each_parameter_is_given_once_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Tensor]] = []
    monkeypatch.setattr(adamw_kernel, "works_on", lambda device, reference: True)
    monkeypatch.setattr(adamw_kernel, "step", lambda pieces, group, found_inf: calls.append([p.weight for p in pieces]))
    monkeypatch.setattr("lightning_trainer.model.optim.KERNEL_BATCH", 2)
    params = [made((4,), seed) for seed in range(5)]
    CompensatedAdamW(params).step()
    numbers = {id(param): number for number, param in enumerate(params)}
    assert [[numbers[id(weight)] for weight in call] for call in calls] == [[0, 1], [2, 3], [4]]


class Wrapper(Tensor):
    """Of a class that may keep its numbers elsewhere."""


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
    state, group = optimizer._state_of(other_grad), optimizer.param_groups[0]
    assert adamw_kernel.fits(other_grad, state, group)
    assert not adamw_kernel.fits(other_grad, state, group | {"lr": torch.tensor(0.1)})
    for name, strange in (
        ("exp_avg", torch.zeros(4)),
        ("exp_avg_sq", torch.zeros(4, dtype=torch.bfloat16, device="meta")),
        ("low_bits", torch.zeros(2, dtype=torch.int16)),
        ("low_bits", torch.zeros(4, dtype=torch.int32)),
    ):
        assert not adamw_kernel.fits(other_grad, state | {name: strange}, group)
    wrapped = nn.Parameter(Wrapper(other_grad.data))
    wrapped.grad = other_grad.grad
    assert not adamw_kernel.fits(wrapped, state, group)
    other_grad.grad = torch.ones(4).bfloat16().to_sparse()
    assert not adamw_kernel.fits(other_grad, state, group)
    other_grad.grad = made((4,), 1).grad
    optimizer.grad_scale = torch.tensor(2.0)
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
        ["CompensatedAdamW steps on cuda without its kernel, several times slower: no C compiler"],
    )
    assert not adamw_kernel.works_on(device, lambda device: (torch.ones(1), torch.zeros(1)))
    assert caplog.messages[1:] == [
        "CompensatedAdamW steps on cuda without its kernel, several times slower: it comes to other numbers"
    ]
    assert not adamw_kernel.works_on(torch.device("meta"), broken)


def test_a_full_device_is_not_taken_for_a_kernel_that_does_not_work() -> None:
    def full(device: torch.device) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        adamw_kernel.works_on(torch.device("cuda"), full)


def test_it_works_where_it_works_for_all_bf16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16, device=device)) for device in ("cpu", "meta")]
    optimizer = CompensatedAdamW([*bf16, nn.Parameter(torch.zeros(2))])
    for works in ({"cpu"}, {"cpu", "meta"}):
        monkeypatch.setattr(adamw_kernel, "works_on", lambda device, reference, works=works: device.type in works)
        assert optimizer.kernel_works() == (works == {"cpu", "meta"})
    optimizer.kernel = False
    assert not optimizer.kernel_works()
