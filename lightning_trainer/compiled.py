"""torch.compile of a model's layers.

A decoder's layers are alike, so the code that is made for the first serves all of them; what is around them (masks, the
loss, generation) stays as it is. Shapes are dynamic: rows of other lengths are no other code. Nothing here is imported
from torch.compile's own packages, which take seconds, unless a model is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn

_compiled: WeakSet[nn.Module] = WeakSet()


def compile_layers(model: nn.Module) -> int:
    """Have each of the model's layers compiled when it is first called.

    Under gradient checkpointing each part of a layer is compiled by itself: torch does not compile across a call of
    `checkpoint` in which something is left to Python, as attention within examples is.

    Returns:
        How many layers there are; 0 where the architecture does not say what its layers are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        for part in layer.children() if layer.gradient_checkpointing else (layer,):
            part.compile(dynamic=True)
    _compiled.add(model)
    return len(layers)


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Within, the model computes as if it had not been compiled, and nothing is compiled."""
    if model not in _compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
