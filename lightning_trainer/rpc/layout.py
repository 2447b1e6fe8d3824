"""A model's tensors as both sides name and order them, and the digests that tell models and weights apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.limits import MANIFEST_NDIM

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"bfloat16": pb.DTYPE_BF16, "float16": pb.DTYPE_F16, "float32": pb.DTYPE_F32}
"""torch's name -> the wire's."""

SIZES = {pb.DTYPE_BF16: 2, pb.DTYPE_F16: 2, pb.DTYPE_F32: 4}

NOT_FORWARD = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "tokenizer_class",
    "task_specific_params",
    "gradient_checkpointing",
    "torchscript",
}
"""Keys of a configuration that change no logits."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout; `dtype` is the wire's."""

    name: str
    dtype: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its raw values."""
        return prod(self.shape) * SIZES[self.dtype]

    def to_wire(self, sha256: bytes) -> pb.TensorEntry:
        """In a manifest."""
        size = self.nbytes
        return pb.TensorEntry(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            nbytes=size,
            sha256=sha256,
            encoding=pb.ENCODING_RAW,
            encoded_nbytes=size,
        )


def model_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, in the order of their names; what is tied comes once.

    Of a model with adapters: what lies beneath them, under the names it has without them.
    """
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" in name or ".modules_to_save." in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.detach()
    return dict(sorted(found.items()))


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[Entry, ...]:
    """Their names, dtypes and shapes, in the order given.

    Raises:
        Refusal: A dtype has no name on the wire: packed weights of 4 bits, say.
    """
    entries = []
    for name, tensor in tensors.items():
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            text = f"{name} is {tensor.dtype}; only bfloat16, float16 and float32 can be sent"
            raise Refusal(Reason.REASON_IDENTITY_MISMATCH, text, ["dtype"])
        entries.append(Entry(name, dtype, tuple(tensor.shape)))
    return tuple(entries)


def layout_digest(layout: Iterable[Entry]) -> bytes:
    """sha256 over names, dtypes and shapes."""
    lines = (f"{entry.name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\n" for entry in layout)
    return hashlib.sha256("".join(lines).encode()).digest()


def config_digest(config: PretrainedConfig) -> bytes:
    """sha256 over what in a configuration bears on the logits."""
    return hashlib.sha256(json.dumps(_forward(config.to_dict()), sort_keys=True, default=str).encode()).digest()


def _forward(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _forward(item) for key, item in value.items() if key not in NOT_FORWARD}
    return value


def base_digest(model: PreTrainedModel) -> bytes:
    """Tells apart the weights that adapters lie on; the same with adapters on them and without."""
    from lightning_trainer.adapters import bits_digest

    return bytes.fromhex(bits_digest(model_tensors(model).items()))


def identity_of(model: PreTrainedModel, frozen_base: bytes = b"") -> pb.ModelIdentity:
    """What must be equal on both sides.

    Args:
        frozen_base: `base_digest`, where adapters may lie on the model.
    """
    from lightning_trainer.pretrained import embedding_rows

    layout = layout_of(model_tensors(model))
    return pb.ModelIdentity(
        architecture=type(model).__name__,
        dtype=DTYPES[str(model.dtype).removeprefix("torch.")],
        vocab_size=embedding_rows(model),
        config_sha256=config_digest(model.config),
        layout_sha256=layout_digest(layout),
        frozen_base_sha256=frozen_base,
        total_bytes=sum(entry.nbytes for entry in layout),
    )


def differing(ours: pb.ModelIdentity, theirs: pb.ModelIdentity) -> list[str]:
    """Names of the fields that are not equal; the frozen base is compared only where both name one."""
    names = [field.name for field in pb.ModelIdentity.DESCRIPTOR.fields if field.name != "frozen_base_sha256"]
    found = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    both = bool(ours.frozen_base_sha256 and theirs.frozen_base_sha256)
    if both and ours.frozen_base_sha256 != theirs.frozen_base_sha256:
        found.append("frozen_base_sha256")
    return found


def content_digest(digests: Iterable[bytes]) -> bytes:
    """Names a set of weights: sha256 over the digests of its tensors, in the order of the layout."""
    return hashlib.sha256(b"".join(digests)).digest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's values, row-major; shares its memory where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def check_manifest(manifest: Sequence[pb.TensorEntry], layout: Sequence[Entry]) -> None:
    """A manifest selects from a layout, tensor for tensor; it never says how much is to be allocated.

    Raises:
        Refusal: It is not the layout.
    """
    if len(manifest) != len(layout):
        text = f"the manifest has {len(manifest)} tensors, the model {len(layout)}"
        raise Refusal(Reason.REASON_MANIFEST_INVALID, text, ["tensors"])
    for given, entry in zip(manifest, layout, strict=True):
        fault = _fault(given, entry)
        if fault:
            raise Refusal(Reason.REASON_MANIFEST_INVALID, f"tensor {entry.name!r}: {fault}", [fault])


def _fault(given: pb.TensorEntry, entry: Entry) -> str:
    """Name of the field that is wrong, or empty."""
    right = {
        "name": given.name == entry.name,
        "dtype": given.dtype == entry.dtype,
        "shape": len(given.shape) <= MANIFEST_NDIM and tuple(given.shape) == entry.shape,
        "nbytes": given.nbytes == entry.nbytes,
        "encoded_nbytes": given.encoded_nbytes == entry.nbytes,
        "encoding": given.encoding == pb.ENCODING_RAW,
        "sha256": len(given.sha256) == hashlib.sha256().digest_size,
    }
    return next((name for name, holds in right.items() if not holds), "")
