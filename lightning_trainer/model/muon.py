"""CompensatedMuon: Muon for the hidden matrices, AdamW for everything else, on exact fp32 weights under bf16-true.

Muon takes the momentum of a matrix to the nearest orthogonal matrix, so that every direction is learnt at one rate. It
is made for matrices between hidden states; embeddings, the output layer, norms and biases stay with AdamW. The
arithmetic of both is torch's own; how bf16 weights lose no update stands in `optim`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim._muon import muon  # torch.optim.Muon's own arithmetic, which has no public name

from lightning_trainer.model.optim import CompensatedAdamW, Piece, exact, store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEWTON_SCHULZ: dict[str, Any] = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
"""As torch.optim.Muon has them."""


class CompensatedMuon(CompensatedAdamW):
    """Muon for matrices and AdamW for the rest, at one learning rate.

    Args:
        params: Parameters or groups.
        lr: Learning rate, of both.
        momentum: Of Muon.
        nesterov: Whether Muon looks ahead.
        adjust_lr: How Muon's rate follows a matrix's shape: match_rms_adamw makes its updates as large as AdamW's, so
            that AdamW's rates fit; original is for rates of 0.02 or so.
        betas: Of AdamW's running averages.
        eps: Of AdamW.
        weight_decay: Decoupled: each step takes lr * weight_decay of the weight; in both.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-5,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.momentum, self.nesterov, self.adjust_lr = momentum, nesterov, adjust_lr
        self._left: set[Tensor] = set()

    def leave_to_adamw(self, params: Iterable[Tensor]) -> None:
        """Name matrices that are not between hidden states: embeddings, the output layer. Before the first step."""
        self._left.update(params)

    def is_muons(self, param: Tensor) -> bool:
        """Whether Muon updates this parameter."""
        return param.ndim == 2 and param not in self._left

    def _update_all(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        super()._update_all([param for param in params if not self.is_muons(param)], group)
        for param in params:
            if self.is_muons(param):
                self._orthogonal_update(param, group)

    def _orthogonal_update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self._state_of(param)
        before, buffer = exact(param.detach(), state), state["momentum_buffer"].to(torch.float32, copy=True)
        weight = before.clone()
        muon(
            [weight],
            [param.grad.float()],
            [buffer],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=self.momentum,
            nesterov=self.nesterov,
            adjust_lr_fn=self.adjust_lr,
            has_complex=False,
            **NEWTON_SCHULZ,
        )
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:  # decided on the device: nothing changes where the gradient is not finite
            keep = found_inf.bool()
            weight = torch.where(keep, before, weight)
            buffer = torch.where(keep, state["momentum_buffer"].float(), buffer)
        store(Piece(param, param.grad, state), weight)
        state["momentum_buffer"].copy_(buffer)

    def _state_names(self, param: Tensor) -> set[str]:
        """See CompensatedAdamW."""
        if not self.is_muons(param):
            return super()._state_names(param)
        return {"momentum_buffer"} | ({"low_bits"} if param.dtype == torch.bfloat16 else set())

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not self.is_muons(param) or state:
            return super()._state_of(param)
        state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if param.dtype == torch.bfloat16:
            state["low_bits"] = torch.zeros_like(param, dtype=torch.int16)
        return state


def outer_matrices(model: PreTrainedModel) -> Iterator[Tensor]:
    """Those of embeddings, learned positions among them, and of the output layer; adapters of them included."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for part in (*tables, model.get_input_embeddings(), *([] if head is None else [head])):
        yield from part.parameters()
