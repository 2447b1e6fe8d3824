"""CompensatedAdamW: AdamW whose bf16 weights lose nothing.

Under round-to-nearest an update smaller than half a bf16 step vanishes: at lr 1e-5 four of five weights never move.
Here each bf16 weight keeps beside it the 16 bits that rounding cut off its fp32 value, so the optimizer sees and
updates exact fp32 weights, at two more bytes a weight (where fp32 master weights cost four). The arithmetic is that of
torch's fused AdamW in fp32: `adamw_kernel` does it, or else torch itself on a bucket of tensors at a time.

    fp32 weight   0 01111100 01001001 1011110001101010
    bf16 weight   0 01111100 01001010                     rounded: what the model computes with
    low_bits                          -17302              fp32 bits minus bf16 bits: in [-32768, 32767]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_trainer.model import adamw_kernel
from lightning_trainer.types import InputError

BUCKET, CPU_BUCKET = 1 << 24, 1 << 18
"""Weights updated at once: bounds the fp32 temporaries to 16 bytes x this, 256 MiB; on a CPU to its caches."""

KERNEL_BATCH = 96
"""Parameters handed to the kernel at once: a GPU steps them while the host looks at the next."""

HALF = 1 << 15


class CompensatedAdamW(Optimizer):
    """AdamW; under bf16-true with exact fp32 weights in 16 + 16 bits. A plain AdamW step under 32-true and 16-true.

    Moments have the dtype of the weights, except under 16-true: fp32, because squares of gradients underflow fp16.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Of the running averages. 0.999 for the second never decays in bf16.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled: each step takes lr * weight_decay of the weight.
    """

    kernel = True
    """Whether the kernel may be used."""

    # torch's own protocol for "skip this step, decided on the device": the attributes `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative, betas {betas} lie in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_all([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _update_all(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        slowly: list[Tensor] = []
        quickly: dict[torch.device, list[Piece]] = {}
        found_inf = getattr(self, "found_inf", None)
        may = self.kernel and getattr(self, "grad_scale", None) is None
        with_kernel = self._with_kernel(params) if may else set()
        for param in params:
            state = self._state_of(param)
            if param.device not in with_kernel or not adamw_kernel.fits(param, state, group):
                slowly.append(param)
                continue
            pieces = quickly.setdefault(param.device, [])
            pieces.append(Piece.of(param, state))
            if len(pieces) == KERNEL_BATCH:
                adamw_kernel.step(quickly.pop(param.device), group, found_inf)
        for pieces in quickly.values():
            adamw_kernel.step(pieces, group, found_inf)
        for bucket in _buckets(piece for p in slowly for piece in _pieces(p, self._state_of(p))):
            self._update(bucket, group)

    def kernel_works(self) -> bool:
        """Whether the kernel is used for all bf16 weights that it takes; tries it out."""
        params = [param for group in self.param_groups for param in group["params"]]
        return self.kernel and self._with_kernel(params) == _devices(params)

    def _with_kernel(self, params: Sequence[Tensor]) -> set[torch.device]:
        """Devices of bf16 weights on which the kernel works."""
        return {device for device in _devices(params) if adamw_kernel.works_on(device, _both_ways)}

    def _update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        weights = [exact(piece.weight, piece.state) for piece in pieces]
        first, second = ([piece.state[name].float() for piece in pieces] for name in ("exp_avg", "exp_avg_sq"))
        adamw(
            weights,
            [piece.grad.float() for piece in pieces],
            first,
            second,
            [],
            [piece.state["step"] for piece in pieces],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for piece, weight, *moments in zip(pieces, weights, first, second, strict=True):
            if piece.weight.dtype != torch.float32:  # else all were updated in place
                store(piece, weight)
                piece.state["exp_avg"].copy_(moments[0])
                piece.state["exp_avg_sq"].copy_(moments[1])

    def exact_weight(self, param: Tensor, places: slice | None = None) -> Tensor:
        """The fp32 weight, a copy: of a bf16 parameter with the bits that rounding cut off.

        Args:
            param: One of those optimized.
            places: Only these of its flattened numbers.
        """
        state = self.state.get(param, {})  # `self.state[param]` would make one
        if places is None:
            return exact(param.detach(), state).clone()
        low_bits = {"low_bits": state["low_bits"].reshape(-1)[places]} if "low_bits" in state else {}
        return exact(param.detach().reshape(-1)[places], low_bits).clone()

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            moments = torch.float32 if param.dtype == torch.float16 else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=moments, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if param.dtype == torch.bfloat16:
                state["low_bits"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def _state_names(self, param: Tensor) -> set[str]:
        """What is kept of a parameter."""
        return {"step", "exp_avg", "exp_avg_sq"} | ({"low_bits"} if param.dtype == torch.bfloat16 else set())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state with the dtypes it was saved in.

        torch casts whatever it loads to the dtype of the parameter, which would round `low_bits` to bf16.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(saved, mine, strict=True):
            values = state_dict["state"].get(number, {})
            if values and values.keys() != self._state_names(param):
                raise InputError(
                    f"the optimizer state of a weight has {', '.join(sorted(values))} where {type(self).__name__} has "
                    f"{', '.join(sorted(self._state_names(param)))}: it is another optimizer's or another precision's; "
                    "start from the checkpoint's weights (model.pretrained: CHECKPOINT) instead of resuming",
                    key="ckpt_path",
                )
            for name, value in values.items():
                if name != "step" and value.shape != param.shape:
                    raise InputError(
                        f"{name} of the optimizer state has the shape {tuple(value.shape)}, its weight "
                        f"{tuple(param.shape)}: it is another model's; start from the checkpoint's weights "
                        "(model.pretrained: CHECKPOINT) instead of resuming",
                        key="ckpt_path",
                    )
                self.state[param][name] = value.to(device=param.device, copy=True)


class Piece(NamedTuple):  # a frozen dataclass takes twice as long to make, and every step makes hundreds
    """A parameter, or views of a stretch of a large one, of its gradient and of its state."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, param: Tensor, state: dict[str, Tensor]) -> Piece:
        """All of a parameter."""
        assert param.grad is not None
        return cls(param, param.grad, state)


def _devices(params: Iterable[Tensor]) -> set[torch.device]:
    """Of bf16 weights."""
    return {param.device for param in params if param.dtype == torch.bfloat16}


def _pieces(param: Tensor, state: dict[str, Tensor]) -> Iterator[Piece]:
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError("CompensatedAdamW takes no sparse gradients; set sparse=False on the embedding")
    most = _most(param)
    if param.numel() <= most or not (param.is_contiguous() and grad.is_contiguous()):
        yield Piece(param, grad, state)
        return
    for start in range(0, param.numel(), most):
        part = slice(start, start + most)
        views = {name: value.view(-1)[part] for name, value in state.items() if name != "step"}
        # Each update counts a step: only the last stretch may count the parameter's own.
        step = state["step"] if part.stop >= param.numel() else state["step"].clone()
        yield Piece(param.view(-1)[part], grad.view(-1)[part], {**views, "step": step})


def exact(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The fp32 weight; of a fp32 parameter the parameter itself."""
    if weight.dtype != torch.bfloat16 or "low_bits" not in state:
        return weight.float()
    wide = weight.float()  # its bits, and 16 zeros
    wide.view(torch.int32).add_(state["low_bits"].to(torch.int32))
    return wide


def store(piece: Piece, weight: Tensor) -> None:
    """Take over a new fp32 weight: as it is, or rounded with the bits that rounding cuts off."""
    if piece.weight.dtype != torch.bfloat16:
        piece.weight.copy_(weight)
        return
    # NaN becomes 0x7FC00000: rounding a GPU's 0x7FFFFFFF would carry into the sign and give -0.0.
    bits = weight.nan_to_num(math.nan, math.inf, -math.inf).view(torch.int32)
    high = (bits + HALF).bitwise_right_shift_(16)  # DTensor takes `>>` for nothing at all
    piece.weight.view(torch.int16).copy_(high)
    piece.state["low_bits"].copy_(bits.sub_(high.bitwise_left_shift_(16)))


def _buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    bucket: list[Piece] = []
    size = 0
    for piece in pieces:
        if bucket and (
            size + piece.weight.numel() > _most(piece.weight) or piece.weight.dtype != bucket[0].weight.dtype
        ):
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += piece.weight.numel()
    if bucket:
        yield bucket


def _most(weight: Tensor) -> int:
    """How many weights of this kind are updated at once; fp32 weights, updated in place, need no temporaries."""
    return CPU_BUCKET if weight.device.type == "cpu" and weight.dtype != torch.float32 else BUCKET


def _both_ways(device: torch.device) -> tuple[Tensor, Tensor]:
    """Exact weights after a step on a device: by the passes, and by the kernel."""
    rng = torch.Generator("cpu").manual_seed(0)
    group: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    # In Triton there is one kernel for multiples of 16, another for the rest; each steps 16,384 elements at a time.
    given = [_given(numel, rng, device) for numel in (20_884, 32_768)]
    found = []
    for kernel in (False, True):
        pieces = [copy.deepcopy(piece) for piece in given]
        if kernel:
            adamw_kernel.step(pieces, group)
        else:
            CompensatedAdamW([torch.nn.Parameter(torch.zeros(1))])._update(pieces, group)
        found.append(torch.cat([exact(piece.weight, piece.state) for piece in pieces]))
    return found[0], found[1]


def _given(numel: int, rng: torch.Generator, device: torch.device) -> Piece:
    numbers = [torch.randn(numel, generator=rng, device="cpu").to(device, torch.bfloat16) for _ in range(4)]
    weight, grad, first, second = numbers
    low_bits = torch.randint(-HALF, HALF, (numel,), generator=rng, dtype=torch.int16, device="cpu").to(device)
    step = torch.tensor(3.0, device=device)
    state = {"step": step, "exp_avg": first, "exp_avg_sq": second.abs(), "low_bits": low_bits}
    return Piece(weight, grad, state)
