"""Does this model keep packed examples apart? Asked of the model itself, before the first step.

Many architectures do not: some build masks that ignore where an example starts, some mix tokens by convolution. Two
examples in one row, then the first one changed: not one logit of the second may move, and they must equal those of the
second example alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model.attention import PACKED, packed_arguments
from lightning_trainer.pretrained import embedding_rows
from lightning_trainer.types import InputError

LENGTHS = (7, 9)

LEAK = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""How far logits may move with the neighbour, relative to their size. Shapes are equal, so rounding is too."""

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far packed logits may be from those of the example alone, which other shapes round otherwise."""

WAY_OUT = "add `data.packing: false` (rows are padded instead), or another model.attn_implementation"


@dataclass(frozen=True)
class Separation:
    """How well an example is kept apart from the one beside it, relative to the size of its logits.

    Attributes:
        leak: How far its logits move when the other example is changed.
        off: How far they are from those of the example alone.
    """

    leak: float
    off: float

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether what is left is rounding; NaN is not."""
        return self.leak <= LEAK[dtype] and self.off <= ROUNDING[dtype]

    def __str__(self) -> str:
        return (
            f"logits move by {self.leak:.2g} of their size with the example beside them, and are {self.off:.2g} off "
            "those of the example alone"
        )


def separation(together: Tensor, beside_other: Tensor, alone: Tensor) -> Separation:
    """Compare three computations of the same example's logits.

    Raises:
        InputError: They are not finite, even alone.
    """
    if not bool(torch.isfinite(alone).all()):
        raise InputError("the model gives logits that are not finite: its weights are damaged", key="model.pretrained")
    size = alone.abs().max().clamp(min=1e-6)
    return Separation(
        leak=float((together - beside_other).abs().max() / size), off=float((together - alone).abs().max() / size)
    )


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise unless packed examples are kept apart.

    Raises:
        InputError: The second example's logits depend on the first, or the model cannot take packed rows at all.
    """
    try:
        found = packing_leak(model)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{_name(model)} cannot take packed rows: {why}; {WAY_OUT}", key="data.packing") from error
    if not found.holds(model.dtype):
        raise InputError(f"{_name(model)} lets packed examples see each other: {found}; {WAY_OUT}", key="data.packing")


def packing_leak(model: PreTrainedModel) -> Separation:
    """How well this model keeps packed examples apart."""
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


def _measure(model: PreTrainedModel) -> Separation:
    vocabulary = embedding_rows(model)
    first, other, second = (torch.arange(n) * 7 % vocabulary for n in (LENGTHS[0], LENGTHS[0] + 1, LENGTHS[1]))
    other = (other[1:] + 1) % vocabulary
    return separation(*(_logits(model, examples) for examples in ([first, second], [other, second], [second])))


def packed_inputs(model: PreTrainedModel, examples: list[Tensor]) -> dict[str, Any]:
    """Arguments of a forward pass over examples of token ids laid end to end in one row."""
    lengths = tuple(len(example) for example in examples)
    return {
        "input_ids": torch.cat(examples)[None].to(model.device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(model.device),
        "attention_mask": None,
        "use_cache": False,
        **(packed_arguments(lengths, model.device) if model.config._attn_implementation == PACKED else {}),
    }


def _logits(model: PreTrainedModel, examples: list[Tensor]) -> Tensor:
    """Logits of the last example of a packed row; fp32."""
    output = model(**packed_inputs(model, examples))
    logits: Tensor = output.logits
    return logits[0, -len(examples[-1]) :].float()


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} with attention {model.config._attn_implementation!r}"
