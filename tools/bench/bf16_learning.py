"""What bf16 learns at a small learning rate: fp32, torch's AdamW in bf16, and ours, from the same weights and rows.

python tools/bench/bf16_learning.py [--rows FILE] [--steps 150] [--lr 1e-5]

A two-layer Qwen3 with random weights reads bytes; the loss is measured in fp32 on rows that are not trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from lightning_trainer import CompensatedAdamW
from lightning_trainer.model.frozen import UpdateSample

ROOT = Path(__file__).parents[2]
LENGTH, BATCH, HELD_OUT = 128, 8, 64
BETAS = (0.9, 0.95)


def rows_of(path: Path) -> torch.Tensor:
    """(N, LENGTH) int64: the file's text as bytes."""
    text = path.read_text(encoding="utf-8")
    values = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    data = "\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode()
    whole = len(data) // LENGTH * LENGTH
    return torch.frombuffer(bytearray(data[:whole]), dtype=torch.uint8).long().view(-1, LENGTH)


def start() -> Any:
    """The model all three begin as; its weights are bf16 numbers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def batches(rows: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """The same for every optimizer."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (BATCH,), generator=rng)]


@torch.no_grad()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    """Nats per token, computed in fp32 whatever the weights are."""
    exact = copy.deepcopy(model).float()
    return float(exact(input_ids=rows, labels=rows).loss)


def learn(model: Any, optimizer: torch.optim.Optimizer, rows: torch.Tensor, steps: int) -> float:
    """Train, and return the share of updates that rounding swallowed at the last step."""
    frozen = 0.0
    for number, batch in enumerate(batches(rows[HELD_OUT:], steps), start=1):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        sample = UpdateSample(optimizer) if number == steps else None
        optimizer.step()
        frozen = sample.frozen_fraction() if sample is not None else frozen
    return frozen


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROOT / "configs" / "quickstart" / "train.jsonl")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-5)
    given = parser.parse_args()
    rows = rows_of(given.rows)
    kinds = {
        "fp32, torch AdamW": (torch.float32, lambda p: torch.optim.AdamW(p, given.lr, BETAS, weight_decay=0.0)),
        "bf16, torch AdamW": (torch.bfloat16, lambda p: torch.optim.AdamW(p, given.lr, BETAS, weight_decay=0.0)),
        "bf16, CompensatedAdamW": (torch.bfloat16, lambda p: CompensatedAdamW(p, given.lr, BETAS)),
    }
    print(f"lr {given.lr:g}, {given.steps} steps, {torch.__version__}")
    print(f"{'':24}{'before':>10}{'after':>10}{'of fp32':>10}{'frozen':>10}")
    whole = None
    for name, (dtype, make) in kinds.items():
        model = start().to(dtype)
        before = loss_of(model, rows[:HELD_OUT])
        frozen = learn(model, make(model.parameters()), rows, given.steps)
        after = loss_of(model, rows[:HELD_OUT])
        whole = whole or before - after
        print(f"{name:24}{before:10.5f}{after:10.5f}{(before - after) / whole:10.1%}{frozen:10.1%}")


if __name__ == "__main__":
    main()
