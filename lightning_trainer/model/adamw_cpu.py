"""A step of CompensatedAdamW on a CPU, by `adamw.c`, which is compiled on this machine before the first step."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

SOURCE = Path(__file__).with_name("adamw.c")
COMPILERS = ("cc", "gcc", "clang")
# No fused multiply-add: so the vector loop, its scalar remainder and every compiler give the same bits.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")
SECONDS_TO_COMPILE = 60

ELEMENTS_PER_CALL = 1 << 18

Call = tuple[int | float, ...]
"""Arguments of the kernel."""


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """See `adamw_kernel.step`."""
    if found_inf is not None and found_inf.item() != 0:
        return
    for piece in pieces:
        piece.state["step"] += 1
    adamw, calls = kernel(), [call for piece in pieces for call in _calls(piece, group)]
    threads, left = torch.get_num_threads(), iter(calls)
    if threads == 1 or len(calls) == 1:
        _make(adamw, left, pieces)
        return
    running = [_pool(threads).submit(_make, adamw, left, pieces) for _ in range(threads)]
    try:
        for thread in running:
            thread.result()
    finally:
        wait(running)


def _calls(piece: Piece, group: dict[str, Any]) -> Iterator[Call]:
    (beta1, beta2), lr, steps = group["betas"], group["lr"], piece.state["step"].item()
    step_size, bias_correction2_sqrt = lr / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], 1 - lr * group["weight_decay"])
    state, numel = piece.state, piece.weight.numel()
    tensors = (piece.weight, state["low_bits"], piece.grad, state["exp_avg"], state["exp_avg_sq"])
    for start in range(0, numel, ELEMENTS_PER_CALL):
        pointers = (tensor.data_ptr() + start * tensor.element_size() for tensor in tensors)
        yield *pointers, min(ELEMENTS_PER_CALL, numel - start), *factors, step_size, bias_correction2_sqrt


def _make(adamw: Callable[..., None], calls: Iterator[Call], pieces: Sequence[Piece]) -> None:
    """Make calls until none is left.

    Args:
        adamw: The kernel; other threads run while it does.
        calls: Shared by the threads.
        pieces: What the calls point to, kept alive until they end, even where the main thread is interrupted.
    """
    for call in calls:
        adamw(*call)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="adamw")


@lru_cache(maxsize=1)
def kernel() -> Callable[..., None]:
    """The function, compiled for this machine.

    Raises:
        RuntimeError: There is no compiler, or it fails.
        subprocess.TimeoutExpired: It does not end.
        OSError: What it made can't be loaded.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"there is no C compiler ({', '.join(COMPILERS)})")
    with TemporaryDirectory(prefix="lightning-trainer-") as directory:
        made = Path(directory) / "adamw.so"
        _compile(compiler, made)
        adamw = ctypes.CDLL(str(made)).adamw
    adamw.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] + [ctypes.c_float] * 8
    adamw.restype = None
    found: Callable[..., None] = adamw
    return found


def _compile(compiler: str, made: Path) -> None:
    done = subprocess.run(
        [compiler, *FLAGS, str(SOURCE), "-o", str(made)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_COMPILE,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{compiler}: {next((line for line in lines if 'error' in line), lines[0])}")
