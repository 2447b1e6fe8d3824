"""model.compile: torch.compile of the layers, tried before anything of the run is written.

A decoder's layers are alike, so the code that is made for the first serves all of them; what is around them (masks, the
loss) stays as it is. Shapes are dynamic: packs of another layout are no other code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model import attention, varlen
from lightning_trainer.model.probe import evaluating
from lightning_trainer.types import Batch, InputError


def start(
    model: PreTrainedModel,
    nats: Callable[[Batch], Tensor],
    trained: Sequence[Tensor],
    batch: Batch | None,
    validates: bool,
) -> None:
    """Compile the layers, by passes that leave nothing behind: one as in training, one as in validation.

    A run and its resumption should try the same batch: code may depend on the sizes that are seen first.

    Args:
        model: Whose layers.
        nats: The loss of a batch.
        trained: What it has gradients for.
        batch: To try, on the model's device; None leaves compiling to the first step.
        validates: Whether there will be validations.

    Raises:
        InputError: torch.compile fails, or finds no layers.
    """
    from torch._dynamo.exc import TorchDynamoException

    started = time.perf_counter()
    torch.compiler.reset()  # what other runs of this process compiled counts against torch's limit of versions
    kernel = varlen.kernel_on(model.device) if model.dtype in varlen.DTYPES else None
    attention.register(compiled=True, kernel=kernel)
    layers = compile_layers(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} does not say which of its modules are layers; set it to false", key="model.compile"
        )
    if batch is None:
        return
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            with torch.enable_grad():
                torch.autograd.grad(nats(batch), list(trained), allow_unused=True)
            if validates:
                with evaluating(model), torch.no_grad():
                    nats(batch)
    except TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())  # then come its hints
        raise InputError(
            f"torch.compile fails here: {why}. It needs a C++ compiler and, on a GPU, Triton; set it to false to go on "
            "without",
            key="model.compile",
        ) from error
    rank_zero_info(f"compiled {layers} layers ({time.perf_counter() - started:.1f} s)")


def compile_layers(model: PreTrainedModel) -> int:
    """Have each of the model's layers compiled when it is first called.

    Under gradient checkpointing each part of a layer is compiled by itself: torch does not compile across a call of
    `checkpoint` in which something is left to Python, as attention within examples may be.

    Returns:
        How many layers there are; 0 where the architecture does not say what its layers are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        for part in layer.children() if layer.gradient_checkpointing else (layer,):
            part.compile(dynamic=True)
    return len(layers)
