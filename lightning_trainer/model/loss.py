"""Cross entropy over the trained tokens: the sum of nats, in fp32.

Two ways to the same number. `full` lets the model make its logits. `chunked` takes the hidden states of the trained
tokens to the output layer a chunk at a time and makes the gradients while the chunk's logits are there, so the (tokens,
vocabulary) logits never exist; it knows hidden states and one matrix only: a model that does more to its logits takes
`full`.

Shapes: N trained tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_trainer.model.probe import evaluating, packed_inputs
from lightning_trainer.pretrained import embedding_rows

LossName = Literal["chunked", "full"]

CHUNK, CPU_CHUNK = 512, 128
"""Tokens whose logits exist at once: 128 x 151,936 of them are 78 MB in fp32.

On a GPU each chunk reads the output layer twice and its gradient's total once, whatever its tokens are: with fewer it
would wait for memory. On a CPU fewer make slow matrix products, and more wait for memory.
"""

CACHED_ROWS = 4
"""Of logits: 2.4 MB at a vocabulary of 151,936."""

STRETCH = 1 << 22
"""Numbers that are added at once where that takes a copy of them."""

TRANSFORMS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Names by which configurations say that logits are changed; a soft-cap does not show at small logits."""


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Why `chunked` would not be this model's loss, or None where it is.

    Besides the names we know, the model itself is asked: its logits for a few tokens must be its output layer applied
    to its hidden states.
    """
    said = changed_logits(model)
    if said is not None:
        return said
    head = output_layer(model)
    inputs = packed_inputs(model, [torch.arange(8) * 7 % embedding_rows(model)])
    with evaluating(model), torch.no_grad():
        hidden = getattr(model.base_model(**inputs), "last_hidden_state", None)
        if hidden is None:
            return f"{type(model.base_model).__name__} gives no hidden states"
        logits, made = model(**inputs).logits.float(), head(hidden).float()
    if logits.shape != made.shape or not (logits - made).abs().max() <= 1e-3 * logits.abs().max():
        return "its logits are not its output layer applied to its hidden states"
    return None


def output_layer(model: PreTrainedModel) -> Any:
    """The layer that makes the logits; its trained copy, where peft keeps one (model.lora.modules_to_save)."""
    head: Any = model.get_output_embeddings()
    copies: Any = getattr(head, "modules_to_save", None)
    return head if copies is None else next(iter(copies.values()))


def changed_logits(model: PreTrainedModel) -> str | None:
    """What its class and configuration alone say against `chunked`, or None; no weight is looked at."""
    head = output_layer(model)
    if hasattr(head, "base_layer"):
        return "its output layer has an adapter"
    if not isinstance(head, torch.nn.Linear):
        return f"its output layer is {type(head).__name__}, not Linear"
    config = model.config.get_text_config()
    changed = [name for name in TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)]
    return f"it changes its logits ({changed[0]}={getattr(config, changed[0])})" if changed else None


def nats_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of nats.

    Args:
        logits: (N, V), of any float dtype.
        targets: (N,) int64.

    Returns:
        fp32 scalar.
    """
    # fp32: a bf16 log-softmax is off by up to 0.03 nats a token
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def nats_chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, expected: float = 1.0) -> Tensor:
    """Sum of nats without ever holding all logits.

    Args:
        hidden: (N, C).
        weight: (V, C), of the output layer.
        bias: (V,) or None.
        targets: (N,) int64.
        expected: What the sum's own gradient will be, about: then gradients are rounded once, at their final size.

    Returns:
        fp32 scalar; 0, with a gradient of zero, where N is 0.
    """
    nats: Tensor = _Chunked.apply(hidden, weight, bias, targets, expected)  # type: ignore[no-untyped-call]
    return nats


def chunk_on(device: torch.device) -> int:
    """Tokens of a chunk."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


class _Chunked(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits are there: none is computed twice.

    torch's own `linear_cross_entropy` rounds nats to the dtype of `hidden`, and adds the chunks' parts of the weight's
    gradient up in it: at 8,192 bf16 tokens that is 8.5e-3 off, here 2.0e-3, where full logits are 1.7e-3 off.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, expected: float
    ) -> Tensor:
        ctx.expected = expected
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        chunk = chunk_on(hidden.device)
        nats, scratch = torch.zeros((), device=hidden.device), _Scratch(min(chunk, len(targets)), weight)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = scratch.logits(hidden[part], weight, bias)
            nats += gradients_(logits, targets[part]) if sums.any else exponentials_(logits, targets[part])[0]
            if sums.any:
                sums.add(part, scratch.rounded(logits), logits, expected)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factor = gradient / ctx.expected
        grads = [
            None if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None


class _Scratch:
    """Memory for one chunk, used again for the next: fresh pages cost as much as a matrix product."""

    def __init__(self, tokens: int, weight: Tensor) -> None:
        self._made = weight.new_empty(tokens, len(weight))
        self._is_exact = weight.dtype == torch.float32
        self._wide = self._made if self._is_exact else torch.empty_like(self._made, dtype=torch.float32)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, V) fp32."""
        made = self._made[: len(hidden)]
        torch.mm(hidden, weight.T, out=made)
        if bias is not None:
            made += bias
        return made if self._is_exact else self._wide[: len(hidden)].copy_(made)

    def rounded(self, logits: Tensor) -> Tensor:
        """In the weight's dtype."""
        return logits if self._is_exact else self._made[: len(logits)].copy_(logits)


class _Gradients:
    """Of what has one; the weight's and the bias's add up in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> None:
        self._inputs, self._product = hidden, None
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        # The first chunk writes it, where there is one.
        begun = torch.empty_like if len(hidden) else torch.zeros_like
        self.weight = begun(weight, dtype=torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        self._layer = weight
        if self.weight is not None and weight.dtype != torch.float32:
            self._product = torch.empty_like(weight)
        self.any = any(needs[:3])

    def add(self, part: slice, rounded: Tensor, exact: Tensor, scale: float) -> None:
        """A chunk's.

        Args:
            part: Its tokens.
            rounded: (n, V) gradient of its logits, in their dtype.
            exact: The same in fp32.
            scale: On all of them.
        """
        if self.hidden is not None:
            torch.addmm(self.hidden[part], rounded, self._layer, beta=0, alpha=scale, out=self.hidden[part])
        if self.weight is not None:
            keep = 0.0 if part.start == 0 else 1.0
            if self._product is None:
                self.weight.addmm_(rounded.T, self._inputs[part], beta=keep, alpha=scale)
            else:
                product = torch.addmm(
                    self._product, rounded.T, self._inputs[part], beta=0, alpha=scale, out=self._product
                )
                _add_(self.weight, product, keep)
        if self.bias is not None:
            self.bias.add_(exact.sum(0), alpha=scale)


def _add_(total: Tensor, product: Tensor, keep: float) -> None:
    """total = keep * total + product, both of (V, C)."""
    # A CPU makes a fp32 copy of what it adds, so it takes a few rows at a time.
    rows = len(total) if total.device.type != "cpu" else max(1, STRETCH // total.shape[1])
    for mine, added in zip(total.split(rows), product.split(rows), strict=True):
        if keep:
            mine.add_(added)
        else:
            mine.copy_(added)


def gradients_(logits: Tensor, targets: Tensor) -> Tensor:
    """Make gradients of the nats out of logits, in place; a few rows at a time on a CPU, where its caches hold them.

    Args:
        logits: (n, V) fp32.
        targets: (n,) int64.

    Returns:
        Sum of nats of the targets, a fp32 scalar.
    """
    rows = CACHED_ROWS if logits.device.type == "cpu" else len(logits)
    nats = torch.zeros((), device=logits.device)
    for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        added, total = exponentials_(some, wanted)
        nats += added
        some.div_(total).scatter_add_(1, wanted[:, None], some.new_full((len(some), 1), -1.0))
    return nats


def exponentials_(logits: Tensor, targets: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Make exponentials of logits, in place; divided by their sums they are probabilities.

    Args:
        logits: (n, V) fp32.
        targets: (n,) int64.
        largest: (n, 1) of each row, where that is known already.

    Returns:
        (sum of nats of the targets, a fp32 scalar; (n, 1) the sums).
    """
    largest = logits.amax(-1, keepdim=True) if largest is None else largest
    wanted = logits.gather(-1, targets[:, None]) - largest
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return (total.log() - wanted).sum(), total


@torch.no_grad()
def evaluate_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64), a chunk of logits at a time."""
    nats, right = torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)
    chunk = chunk_on(hidden.device)
    scratch = _Scratch(min(chunk, len(targets)), weight)
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = scratch.logits(h, weight, bias)
        largest, guess = logits.max(-1, keepdim=True)
        right += (guess[:, 0] == t).sum()
        nats += exponentials_(logits, t, largest)[0]
    return nats, right
