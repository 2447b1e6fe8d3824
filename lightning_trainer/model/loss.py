"""Cross entropy over the trained tokens: the sum of nats, in fp32.

Two ways to the same number: from all logits, or from hidden states, which go to the output layer a chunk at a time.
The gradients are made while a chunk's logits are there, so the (tokens, vocabulary) logits never exist.

Shapes: N trained tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, CPU_CHUNK = 512, 256
"""Tokens whose logits exist at once: 256 x 151,936 of them are 156 MB in fp32.

On a GPU each chunk reads the output layer twice and its gradient's total once, whatever its tokens are: with fewer it
would wait for memory. On a CPU 512 would take twice the memory for 5 % less time.
"""

EXACT, CPU_EXACT = 1 << 24, 1 << 19
"""Logits that are taken to fp32 probabilities at once: 64 MiB, with few kernels to start; 2 MiB, which caches hold."""

STRETCH = 1 << 22
"""Numbers that are added at once where that takes a copy of them."""


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


class LogitsBuffer:
    """Memory for the logits of a chunk; a CPU's is kept, as a GPU's allocator keeps its own.

    Fresh pages cost as much as a matrix product.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}  # a copy makes its own

    def rows(self, wanted: int, weight: Tensor) -> Tensor:
        """(wanted, V) of the weight's dtype and device, with any numbers in it."""
        kept = self._kept
        if kept is not None and self._is_like(kept, weight) and len(kept) >= wanted:
            return kept[:wanted]
        with torch.inference_mode(False):  # what validation makes, training writes to
            made = weight.new_empty(wanted, len(weight))
        if made.device.type == "cpu":
            self._kept = made
        return made

    @staticmethod
    def _is_like(kept: Tensor, weight: Tensor) -> bool:
        return (kept.shape[1], kept.dtype, kept.device) == (len(weight), weight.dtype, weight.device)


def nats_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    expected: float = 1.0,
    buffer: LogitsBuffer | None = None,
) -> Tensor:
    """Sum of nats without ever holding all logits.

    Args:
        hidden: (N, C).
        weight: (V, C), of the output layer.
        bias: (V,) or None.
        targets: (N,) int64.
        expected: What the sum's own gradient will be, about: then gradients are rounded once, at their final size.
        buffer: Kept between calls; None allocates one for this call.

    Returns:
        fp32 scalar; 0, with a gradient of zero, where N is 0.
    """
    buffer = LogitsBuffer() if buffer is None else buffer
    nats: Tensor = _Chunked.apply(hidden, weight, bias, targets, expected, buffer)  # type: ignore[no-untyped-call]
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
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        expected: float,
        buffer: LogitsBuffer,
    ) -> Tensor:
        ctx.expected = expected
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        nats: list[Tensor] = []
        for part, logits in _chunks(hidden, weight, bias, buffer):
            if sums.any:
                nats.append(gradients_(logits, targets[part], sums.bias, expected))
                sums.add(part, logits, expected)
            else:
                nats.extend(rows.nats for rows in _few_rows(logits, targets[part]))
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
        return _total(nats, hidden.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        factor = gradient / ctx.expected
        grads = [
            None if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: LogitsBuffer
) -> Iterator[tuple[slice, Tensor]]:
    """Places of a chunk's tokens, and their logits, which hold until the next chunk."""
    size = chunk_on(hidden.device)
    rows = buffer.rows(min(size, len(hidden)), weight)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = torch.mm(hidden[part], weight.T, out=rows[: len(hidden) - start])
        yield part, logits if bias is None else logits.add_(bias)


class _Gradients:
    """Of what has one; the weight's and the bias's add up in fp32, the bias's in `gradients_`."""

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

    def add(self, part: slice, logits: Tensor, scale: float) -> None:
        """A chunk's.

        Args:
            part: Its tokens.
            logits: (n, V) gradients of their logits.
            scale: On all of them.
        """
        if self.hidden is not None:
            self.hidden[part].addmm_(logits, self._layer, beta=0, alpha=scale)
        if self.weight is not None:
            keep = 0.0 if part.start == 0 else 1.0
            if self._product is None:
                self.weight.addmm_(logits.T, self._inputs[part], beta=keep, alpha=scale)
            else:
                _add_(self.weight, self._product.addmm_(logits.T, self._inputs[part], beta=0, alpha=scale), keep)


def _add_(total: Tensor, product: Tensor, keep: float) -> None:
    """total = keep * total + product, both of (V, C)."""
    # A CPU makes a fp32 copy of what it adds, so it takes a few rows at a time.
    rows = len(total) if total.device.type != "cpu" else max(1, STRETCH // total.shape[1])
    for mine, added in zip(total.split(rows), product.split(rows), strict=True):
        if keep:
            mine.add_(added)
        else:
            mine.copy_(added)


def gradients_(logits: Tensor, targets: Tensor, bias_gradient: Tensor | None = None, bias_scale: float = 1.0) -> Tensor:
    """Make gradients of the nats out of logits, in place, rounded once.

    Args:
        logits: (n, V), of any float dtype.
        targets: (n,) int64.
        bias_gradient: (V,) fp32; their sum over the tokens is added to it, before they are rounded.
        bias_scale: On that sum.

    Returns:
        Sum of nats of the targets, a fp32 scalar.
    """
    nats = []
    for rows in _few_rows(logits, targets):
        nats.append(rows.nats)
        less_one = rows.probabilities.new_full((len(rows.targets), 1), -1.0)
        gradients = rows.probabilities.scatter_add_(1, rows.targets[:, None], less_one)
        if bias_gradient is not None:
            bias_gradient.add_(gradients.sum(0), alpha=bias_scale)
        rows.logits.copy_(gradients)
    return _total(nats, logits.device)


@torch.no_grad()
def evaluate_chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, buffer: LogitsBuffer | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64); arguments as of `nats_chunked`."""
    nats, right = [], torch.zeros((), dtype=torch.int64, device=hidden.device)
    for part, logits in _chunks(hidden, weight, bias, LogitsBuffer() if buffer is None else buffer):
        chunk_nats, chunk_right = evaluate(logits, targets[part])
        nats.append(chunk_nats)
        right += chunk_right
    return _total(nats, hidden.device), right


@torch.no_grad()
def evaluate(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64).

    Args:
        logits: (n, V), of any float dtype.
        targets: (n,) int64.
    """
    nats, right = [], torch.zeros((), dtype=torch.int64, device=logits.device)
    for rows in _few_rows(logits, targets):
        nats.append(rows.nats)
        right += (rows.logits.max(-1).indices == rows.targets).sum()
    return _total(nats, logits.device), right


def _total(nats: list[Tensor], device: torch.device) -> Tensor:
    # All at once, pairwise: one after the other they would be rounded as often as there are parts.
    return torch.stack(nats).sum() if nats else torch.zeros((), dtype=torch.float32, device=device)


class _Rows(NamedTuple):
    """A few rows of logits.

    Attributes:
        logits: (n, V), a view.
        targets: (n,) int64.
        nats: Sum of nats of the targets, a fp32 scalar.
        probabilities: (n, V) fp32, which hold until the next rows.
    """

    logits: Tensor
    targets: Tensor
    nats: Tensor
    probabilities: Tensor


def _few_rows(logits: Tensor, targets: Tensor) -> Iterator[_Rows]:
    most = max(1, (CPU_EXACT if logits.device.type == "cpu" else EXACT) // logits.shape[1])
    softmax = torch.empty_like(logits[:most], dtype=torch.float32)
    widened = None if logits.dtype == torch.float32 else torch.empty_like(softmax)
    for some, wanted in zip(logits.split(most), targets.split(most), strict=True):
        exact = some if widened is None else widened[: len(some)].copy_(some)
        probabilities = torch.softmax(exact, -1, out=softmax[: len(some)])
        largest, picked = exact.amax(-1), exact.gather(-1, wanted[:, None])[:, 0]
        # The largest probability is 1 / the sum of exponentials; a target's own can be 0.
        nats = (largest - picked - probabilities.amax(-1).log()).sum()
        yield _Rows(some, wanted, nats, probabilities)
