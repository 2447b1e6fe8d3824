"""Packed attention against transformers' sdpa with its packed mask: forward and backward of a stack of Qwen3 layers.

python tools/bench attention [--quick]

Rows of 2,048 tokens, examples of log-normal length, mean 195; the layers have Qwen3-0.6B's proportions at a quarter
of its width. No embedding to speak of and no output layer: those are the same in both arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measure import Row, interleaved, ratios
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from lightning_trainer.model import attention

TOKENS, MEAN, SIGMA = 2048, 195, 0.8
LEAST_SPEED = 1.7


def lengths_of_row(rng: np.random.Generator) -> tuple[int, ...]:
    """Log-normal lengths that fill a row; the last is cut."""
    drawn = rng.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, size=TOKENS).astype(int).clip(2, TOKENS)
    lengths: list[int] = []
    while (left := TOKENS - sum(lengths)) > 0:
        lengths.append(min(int(drawn[len(lengths)]), left))
    return tuple(lengths)


def make(implementation: str, layers: int) -> Qwen3Model:
    """The same weights for either attention."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, use_cache=False, attn_implementation=implementation,
    )  # fmt: skip
    return Qwen3Model(config).train()


@dataclass
class Arm:
    """One of the two attentions.

    Attributes:
        rows: Lengths of the examples of each row.
        hidden: (1, T, C), of the last row.
    """

    model: Qwen3Model
    rows: list[tuple[int, ...]]
    hidden: Tensor | None = None

    def __call__(self) -> None:
        """Forward and backward of each row."""
        self.model.zero_grad()
        ids = torch.arange(TOKENS)[None] % self.model.config.vocab_size
        packed = self.model.config._attn_implementation == attention.PACKED
        for lengths in self.rows:
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            told: dict[str, Any] = {"examples": attention.Examples(lengths)} if packed else {}
            out = self.model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, **told)
            self.hidden = out.last_hidden_state
            self.hidden.square().sum().backward()

    def difference(self, other: Arm) -> float:
        """Largest distance of hidden states, relative to their size."""
        assert self.hidden is not None
        assert other.hidden is not None
        return float((self.hidden - other.hidden).abs().max() / other.hidden.abs().max())


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    attention.register()
    layers, rounds = (2, 5) if quick else (6, 9)
    rng = np.random.default_rng(0)
    rows = [lengths_of_row(rng) for _ in range(2 if quick else 4)]
    ours, theirs = Arm(make(attention.PACKED, layers), rows), Arm(make("sdpa", layers), rows)
    seconds = interleaved({"theirs": theirs, "ours": ours}, rounds)
    examples = [length for row in rows for length in row]
    note = f"{layers} layers, {len(examples)} examples of {min(examples)} to {max(examples)} tokens in {len(rows)} rows"
    faster = ratios(seconds["theirs"], seconds["ours"])
    return [
        Row("packed mask / ours, time", faster, at_least=LEAST_SPEED, note=note),
        Row("hidden states, difference", (ours.difference(theirs),), at_most=1e-5, note="of their largest"),
    ]
