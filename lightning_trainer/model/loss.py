"""Cross entropy over the trained tokens: the sum of nats, in fp32.

Two ways to the same number: from all logits, or from hidden states, which go to the output layer a chunk at a time.
The gradients are made while a chunk's logits are there, so the (tokens, vocabulary) logits never exist.

Shapes: N trained tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, CPU_CHUNK = 512, 256
"""Tokens whose logits exist at once: 256 x 151,936 of them are 156 MB in fp32.

On a GPU each chunk reads the output layer twice and its gradient's total once, whatever its tokens are: with fewer it
would wait for memory. On a CPU fewer make slow matrix products, and more wait for fresh memory.
"""

ROWS, CPU_ROWS = 128, 4
"""Tokens whose probabilities exist at once, in fp32: 78 MB at a vocabulary of 151,936; 2.4 MB, which caches hold."""

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


class ChunkMemory:
    """For the logits of a chunk; a CPU's is kept, as a GPU's allocator keeps its own.

    Fresh pages cost as much as a matrix product.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def rows(self, wanted: int, weight: Tensor) -> Tensor:
        """(wanted, V) of the weight's dtype and device, with any numbers in it."""
        kept = self._kept
        if kept is not None and len(kept) >= wanted and kept.shape[1] == len(weight) and kept.dtype == weight.dtype:
            return kept[:wanted]
        with torch.inference_mode(False):  # what validation makes, training writes to
            made = weight.new_empty(wanted, len(weight))
        if made.device.type == "cpu":
            self._kept = made
        return made


def nats_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    expected: float = 1.0,
    memory: ChunkMemory | None = None,
) -> Tensor:
    """Sum of nats without ever holding all logits.

    Args:
        hidden: (N, C).
        weight: (V, C), of the output layer.
        bias: (V,) or None.
        targets: (N,) int64.
        expected: What the sum's own gradient will be, about: then gradients are rounded once, at their final size.
        memory: To use; None makes some.

    Returns:
        fp32 scalar; 0, with a gradient of zero, where N is 0.
    """
    memory = memory or ChunkMemory()
    nats: Tensor = _Chunked.apply(hidden, weight, bias, targets, expected, memory)  # type: ignore[no-untyped-call]
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
        memory: ChunkMemory,
    ) -> Tensor:
        ctx.expected = expected
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        chunk = chunk_on(hidden.device)
        nats, rows = torch.zeros((), device=hidden.device), memory.rows(min(chunk, len(hidden)), weight)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = logits_into(rows, hidden[part], weight, bias)
            if sums.any:
                nats += gradients_(logits, targets[part])
                sums.add(part, logits, expected)
            else:
                nats += evaluate(logits, targets[part])[0]
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
        return *grads, None, None, None


def logits_into(rows: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) logits, in the first of the rows."""
    logits = torch.mm(hidden, weight.T, out=rows[: len(hidden)])
    return logits if bias is None else logits.add_(bias)


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

    def add(self, part: slice, logits: Tensor, scale: float) -> None:
        """A chunk's.

        Args:
            part: Its tokens.
            logits: (n, V) gradients of their logits.
            scale: On all of them.
        """
        if self.hidden is not None:
            torch.addmm(self.hidden[part], logits, self._layer, beta=0, alpha=scale, out=self.hidden[part])
        if self.weight is not None:
            keep = 0.0 if part.start == 0 else 1.0
            if self._product is None:
                self.weight.addmm_(logits.T, self._inputs[part], beta=keep, alpha=scale)
            else:
                product = torch.addmm(
                    self._product, logits.T, self._inputs[part], beta=0, alpha=scale, out=self._product
                )
                _add_(self.weight, product, keep)
        if self.bias is not None:
            self.bias.add_(logits.sum(0, dtype=torch.float32), alpha=scale)


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
    """Make gradients of the nats out of logits, in place, rounded once.

    Args:
        logits: (n, V), of any float dtype.
        targets: (n,) int64.

    Returns:
        Sum of nats of the targets, a fp32 scalar.
    """
    nats, few = torch.zeros((), device=logits.device), _FewRows(logits)
    for some, wanted in few.of(logits, targets):
        more, probabilities = few.softmax(some, wanted)
        nats += more
        some.copy_(probabilities.scatter_add_(1, wanted[:, None], probabilities.new_full((len(some), 1), -1.0)))
    return nats


@torch.no_grad()
def evaluate_chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, memory: ChunkMemory | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64); arguments as of `nats_chunked`."""
    nats, right = torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)
    chunk = chunk_on(hidden.device)
    rows = (memory or ChunkMemory()).rows(min(chunk, len(hidden)), weight)
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        more_nats, more_right = evaluate(logits_into(rows, h, weight, bias), t)
        nats += more_nats
        right += more_right
    return nats, right


def evaluate(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nats (fp32) and count of tokens guessed right (int64).

    Args:
        logits: (n, V), of any float dtype.
        targets: (n,) int64.
    """
    nats, right = torch.zeros((), device=logits.device), torch.zeros((), dtype=torch.int64, device=logits.device)
    few = _FewRows(logits)
    for some, wanted in few.of(logits, targets):
        nats += few.softmax(some, wanted)[0]
        right += (some.max(-1).indices == wanted).sum()
    return nats, right


class _FewRows:
    """fp32 memory for a few rows of logits at a time."""

    def __init__(self, logits: Tensor) -> None:
        self._rows = CPU_ROWS if logits.device.type == "cpu" else ROWS
        self._probabilities = torch.empty_like(logits[: self._rows], dtype=torch.float32)
        self._wide = None if logits.dtype == torch.float32 else torch.empty_like(self._probabilities)

    def of(self, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As many rows at a time."""
        return zip(logits.split(self._rows), targets.split(self._rows), strict=True)

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats of the targets, and the probabilities, until the next call."""
        wide = logits if self._wide is None else self._wide[: len(logits)].copy_(logits)
        probabilities = torch.softmax(wide, -1, out=self._probabilities[: len(logits)])
        largest, wanted = wide.amax(-1), wide.gather(-1, targets[:, None])[:, 0]
        # The largest probability is 1 / the sum of exponentials; a target's own can be 0.
        return (largest - wanted - probabilities.amax(-1).log()).sum(), probabilities
