"""One string decides the dtype of everything, and a step that is not finite never happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_trainer.precision.audit import exceptions, wrong_gradients, wrong_moments, wrong_weights
from lightning_trainer.types import InputError

PrecisionName = Literal["32-true", "bf16-true", "16-true"]

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}

NEVER = 2**62
"""A step that no run comes to."""

FP16_LOSS_SCALE = 1024.0
"""Fixed: fp16 gradients below 6e-8 vanish, this moves them up by three decades."""


class DtypeError(RuntimeError):
    """Tensors that are not of the run's one dtype, by name."""


class SingleDtypePrecision(Precision):
    """Every parameter, gradient and moment has one dtype. Nothing is cast: what is of another dtype is refused.

    The one mix, and only by name: adapters in fp32 (model.lora.dtype) on a base of 16 bits.

    It also decides, on the device and without waiting for it, that an update whose loss or gradient is NaN or Inf is
    not applied. Whoever reads `nonfinite_steps` (at log steps, before a checkpoint) decides what follows.

    Args:
        precision: 32-true, bf16-true or 16-true.

    Attributes:
        dtype: Of the run.
        grad_norm: Norm of the last step's gradient before clipping; fp32, on the device.
        nonfinite_steps: Updates not applied so far; int64, on the device.
    """

    def __init__(self, precision: PrecisionName = "bf16-true") -> None:
        if precision not in DTYPES:
            raise InputError(refusal(precision), key="trainer.precision")
        self.precision: Any = precision
        self.dtype = DTYPES[precision]
        self.scale = FP16_LOSS_SCALE if precision == "16-true" else 1.0
        self.grad_norm: Tensor | None = None
        self.nonfinite_steps = torch.zeros((), dtype=torch.int64)
        self._never = torch.full((), NEVER, dtype=torch.int64)
        self._first = self._never.clone()
        self._moments_audited = False

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Audit parameters and buffers; nothing is converted.

        A module says by `adapter_dtype` which dtype its adapters have, by `packed_base` that the rest is quantised.

        Raises:
            DtypeError: With the offending names.
        """
        adapters: torch.dtype | None = getattr(module, "adapter_dtype", None)
        self._fail(wrong_weights(module, self.dtype, adapters), "before training")
        named = exceptions(self.dtype, adapters, bool(getattr(module, "packed_base", False)))
        others = "; ".join(f"{name} ({dtype})" for name, dtype in named.items())
        rank_zero_info(f"one dtype for everything: {self.dtype}" + (f"; except {others}" if others else ""))
        return module

    def forward_context(self) -> Any:
        """Refuse a forward pass under autocast: it would compute in a second dtype."""
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            raise DtypeError("autocast is active: it computes in a second dtype; leave it off, or train in 32-true")
        return super().forward_context()

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss under 16-true."""
        loss = super().pre_backward(tensor, module)
        return loss if self.scale == 1.0 else loss * self.scale

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Take the gradient's norm in fp32 (bf16 norms are good to 3 digits) and clip by it, without waiting for it."""
        grads = _by_dtype([p.grad for p in self.main_params(optimizer) if p.grad is not None])
        norm = _norm(grads)
        self.grad_norm = norm if self.scale == 1.0 else norm / self.scale
        if clip_val <= 0:
            return
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
            torch.nn.utils.clip_grad_value_(self.main_params(optimizer), clip_val * self.scale)
            return
        factor = (clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for same in grads:
            _scale(same, factor)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Backward of the last micro-batch, hooks, clipping; then the update, unless something is not finite."""
        self.grad_norm = None
        loss = closure()
        self._after_closure(model, optimizer)
        if loss is None:
            return loss
        if self.grad_norm is None:
            self.clip_gradients(optimizer)
        assert self.grad_norm is not None
        seen = self.grad_norm
        if model.trainer.world_size == 1:  # a rank's own loss must not decide alone: the ranks would part ways
            seen = seen + getattr(model, "step_nats", loss)  # finite where both are
        skip = (seen - seen) != 0  # NaN where it is not finite; torch.isfinite takes twice as many operations
        self._count(skip, model.trainer.global_step + 1)
        if not self._moments_audited:
            self._fail(wrong_gradients(model), "after the first backward pass")
        _step_unless(skip, optimizer, self.scale)
        if not self._moments_audited:
            self._fail(wrong_moments(optimizer, model), "after the first optimizer step")
            self._moments_audited = True
        return loss

    def _count(self, skip: Tensor, step: int) -> None:
        if self._never.device != skip.device:
            self._never = self._never.to(skip.device)
            self.nonfinite_steps, self._first = self.nonfinite_steps.to(skip.device), self._first.to(skip.device)
        self.nonfinite_steps += skip
        torch.minimum(self._first, torch.add(self._never, skip, alpha=step - NEVER), out=self._first)

    @property
    def first_nonfinite(self) -> Tensor:
        """Optimizer step (1-based) of the first update not applied, or -1; int64, on the device."""
        return torch.where(self._first == NEVER, -1, self._first)

    def _fail(self, wrong: list[str], when: str) -> None:
        if wrong:
            names = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
            raise DtypeError(f"{len(wrong)} tensors are not {self.dtype} {when}:\n  {names}")

    def state_dict(self) -> dict[str, Any]:
        """Skipped steps so far."""
        return {"nonfinite_steps": int(self.nonfinite_steps), "first_nonfinite": int(self.first_nonfinite)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.nonfinite_steps = torch.tensor(state_dict["nonfinite_steps"])
        first = state_dict["first_nonfinite"]
        self._first = torch.tensor(NEVER if first < 0 else first)
        self._never = torch.tensor(NEVER)


def _norm(grads: list[list[Tensor]]) -> Tensor:
    """Euclidean norm of all gradients together; fp32 scalar on the device of the first."""
    if not grads:
        return torch.zeros(())
    norms = [torch.stack(torch._foreach_norm(same, 2, dtype=torch.float32)) for same in grads]
    together = norms[0] if len(norms) == 1 else torch.cat([norm.to(norms[0].device) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(together)
    return total


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply by a fp32 scalar as it is: rounded to bf16 it would miss the limit by 0.2 %."""
    if factor.device.type == "cpu" or grads[0].dtype == torch.float32:
        torch._foreach_mul_(grads, factor)
        return
    for grad in grads:  # a GPU rounds scalars to the dtype of what they multiply, but not what has dimensions
        grad.mul_(factor.reshape((1,) * grad.dim()) if grad.dim() else factor)


def _by_dtype(grads: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.dtype, grad.device), []).append(grad)
    return list(groups.values())


def _step_unless(skip: Tensor, optimizer: Optimizer, scale: float) -> None:
    """Step, unless `skip`; optimizers that know torch's `found_inf` decide that on the device."""
    wrapped: Any = getattr(optimizer, "_optimizer", optimizer)
    if getattr(wrapped, "_step_supports_amp_scaling", False):
        wrapped.found_inf = skip.float()
        wrapped.grad_scale = None if scale == 1.0 else torch.full((), scale, device=skip.device)  # waits for nothing
        try:
            optimizer.step()
        finally:
            del wrapped.found_inf, wrapped.grad_scale
    elif not skip.item():
        if scale != 1.0:
            torch._foreach_div_(
                [p.grad for group in wrapped.param_groups for p in group["params"] if p.grad is not None], scale
            )
        optimizer.step()


def refusal(precision: object) -> str:
    """Why a precision is refused."""
    reason = (
        "mixed precision computes in one dtype and keeps weights in another"
        if "mixed" in str(precision) or str(precision) in ("16", "bf16")
        else "it is none of ours"
    )
    return f"{precision!r} is refused: {reason}; choose one of {', '.join(DTYPES)}"
