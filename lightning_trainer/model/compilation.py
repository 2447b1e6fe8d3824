"""model.compile: the layers compiled, and tried before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.compiled import compile_layers
from lightning_trainer.model import attention
from lightning_trainer.types import Batch, InputError


def start(
    model: PreTrainedModel, nats: Callable[[Batch], Tensor], trained: Sequence[Tensor], batch: Batch | None
) -> None:
    """Compile the layers, by one forward and backward pass that leaves nothing behind.

    A run and its resumption should try the same batch: what code comes out depends on the sizes seen first.

    Args:
        model: Whose layers.
        nats: The loss of a batch.
        trained: What it has gradients for.
        batch: To try, on the model's device; None leaves compiling to the first step.

    Raises:
        InputError: torch.compile fails, or finds no layers.
    """
    from torch._dynamo.exc import TorchDynamoException

    started = time.perf_counter()
    torch.compiler.reset()  # what other runs of this process compiled counts against torch's limit of versions
    attention.register(compiled=True)
    layers = compile_layers(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} does not say which of its modules are layers; set it to false", key="model.compile"
        )
    if batch is None:
        return
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.autograd.grad(nats(batch), list(trained), allow_unused=True)
    except TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())  # then come its hints
        raise InputError(
            f"torch.compile fails here: {why}. It needs a C++ compiler and, on a GPU, Triton; set it to false to go on "
            "without",
            key="model.compile",
        ) from error
    rank_zero_info(f"compiled {layers} layers ({time.perf_counter() - started:.1f} s)")
