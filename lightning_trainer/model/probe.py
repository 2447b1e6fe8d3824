"""Does this model keep packed examples apart? Asked of the model itself, before the first step.

Many architectures do not: some build masks that ignore where an example starts, some mix tokens by convolution. Two
examples in one row, then the first one changed: not one logit of the second may move, and they must equal those of the
second example alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model.attention import PACKED
from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import InputError

LENGTHS = (7, 9)

LEAK = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""How far logits may move with the neighbour, relative to their size. Shapes are equal, so rounding is too."""

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far packed logits may be from those of the example alone, which other shapes round otherwise."""

WAY_OUT = "add `data.packing: false` (rows are padded instead), or another model.attn_implementation"


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise unless packed examples are kept apart.

    Raises:
        InputError: The second example's logits depend on the first, or the model cannot take packed rows at all.
    """
    try:
        leak, off = packing_leak(model)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{_name(model)} cannot take packed rows: {error}; {WAY_OUT}", key="data.packing") from error
    if not math.isfinite(off):
        raise InputError(
            f"{_name(model)} gives logits that are not finite: its weights are damaged", key="model.pretrained"
        )
    if not (leak <= LEAK[model.dtype] and off <= ROUNDING[model.dtype]):
        raise InputError(
            f"{_name(model)} lets packed examples see each other (logits move by {leak:.2g} of their size with the "
            f"neighbour, and are {off:.2g} off those of the example alone); {WAY_OUT}",
            key="data.packing",
        )


def packing_leak(model: PreTrainedModel) -> tuple[float, float]:
    """How far a packed example's logits move with its neighbour, and are from those of the example alone.

    Both relative to the size of the logits.
    """
    with evaluating(model), torch.no_grad():
        return _measure(model)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; afterwards each module's own flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _measure(model: PreTrainedModel) -> tuple[float, float]:
    vocabulary = embedding_rows(model)
    first, other, second = (torch.arange(n) * 7 % vocabulary for n in (LENGTHS[0], LENGTHS[0] + 1, LENGTHS[1]))
    other = (other[1:] + 1) % vocabulary
    beside = _logits(model, [first, second])
    beside_other = _logits(model, [other, second])
    alone = _logits(model, [second])
    size = alone.abs().max().clamp(min=1e-6)
    return float((beside - beside_other).abs().max() / size), float((beside - alone).abs().max() / size)


def packed_inputs(model: PreTrainedModel, examples: list[Tensor]) -> dict[str, Any]:
    """Arguments of a forward pass over examples of token ids laid end to end in one row."""
    lengths = tuple(len(example) for example in examples)
    return {
        "input_ids": torch.cat(examples)[None].to(model.device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(model.device),
        "attention_mask": None,
        "use_cache": False,
        **({"example_lengths": lengths} if model.config._attn_implementation == PACKED else {}),
    }


def _logits(model: PreTrainedModel, examples: list[Tensor]) -> Tensor:
    """Logits of the last example of a packed row; fp32."""
    output = model(**packed_inputs(model, examples))
    logits: Tensor = output.logits
    return logits[0, -len(examples[-1]) :].float()


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} with attention {model.config._attn_implementation!r}"
