"""CompensatedAdamW against torch's fused AdamW: time of a step.

python tools/bench optimizers [--quick]

Parameters in the shapes of a Qwen3, gradients of one kind. In bf16 ours updates exact fp32 weights, which torch's does
not: what that costs is the point.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import Row, interleaved, ratios
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_trainer import CompensatedAdamW

SHAPES = {
    # hidden, intermediate, layers, heads, vocabulary
    "7M": (256, 768, 6, 4, 8_192),
    "50M": (512, 1_536, 8, 8, 32_768),
    "0.6B": (1_024, 3_072, 28, 16, 151_936),
}
LARGE = "0.6B"
"""On a GPU alone."""
HEAD, MOST = 64, 1.3


def parameters(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A Qwen3's parameters with tied embeddings and a gradient each."""
    hidden, intermediate, layers, heads, vocabulary = SHAPES[name]
    wide, narrow = 2 * heads * HEAD, heads * HEAD
    layer = [
        *((wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide), (HEAD,), (HEAD,), (hidden,), (hidden,)),
        *((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)),
    ]
    rng = torch.Generator().manual_seed(0)
    made = []
    for shape in [(vocabulary, hidden), *layer * layers, (hidden,)]:
        param = torch.nn.Parameter((0.02 * torch.randn(shape, generator=rng)).to(device, dtype))
        param.grad = (1e-3 * torch.randn(shape, generator=rng)).to(device, dtype)
        made.append(param)
    return made


def compared(name: str, dtype: torch.dtype, rounds: int, device: str, kernel: bool = True) -> Row:
    """Ours / torch's, step by step; with or without our kernel."""
    settings = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0}
    made: dict[str, Callable[[list[Tensor]], Optimizer]] = {
        "torch": lambda params: AdamW(params, fused=True, **settings),
        "ours": lambda params: CompensatedAdamW(params, **settings),
    }
    params = {arm: parameters(name, dtype, device) for arm in made}
    optimizers = {arm: make(params[arm]) for arm, make in made.items()}
    optimizers["ours"].kernel = kernel  # type: ignore[attr-defined]
    steps = {arm: optimizer.step for arm, optimizer in optimizers.items()}
    if device == "cpu":
        seconds = interleaved(steps, rounds, warmup=3)
    else:
        waited = {arm: lambda step=step: (step(), torch.cuda.synchronize()) for arm, step in steps.items()}
        seconds = interleaved(waited, rounds, warmup=3, clock=time.perf_counter)
    count = sum(param.numel() for param in params["ours"])
    what = f"{device}, {str(dtype).removeprefix('torch.')}, {count / 1e6:.1f} M parameters"
    what += "" if kernel else ", no kernel"
    bound = MOST if kernel else None
    return Row(what, ratios(seconds["ours"], seconds["torch"]), at_most=bound, note="time of a step, ours / torch's")


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    rounds = 15 if quick else 41
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [
        compared(name, dtype, rounds, device)
        for device in devices
        for name in SHAPES
        if device == "cuda" or name != LARGE
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return [*rows, *(compared("7M", torch.bfloat16, rounds, device, kernel=False) for device in devices)]
