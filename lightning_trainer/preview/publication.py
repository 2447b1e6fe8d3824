"""Publication: which tensors of a model a worker is sent, and what it must be for them to mean the same there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_trainer.adapters import Adapter, adapted_layers
from lightning_trainer.preview.snapshot import KEY
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.rpc.layout import Entry, base_digest, identity_of, layout_of, model_tensors
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Publication:
    """What is sent, and how it is asked for.

    Attributes:
        kind: An UpdateKind.
        adapter: Of the update; None where it is the whole model.
        layout: Of `tensors`, in their order.
        tensors: The values as they are now; shares the model's memory.
    """

    kind: Any
    identity: pb.ModelIdentity
    adapter: pb.AdapterSpec | None
    layout: tuple[Entry, ...]
    tensors: Callable[[], dict[str, Tensor]]


def publication_of(model: PreTrainedModel, adapter: Adapter | None) -> Publication:
    """With adapters, they alone are sent: what is frozen beneath them is on the worker's disk.

    Raises:
        InputError: The weights have a form that has no name on the wire.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            "the base is quantised: a worker cannot hold the same one yet; take LocalPreviewBackend", key=KEY
        )
    try:
        identity = identity_of(model, b"" if adapter is None else base_digest(model))
        if adapter is None:
            layout = layout_of(model_tensors(model))
            return Publication(pb.UPDATE_KIND_MODEL, identity, None, layout, lambda: model_tensors(model))
        layout = layout_of(_sorted(adapter))
    except Refusal as error:
        raise InputError(f"{error}; take LocalPreviewBackend", key=KEY) from error
    return Publication(pb.UPDATE_KIND_ADAPTER, identity, spec_of(model, adapter), layout, lambda: _sorted(adapter))


def _sorted(adapter: Adapter) -> dict[str, Tensor]:
    return dict(sorted(adapter.tensors().items()))


def spec_of(model: PreTrainedModel, adapter: Adapter) -> pb.AdapterSpec:
    """From which a worker makes the same adapters."""
    from peft.utils import ModulesToSaveWrapper

    settings = adapter.settings
    copies = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    return pb.AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=sorted(name for name, _ in adapted_layers(model)),
        use_dora=settings.use_dora,
        modules_to_save=sorted(copies),
        fp32=settings.dtype == "fp32",
    )
