"""A step of CompensatedAdamW on a CPU, by `adamw.c`, which the machine's C compiler makes before the first."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_trainer.model.optim import Piece

SOURCE = Path(__file__).with_name("adamw.c")
COMPILERS = ("cc", "gcc", "clang")
# Each operation rounded by itself: so the last bits are the same in every compiler's vectors and rests.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")

MOST = 1 << 18
"""Numbers that a thread takes at once."""

Call = tuple[int | float, ...]
"""Arguments of the kernel."""


def step(pieces: Sequence[Piece], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """See `adamw_kernel.step`."""
    if found_inf is not None and found_inf.item() != 0:
        return
    adamw, calls = kernel(), [call for piece in pieces for call in _calls(piece, group)]
    threads = torch.get_num_threads()
    shares = [share for place in range(threads) if (share := calls[place::threads])]
    if len(shares) == 1:
        _run(adamw, shares[0], pieces)
    else:
        list(_threads().map(_run, repeat(adamw), shares, repeat(pieces)))


def _calls(piece: Piece, group: dict[str, Any]) -> Iterator[Call]:
    """One for each stretch of a parameter."""
    piece.state["step"] += 1
    (beta1, beta2), lr, steps = group["betas"], group["lr"], piece.state["step"].item()
    rate, root = lr / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], 1 - lr * group["weight_decay"], rate, root)
    state = piece.state
    tensors = (piece.weight, state["low_bits"], piece.grad, state["exp_avg"], state["exp_avg_sq"])
    numbers = piece.weight.numel()
    for start in range(0, numbers, MOST):
        places = (tensor.data_ptr() + start * tensor.element_size() for tensor in tensors)
        yield *places, min(MOST, numbers - start), *factors


def _run(adamw: Callable[..., None], calls: Sequence[Call], pieces: Sequence[Piece]) -> None:
    """Make the calls.

    Args:
        adamw: The kernel; other threads run while it does.
        calls: Its arguments.
        pieces: What they point to, which must not go where the main thread is interrupted.
    """
    for call in calls:
        adamw(*call)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="adamw")


@lru_cache(maxsize=1)
def kernel() -> Callable[..., None]:
    """The function, compiled for this machine.

    Raises:
        RuntimeError: There is no compiler, or it fails.
        OSError: What it made can't be loaded.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"there is no C compiler ({', '.join(COMPILERS)})")
    with TemporaryDirectory(prefix="lightning-trainer-") as directory:
        made = Path(directory) / "adamw.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} fails: {done.stderr.strip().rpartition(chr(10))[2]}")
        adamw = ctypes.CDLL(str(made)).adamw
    adamw.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] + [ctypes.c_float] * 8
    adamw.restype = None
    found: Callable[..., None] = adamw
    return found
