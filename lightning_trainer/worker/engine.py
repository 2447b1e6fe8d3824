"""What holds the model and generates with it, and the one that does so with transformers."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lightning_trainer.generation import Generation, OnStep, generate
from lightning_trainer.pretrained import load_config, load_model
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.layout import Entry, base_digest, identity_of, layout_of, model_tensors, raw_bytes
from lightning_trainer.types import InputError, PreviewRequest, SamplingParams
from lightning_trainer.worker.adapter_spec import settings_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lightning_trainer.adapters import Adapter, LoraSettings

RESERVE_BYTES = 512 << 20
"""Left free on a GPU for what a forward pass allocates besides its cache and its scores."""


class Engine(Protocol):
    """A model whose weights can be replaced in place. Used by one thread at a time."""

    name: str

    @property
    def identity(self) -> pb.ModelIdentity:
        """What a trainer's model must equal; with the digest of its own weights, on which adapters may lie."""

    @property
    def has_weights(self) -> bool:
        """Whether the model has weights at all: its own, or those of an update."""

    @property
    def layout(self) -> Sequence[Entry]:
        """The tensors that an update consists of: the model's, or those of its adapters."""

    def is_prepared(self, kind: Any, spec: pb.AdapterSpec) -> bool:
        """Whether `layout` is that of such an update."""

    def prepare(self, kind: Any, spec: pb.AdapterSpec) -> None:
        """Make `layout` that of such an update; the model is back at its own weights then.

        Raises:
            Refusal: The specification does not fit the model.
        """

    def digests(self) -> list[bytes]:
        """sha256 of the present values of each tensor of `layout`."""

    def apply(self, tensors: Mapping[str, memoryview]) -> None:
        """Write values into tensors of `layout`, by their names."""

    def generate(
        self, requests: Sequence[PreviewRequest], sampling: SamplingParams, on_step: OnStep
    ) -> list[Generation]:
        """As generation.generate."""

    def check_room(self, rows: int, tokens: int) -> None:
        """Refuse a batch that will not fit the device's free memory.

        Args:
            rows: Prompts.
            tokens: Of the longest prompt and its answer.

        Raises:
            Refusal: It would not fit.
        """

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the device; zeros where it does not say."""

    def is_alive(self) -> bool:
        """Whether the device still computes; asked after a fault that nobody foresaw."""


class TransformersEngine:
    """A model of transformers, from this machine's own disk.

    An update of another kind than the last, or adapters of another specification, take the model back to what the disk
    holds: that is rare (another run has begun), and leaves no trace of what was before.

    Args:
        pretrained: Directory of the model; config.json alone gives a model that waits for a full update.
        dtype: Of the weights; None takes the configuration's.
        device: Where the model lies.

    Raises:
        InputError: There is no model there.
    """

    name = "transformers"

    def __init__(self, pretrained: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        self._path, self._device = str(pretrained), device
        self._dtype = dtype or getattr(load_config(self._path), "dtype", None) or torch.float32
        self._on_disk = any(pretrained.glob("*.safetensors")) or any(pretrained.glob("pytorch_model*.bin"))
        self._load()

    def _load(self) -> None:
        with torch.random.fork_rng(devices=[]):
            # On the host first: rotary frequencies made on a GPU may differ in their last bit from a trainer's.
            loaded: Any = load_model(self._path, self._dtype, from_scratch=not self._on_disk)
        self._model: PreTrainedModel = loaded.to(self._device).requires_grad_(False)
        self._modules = {name for name, _ in self._model.named_modules() if name}
        self._tensors: dict[str, Tensor] = model_tensors(self._model)
        self._adapter: Adapter | None = None
        self._spec: pb.AdapterSpec | None = None
        self.has_weights, self._changed, self._is_built = self._on_disk, False, True
        self.identity = identity_of(self._model, base_digest(self._model) if self._on_disk else b"")

    @property
    def layout(self) -> Sequence[Entry]:
        """See Engine."""
        return layout_of(self._tensors)

    def is_prepared(self, kind: Any, spec: pb.AdapterSpec) -> bool:
        """See Engine."""
        if not self._is_built:
            return False
        return self._spec is None if kind == pb.UPDATE_KIND_MODEL else self._spec == spec

    def prepare(self, kind: Any, spec: pb.AdapterSpec) -> None:
        """See Engine."""
        if kind == pb.UPDATE_KIND_MODEL:
            self._reload()
            return
        settings = settings_of(spec, self._modules)
        if not self._on_disk:
            text = "the worker has no weights of its own that adapters could lie on"
            raise Refusal(Reason.REASON_IDENTITY_MISMATCH, text, ["frozen_base_sha256"])
        if self._changed or self._adapter is not None or not self._is_built:
            self._reload()
        self._put_in(settings)
        self._spec = pb.AdapterSpec()
        self._spec.CopyFrom(spec)

    def _put_in(self, settings: LoraSettings) -> None:
        from lightning_trainer.adapters import put_in

        refusal: Refusal | None = None
        self._is_built = False  # some layers may have theirs when it fails
        try:
            self._adapter = put_in(self._model, settings, self._path)
        except (InputError, ValueError) as error:
            refusal = Refusal(Reason.REASON_INVALID_ARGUMENT, str(error), ["adapter"])
        except torch.OutOfMemoryError:
            refusal = Refusal(Reason.REASON_OUT_OF_MEMORY, "no room for these adapters", ["adapter"])
        if self._adapter is None:
            self._reload()  # here: the error's traceback holds the model no more
            assert refusal is not None
            raise refusal
        self._tensors = dict(sorted(self._adapter.tensors().items()))
        self._is_built = True

    def _reload(self) -> None:
        self._is_built = self.has_weights = False  # until it is: should loading fail, the next Begin tries again
        self._adapter, self._tensors = None, {}
        if hasattr(self, "_model"):  # unless loading failed before
            del self._model
        gc.collect()  # peft's layers refer to each other; two models may not fit the device
        self._load()

    def digests(self) -> list[bytes]:
        """See Engine."""
        return [hashlib.sha256(raw_bytes(tensor.cpu())).digest() for tensor in self._tensors.values()]

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, memoryview]) -> None:
        """See Engine."""
        self._changed = True
        for name, values in tensors.items():
            ours = self._tensors[name]
            if len(values):
                ours.copy_(torch.frombuffer(values, dtype=ours.dtype).view(ours.shape))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.has_weights = True

    def generate(
        self, requests: Sequence[PreviewRequest], sampling: SamplingParams, on_step: OnStep
    ) -> list[Generation]:
        """See Engine."""
        try:
            return generate(self._model, requests, sampling, on_step)
        finally:
            if self._device.type == "cuda" and torch.cuda.mem_get_info(self._device)[0] < RESERVE_BYTES:
                torch.cuda.empty_cache()

    def check_room(self, rows: int, tokens: int) -> None:
        """See Engine."""
        if self._device.type != "cuda":
            return
        config: Any = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * heads * width * self._model.dtype.itemsize
        need = rows * tokens * cache + rows * self.identity.vocab_size * 8 + RESERVE_BYTES
        free, _ = self.memory()
        if need > free:
            text = f"the batch needs about {need >> 20} MiB, the device has {free >> 20} MiB free"
            raise Refusal(Reason.REASON_TOKEN_BUDGET, text, ["device_bytes_free"])

    def memory(self) -> tuple[int, int]:
        """See Engine; what torch keeps for itself without using it counts as free."""
        if self._device.type != "cuda":
            return 0, 0
        free, total = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + kept, total

    def is_alive(self) -> bool:
        """See Engine. After an illegal access or a failed assertion CUDA refuses every call of the process."""
        try:
            return bool((torch.ones(1, device=self._device) + 1).item() == 2)
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False
