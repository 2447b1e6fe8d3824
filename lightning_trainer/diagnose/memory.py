"""How much memory a training step takes, by part: formulas, whose activations the tests hold against autograd.

    total = weights + gradients + moments + the greater of (activations and loss) and (the update's temporaries)

The update runs when the activations are gone, so only the greater of the two counts.

Letters: T tokens of a micro-batch, N of them trained on, s bytes of a number in the run's dtype, C hidden size,
I intermediate size, Q = heads x head_dim, K = key/value heads x head_dim, V rows of the output layer.

Beside adapters the model is frozen: it has no gradients and no moments, and of its activations only those stay that a
gradient passes through, not those that only a weight's own gradient needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_trainer.adapters import adapted_layers
from lightning_trainer.model.attention import PACKED
from lightning_trainer.model.loss import CHUNK, EXACT
from lightning_trainer.model.muon import CompensatedMuon
from lightning_trainer.model.objective import LossName, output_layer
from lightning_trainer.model.optim import BUCKET, CompensatedAdamW

GIB = 1 << 30

CARD = (24 * GIB, "a 24 GB card")
"""What is compared with where there is no GPU."""

CONTEXT = GIB
"""Left for what no formula sees: CUDA's context and kernels, holes in the allocator's blocks."""

ASKED = 64
"""An optimizer is asked what it keeps for a weight of this many rows and columns."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names by which configurations say that only some of the weights see a token."""

STORES_NO_SCORES = (PACKED, "sdpa", "flash")


@dataclass(frozen=True)
class Shape:
    """What activations depend on.

    Attributes:
        query: Heads x head_dim.
        key: Key/value heads x head_dim.
        gated: Whether the MLP multiplies two projections (SwiGLU); else one projection and its activation.
        norms_heads: Whether queries and keys are normalised (`q_norm`).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key: int
    gated: bool
    norms_heads: bool


def shape_of(model: PreTrainedModel) -> Shape | None:
    """The shape of a dense transformer, or None where the model is no such thing or does not say."""
    config: Any = model.config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, hidden, intermediate, heads = (getattr(config, name, None) for name in names)
    stores_scores = not str(config._attn_implementation).startswith(STORES_NO_SCORES)
    if not (layers and hidden and intermediate and heads) or stores_scores or _has_experts(config):
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    gated = bool(parts & {"gate_proj", "gate_up_proj", "w3"})
    return Shape(layers, hidden, intermediate, heads, heads * head_dim, pairs * head_dim, gated, "q_norm" in parts)


def _has_experts(config: Any) -> bool:
    return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd holds for the backward pass.

    Attributes:
        kept: From the forward pass on.
        recomputed: Made again in the backward pass under gradient checkpointing: one layer's, at a time.
    """

    kept: int
    recomputed: int


def activations(
    shape: Shape, tokens: int, itemsize: int, packed: bool, checkpointing: bool, adapters: int | None = None
) -> Activations:
    """What the backward pass needs, for a micro-batch of `tokens` tokens, padding included.

    Args:
        adapters: Bytes a token that the adapters of all layers keep; None where the model itself is trained.

    Outside the layers it is the last norm (4C + sC) and the rotary tables (2s head_dim), a token.
    """
    layer = tokens * (_layer(shape, itemsize, packed, adapters is not None) + (adapters or 0) // shape.layers)
    around = tokens * (4 * shape.hidden + itemsize * (shape.hidden + 2 * shape.query // shape.heads) + 12)
    if checkpointing:  # the input of each layer
        return Activations(around + shape.layers * tokens * itemsize * shape.hidden, layer)
    return Activations(around + shape.layers * layer, 0)


def _layer(shape: Shape, s: int, packed: bool, frozen: bool) -> int:
    """Bytes a token and layer; of a frozen layer without its adapters."""
    hidden, query, key = shape.hidden, shape.query, shape.key
    kept = 0 if frozen else s  # the inputs of weights, for the weights' own gradients
    # A norm computes in fp32: 4 bytes of its input, s of the normalised, s of its output, which projections keep.
    norms = 2 * (4 + 2 * kept) * hidden + 8
    if shape.norms_heads:
        norms += (4 + kept) * (query + key) + 4 * (shape.heads + shape.heads * key // query)
    # Packed: keys and values as they are, and the examples' outputs joined once more. Padded: a mask makes
    # transformers repeat keys and values for every head.
    qkv = query + 2 * key if packed else 3 * query
    out = s * query + (kept * query if packed else 0)
    scores = 4 * shape.heads  # their log-sum-exp alone
    mlp = ((3 * s if shape.gated else s) + kept) * shape.intermediate
    return norms + s * qkv + out + scores + mlp


SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Layers that are handed one and the same tensor."""


def adapter_activations(model: PreTrainedModel, itemsize: int, packed: bool) -> int | None:
    """Bytes a token that autograd keeps for the adapters of all layers; None where there are none.

    Of each its input and the rank's values. Dropout makes an input of its own, and as large a mask (a byte each on a
    GPU); so do adapters of another dtype. DoRA keeps both results that its magnitudes weigh.
    """
    found, shared = 0, set[str]()
    layers = list(adapted_layers(model)) if hasattr(model, "peft_config") else []
    for name, layer in layers:
        inner: Tensor = (
            next(iter(layer.lora_A.values())).weight if len(layer.lora_A) else layer.lora_embedding_A.default
        )
        size, rank, drops = inner.element_size(), inner.shape[0], any(p.p > 0 for p in _dropouts(layer))
        found += size * rank
        if drops or size != itemsize:
            found += (2 if drops else 1) * size * layer.in_features
        elif (given := _input_of(name)) not in shared and (packed or not name.endswith("o_proj")):
            shared.add(given)
            found += size * layer.in_features
        if any(layer.use_dora.values()):
            found += ((size if drops else itemsize) + size) * layer.out_features
    return found if layers else None


def _dropouts(layer: Any) -> list[torch.nn.Dropout]:
    return [module for module in layer.lora_dropout.values() if isinstance(module, torch.nn.Dropout)]


def _input_of(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    return next((f"{parent}.{min(group)}" for group in SAME_INPUT if leaf in group), name)


def loss_bytes(
    loss: LossName,
    hidden: int,
    rows: int,
    tokens: int,
    trained: int,
    itemsize: int,
    frozen: bool = False,
    chunk: int = CHUNK,
    exact: int = EXACT,
) -> int:
    """What the loss holds at its peak, besides the activations; on a GPU, unless `chunk` and `exact` say otherwise.

    `full`: the fp32 log-softmax of the trained tokens' logits, its gradient and theirs, 12 NV; or, later, the gradient
    of all logits, TVs + NVs. `chunked`: logits of a chunk; probabilities of a few of them in fp32, and in 16 bits
    their logits too; the output layer's gradient in fp32, VC4, and in 16 bits a chunk's part of it; that of N hidden
    states. A frozen output layer has none.
    """
    if loss == "full":
        return max(trained * rows * 12, (tokens + trained) * rows * itemsize)
    few = min(trained, chunk, max(1, exact // rows)) * (4 if itemsize == 4 else 8)
    layer = 0 if frozen else rows * hidden * (4 + (itemsize if itemsize < 4 else 0))
    return (min(trained, chunk) * itemsize + few) * rows + layer + trained * hidden * itemsize


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes, in bytes a trained weight.

    Attributes:
        state: Moments and whatever else it keeps between steps.
        update: fp32 or foreach temporaries while it steps, in bytes of all.
        note: What is not known of it, or empty.
    """

    state: float
    update: int
    note: str


def optimizer_bytes(
    optimizer: Optimizer, trained: int, dtype: torch.dtype, matrices: Sequence[int] = ()
) -> OptimizerBytes:
    """Ask the optimizer: it makes a step with one weight of 64 x 64, and its state is counted.

    Args:
        optimizer: Of that one weight, as `asked_weight` makes it; it is stepped.
        trained: Weights trained in the run.
        dtype: Of the run.
        matrices: Weights of each of the matrices between hidden states among them, which are Muon's.
    """
    weight: Tensor = optimizer.param_groups[0]["params"][0]
    try:
        state = _state_bytes(optimizer, weight)
        if isinstance(optimizer, CompensatedMuon):
            left = asked_weight(dtype)
            optimizer.leave_to_adamw([left])
            optimizer.add_param_group({"params": [left]})
            share = sum(matrices) / trained if trained else 1.0
            state = share * state + (1 - share) * _state_bytes(optimizer, left)
    except (RuntimeError, TypeError, ValueError, AssertionError):  # needs a GPU, a closure, …
        return OptimizerBytes(2.0 * dtype.itemsize, 0, "unknown optimizer, assumed 2 moments")
    return OptimizerBytes(state, _update_bytes(optimizer, trained, dtype, max(matrices, default=0)), "")


def _state_bytes(optimizer: Optimizer, weight: Tensor) -> float:
    """Bytes that the optimizer keeps for each number of a weight of its own."""
    weight.grad = torch.zeros_like(weight)
    if isinstance(optimizer, CompensatedAdamW):
        optimizer.kernel = False  # which this machine would have to compile
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.dim())
    return kept / weight.numel()


def asked_weight(dtype: torch.dtype) -> torch.nn.Parameter:
    """The weight that `optimizer_bytes` asks with."""
    return torch.nn.Parameter(torch.zeros(ASKED, ASKED, dtype=dtype))


def _update_bytes(optimizer: Optimizer, trained: int, dtype: torch.dtype, largest: int) -> int:
    if isinstance(optimizer, CompensatedMuon):
        # of one matrix: fp32 weight, gradient and momentum, the first and last twice, and Newton-Schulz in bf16
        return max(largest * (5 * 4 + 4 * 2), min(BUCKET, trained) * (16 if dtype == torch.bfloat16 else 0))
    if isinstance(optimizer, CompensatedAdamW):
        # fp32 copies of weight, gradient and two moments; under 16-true the moments are fp32 themselves. At most: the
        # kernel, where it can be used, makes none.
        copies = {torch.bfloat16: 16, torch.float16: 8}.get(dtype, 0)
        return min(BUCKET, trained) * copies
    group = optimizer.param_groups[0]
    if group.get("foreach") is False or group.get("fused") or "foreach" not in group:
        return 0
    return trained * dtype.itemsize  # torch's foreach loops hold one intermediate of all weights


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device.

    Attributes:
        tokens: Of a micro-batch, padding included.
        activations: None where they are not estimated; so is what is made of them.
        without_checkpointing: What `activations` would be without gradient checkpointing.
        with_checkpointing: What they would be with it, one layer's recomputed ones included.
        update: The optimizer's temporaries, at a time when there are no activations.
        card: Bytes of the device it is compared with.
        note: What is not known of the optimizer, or empty.
    """

    weights: int
    gradients: int
    moments: int
    update: int
    tokens: int
    activations: int | None
    without_checkpointing: int | None
    with_checkpointing: int | None
    loss: int
    total: int | None
    card: int
    card_name: str
    note: str

    @property
    def fits(self) -> bool | None:
        """Whether it fits the card, beside what CUDA itself takes; None where it is not estimated."""
        return None if self.total is None else self.total + CONTEXT <= self.card


def estimate(
    model: PreTrainedModel,
    optimizer: OptimizerBytes,
    loss: LossName,
    dtype: torch.dtype,
    tokens: int,
    trained: int,
    packed: bool,
    checkpointing: bool,
    packed_weight: float | None = None,
    device: torch.device | None = None,
) -> Memory:
    """The memory of a training step.

    Args:
        model: On the meta device, with its adapters.
        tokens: Of a micro-batch, padding included.
        trained: How many of them are trained on.
        packed: Whether examples share rows.
        packed_weight: Bytes a weight of a quantised base's linear layers.
        device: That trains; where it is no GPU, a card is assumed.
    """
    s, shape = dtype.itemsize, shape_of(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    static = {
        "weights": _weights(model, packed_weight),
        "gradients": sum(p.nbytes for p in trainable),
        "moments": round(optimizer.state * sum(p.numel() for p in trainable)),
    }
    head: Any = output_layer(model) or model.get_input_embeddings()
    rows, hidden = head.weight.shape
    at_loss = loss_bytes(loss, hidden, rows, tokens, trained, s, frozen=not head.weight.requires_grad)
    kept = adapter_activations(model, s, packed)
    without, within = (
        None if shape is None else activations(shape, tokens, s, packed, checkpointed, kept)
        for checkpointed in (False, True)
    )
    chosen = within if checkpointing else without
    # One layer is computed again after the loss has let go of its memory.
    passes = None if chosen is None else chosen.kept + max(chosen.recomputed, at_loss)
    card, name = _card(device)
    return Memory(
        **static,
        update=optimizer.update,
        tokens=tokens,
        activations=_held(chosen),
        without_checkpointing=_held(without),
        with_checkpointing=_held(within),
        loss=at_loss,
        total=None if passes is None else sum(static.values()) + max(passes, optimizer.update),
        card=card,
        card_name=name,
        note=optimizer.note,
    )


def _weights(model: PreTrainedModel, packed_weight: float | None) -> int:
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if packed_weight is None:
        return total
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    packed = [m.weight for m in layers if m is not output_layer(model)]
    return total - round(sum(weight.nbytes - packed_weight * weight.numel() for weight in packed))


def _held(held: Activations | None) -> int | None:
    return None if held is None else held.kept + held.recomputed


def _card(device: torch.device | None) -> tuple[int, str]:
    if device is None or device.type != "cuda":
        return CARD
    found = torch.cuda.get_device_properties(device)
    return int(found.total_memory), str(found.name)
