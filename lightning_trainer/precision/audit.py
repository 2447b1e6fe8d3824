"""Which tensors are not of the one dtype. A pure function: the plugin fails with its findings, tests use it too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROTARY = "inv_freq"
"""How the names of rotary buffers end, `sliding_attention_inv_freq` and `original_inv_freq` among them."""

ADAPTER = "lora_"
"""In the names of all parameters that peft's LoRA adds, `lora_magnitude_vector` among them."""

IN_FP32 = (
    "the loss sum",
    "AdamW's step counter",
    "rotary frequencies",  # rounded to bf16 they err more than bf16 weights do, beyond 2k tokens
    "modules that transformers declares must stay fp32",
)
"""What is fp32 in a run of another dtype."""


ADAPTERS = "adapters, their gradients and moments"

PACKED_BASE = "packed storage of the 4-bit base"


def exceptions(dtype: torch.dtype, adapters: torch.dtype | None = None, packed_base: bool = False) -> dict[str, str]:
    """Everything that has another dtype than the run's, for the line printed at start.

    Args:
        adapters: The adapters' dtype, where it was chosen.
        packed_base: Whether the base is quantised.
    """
    packed = {PACKED_BASE: "uint8"} if packed_base else {}
    if dtype == torch.float32:
        return packed
    own = {torch.float16: "moments", torch.bfloat16: "low_bits of compensated optimizers"}[dtype]
    # fp16: squares of gradients underflow it. bf16: the bits that rounding cuts off its weights.
    found = {**dict.fromkeys(IN_FP32, "fp32"), own: "fp32" if dtype == torch.float16 else "int16", **packed}
    return {**found, ADAPTERS: "fp32"} if adapters == torch.float32 else found


def wrong_weights(module: nn.Module, dtype: torch.dtype, adapters: torch.dtype | None = None) -> list[str]:
    """Parameters and buffers that are neither of `dtype` nor an exception.

    Args:
        adapters: The dtype that every adapter must have; None: `dtype`.

    Returns:
        Lines such as `param model.lm_head.weight: torch.float32`.
    """
    fp32 = tuple(_kept_in_fp32(module))
    named: list[tuple[str, str, Tensor]] = [("param", name, p) for name, p in module.named_parameters()]
    named += [("buffer", name, b) for name, b in module.named_buffers() if not name.endswith(ROTARY)]
    wrong = []
    for kind, name, tensor in named:
        # Only what is trained is an adapter: some architectures have frozen matrices of such a name themselves.
        is_adapter = ADAPTER in name and tensor.requires_grad
        kept = tensor.dtype == torch.float32 and any(part in name for part in fp32) and not is_adapter
        if not kept and _differs(tensor, (adapters or dtype) if is_adapter else dtype):
            wrong.append(f"{kind} {name}: {tensor.dtype}")
    return wrong


def wrong_gradients(module: nn.Module) -> list[str]:
    """Gradients whose dtype is not their parameter's."""
    named = ((name, p) for name, p in module.named_parameters() if p.grad is not None)
    return [
        f"gradient of {name}: {p.grad.dtype}" for name, p in named if p.grad is not None and p.grad.dtype != p.dtype
    ]


def wrong_moments(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Optimizer state that is not of its parameter's dtype (fp32 under fp16), step counters and integers aside."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    wrong = []
    for param, state in optimizer.state.items():
        want = torch.float32 if param.dtype == torch.float16 else param.dtype
        tensors = ((key, value) for key, value in state.items() if isinstance(value, Tensor) and key != "step")
        wrong += [f"{key} of {names.get(param, '?')}: {v.dtype}" for key, v in tensors if _differs(v, want)]
    return wrong


def _differs(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype


def _kept_in_fp32(module: nn.Module) -> Iterator[str]:
    for part in module.modules():
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            declared: Iterable[str] | None = getattr(part, name, None)
            yield from declared or ()
