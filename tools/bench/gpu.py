"""Throughput on a GPU: `fit` and other trainers at Qwen3-0.6B's shape, with torch.compile and without.

python tools/bench gpu [--quick]

Arms and chats are those of the table `train`, in bf16, with about 4,096 tokens a step, by the clock on the wall. MFU is
a share of what the GPU does in multiplying large bf16 matrices, measured here; it counts what the tokens need, not
padding, nor the output layer on tokens without a label. Weights, gradients and optimizer states are bf16 in every arm;
ours keeps exact weights besides. Without a GPU the table is empty.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from measure import Row, ratios
from train import COMPILED, Arm, Found, at_hand, call, measure

sys.path.append(str(Path(__file__).parent / "arms"))
from workload import SHAPES, TokenRows

SHAPE = "0.6B"
MATRIX = 8_192
"""Rows and columns of the matrices by which the GPU's peak is measured."""

WARMUP = 10
"""Steps in which compilers may still find shapes they have not seen."""

COMPILE = ("--compile",)
ARMS = (
    Arm("fit", "fit.py", 50, 20, peer=False),
    Arm(f"fit{COMPILED}", "fit.py", 50, 20, peer=False, words=COMPILE),
    Arm("trl_packed", "trl_sft.py", 50, 20, note="bfd, sdpa"),
    Arm(f"trl_packed{COMPILED}", "trl_sft.py", 50, 20, note="bfd, sdpa", words=COMPILE),
    Arm("hf_padded", "hf_trainer.py", 50, 20, note="as many chats as hold 4,096 tokens"),
    Arm(f"hf_padded{COMPILED}", "hf_trainer.py", 50, note="as many chats as hold 4,096 tokens", words=COMPILE),
)


def run(quick: bool) -> list[Row]:
    """The table."""
    if not torch.cuda.is_available():
        print("  no GPU here: not measured", flush=True)
        return []
    return list(table(quick, "cuda", SHAPE, peak_flops("cuda")))


def table(quick: bool, device: str, shape: str, peak: float) -> Iterable[Row]:
    """Rates, MFU and memory of the arms.

    Args:
        quick: Fewer rounds and steps.
        device: That trains.
        shape: Of the model.
        peak: Floating-point operations a second that MFU is a share of.
    """
    arms = at_hand(ARMS, quick)
    with tempfile.TemporaryDirectory() as name:
        call(sys.executable, "workload.py", name, "--shape", shape)
        rows = TokenRows.load(Path(name))
        found = measure(arms, Path(name), quick, WARMUP, "--device", device)
    yield Row("peak, bf16 matrices", (peak / 1e12,), "TFLOP/s")
    yield from rows_of(
        arms, found, flops_per_useful_token(rows, shape) / peak, len(rows.ids) / int(rows.labelled.sum())
    )


def rows_of(arms: list[Arm], found: Found, share: float, tokens: float) -> Iterable[Row]:
    """The rows of what was found.

    Args:
        arms: That ran.
        found: What they reported.
        share: Of the peak, for one useful token a second.
        tokens: To one useful token.
    """
    rates = {name: tuple(run["useful_tokens"] / run["wall_seconds"] for run in runs) for name, runs in found.items()}
    for arm in arms:
        if arm.name != "fit":
            yield Row(f"{arm.name} / fit", ratios(rates[arm.name], rates["fit"]), note=arm.note)
    for name, values in rates.items():
        yield Row(f"tokens a second: {name}", tuple(tokens * value for value in values), "tokens/s")
        yield Row(f"MFU: {name}", tuple(share * value for value in values))
        yield Row(f"peak memory: {name}", tuple(run["peak_gpu_mib"] for run in found[name]), "MiB")


def flops_per_useful_token(rows: TokenRows, shape: str) -> float:
    """Forward and backward: 6 operations for each weight a token meets, and causal attention within its chat."""
    config = SHAPES[shape].config
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    wide = config["num_attention_heads"] * config["head_dim"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    layer = hidden * (2 * wide + 2 * narrow + 3 * config["intermediate_size"])
    useful = int(rows.labelled.sum())
    weights = 6 * layers * layer * len(rows.ids) / useful + 6 * hidden * config["vocab_size"]
    # Scores and their sum, each 2 operations a pair and number, half of the pairs; twice that again backward.
    attention = 6 * layers * wide * float((rows.lengths.astype(float) ** 2).sum()) / useful
    return weights + attention


def peak_flops(device: str) -> float:
    """Of the best of twenty products of large bf16 matrices."""
    left, right = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(left, right)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(2 * MATRIX**3 / min(seconds))
