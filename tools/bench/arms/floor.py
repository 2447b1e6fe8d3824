"""Arm `floor`: the least work that trains on these rows, as a bare loop.

Best-fit packing to 2,048 tokens, SDPA within each example, the output layer on labelled tokens only, torch's fused
AdamW, gradients clipped to norm 1. Its steps hold the rows of `fit`'s plan, so that both train on the same tokens and
their losses can be compared step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meter
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from workload import TokenRows

from lightning_trainer.data.sampler import Layout, plan_epoch

RUN_SEED = 42
"""`seed_everything`'s default, which orders the rows of `fit`."""


@dataclass(frozen=True)
class Packed:
    """One row of T tokens that holds several examples.

    Attributes:
        ids: (1, T).
        positions: (1, T), from 0 within each example.
        lengths: Tokens of each example.
        predict_at: (N,), places before the labelled tokens.
        targets: (N,), the labelled tokens.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    predict_at: Tensor
    targets: Tensor


def batches(rows: TokenRows) -> Iterator[Packed]:
    """The rows of an epoch, each an optimizer step."""
    examples = list(rows)
    plan = plan_epoch(rows.lengths, rows.labels, Layout(batch_size=1, pack_to=rows.max_length, seed=RUN_SEED), epoch=0)
    for step in range(len(plan)):
        pairs = [examples[example] for example in plan.examples(step, rank=0).tolist()]
        ids, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        lengths = [len(part) for part, _ in pairs]
        at = np.flatnonzero(labels != -100)
        yield Packed(
            ids=torch.from_numpy(ids)[None],
            positions=torch.cat([torch.arange(length) for length in lengths])[None],
            lengths=lengths,
            predict_at=torch.from_numpy(at - 1),
            targets=torch.from_numpy(labels[at]),
        )


def within_examples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    lengths: list[int],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each example alone; (1, heads, T, D) in, (1, T, heads, D) out."""
    parts = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in parts
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


def load_model(folder: Path) -> Any:
    """The model with that attention, in fp32."""
    AttentionInterface.register("within_examples", within_examples)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="within_examples"
    )
    return model.train()


def loss_of(model: Any, batch: Packed) -> Tensor:
    """Mean nats of the labelled tokens."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.positions, lengths=batch.lengths, use_cache=False
    ).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[0, batch.predict_at]), batch.targets)


def main() -> None:
    """Train and report."""
    given = meter.arguments(__doc__, "floor")
    measured = meter.Meter(given)
    model = load_model(given.workload / "model")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=meter.LEARNING_RATE, betas=meter.BETAS, weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches(TokenRows.load(given.workload)), start=1):
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, meter.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        measured.saw(len(batch.targets), loss.detach() * len(batch.targets))
        measured.passed(step)
        if step == measured.last:
            break
    measured.report("transformers")


if __name__ == "__main__":
    main()
