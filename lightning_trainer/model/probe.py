"""Does this model keep packed examples apart? Asked of the model itself, before the first step.

Many architectures do not: some build masks that ignore where an example starts, some mix tokens by convolution. Two
examples in one row, then the first one changed: not one logit of the second may move, and they must equal those of the
second example alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model.attention import PACKED
from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import InputError

LENGTHS = (7, 9)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative difference that rounding explains; a leak moves logits by their own size."""

WAY_OUT = "add `data.packing: false` (rows are padded instead), or another model.attn_implementation"


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise unless packed examples are kept apart.

    Raises:
        InputError: The second example's logits depend on the first, or the model cannot take packed rows at all.
    """
    try:
        leak = packing_leak(model)
    except (ValueError, TypeError) as error:
        raise InputError(f"{_name(model)} cannot take packed rows: {error}; {WAY_OUT}", key="data.packing") from error
    if leak > TOLERANCE[model.dtype]:
        raise InputError(
            f"{_name(model)} lets packed examples see each other (logits of one move by {leak:.2g} of their size "
            f"with the other); {WAY_OUT}",
            key="data.packing",
        )


def packing_leak(model: PreTrainedModel) -> float:
    """How far one packed example's logits depend on its neighbour, relative to their size."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _measure(model)
    finally:
        for module, training in flags:
            module.training = training


def _measure(model: PreTrainedModel) -> float:
    vocabulary = embedding_rows(model)
    first, other, second = (torch.arange(n) * 7 % vocabulary for n in (LENGTHS[0], LENGTHS[0] + 1, LENGTHS[1]))
    other = (other[1:] + 1) % vocabulary
    beside = _logits(model, [first, second])
    beside_other = _logits(model, [other, second])
    alone = _logits(model, [second])
    size = alone.abs().max().clamp(min=1e-6)
    return float(max((beside - beside_other).abs().max(), (beside - alone).abs().max()) / size)


def _logits(model: PreTrainedModel, examples: list[Tensor]) -> Tensor:
    """Logits of the last example of a packed row; fp32."""
    ours = model.config._attn_implementation == PACKED
    output = model(
        input_ids=torch.cat(examples)[None].to(model.device),
        position_ids=torch.cat([torch.arange(len(e)) for e in examples])[None].to(model.device),
        attention_mask=None,
        use_cache=False,
        **({"example_lengths": tuple(len(e) for e in examples)} if ours else {}),
    )
    logits: Tensor = output.logits
    return logits[0, -len(examples[-1]) :].float()


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} with attention {model.config._attn_implementation!r}"
