"""The chunked loss against full logits: time, memory and error, in training and in validation.

python tools/bench loss [--quick]

Shapes: T 1,024 tokens of which 45 % are trained on, C hidden size 128, V vocabulary 151,936, as Qwen3's. Full logits
are what a model's own loss does: an output layer over all tokens, fp32, cross entropy that ignores the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from measure import Row, interleaved, ratios
from torch import Tensor

from lightning_trainer.model.loss import LogitsBuffer, evaluate_chunked, nats_chunked
from lightning_trainer.types import IGNORE_INDEX

TOKENS, HIDDEN, VOCABULARY, TRAINED = 1024, 128, 151_936, 0.45
MOST_TIME = {torch.float32: 0.30, torch.bfloat16: 0.40}
MOST_MEMORY, MOST_ERROR = 0.15, 1e-4


@dataclass
class Case:
    """What the loss is taken of.

    Attributes:
        hidden: (T, C), with a gradient.
        weight: (V, C), with a gradient.
        labels: (T,) int64; -100 where the token is not trained on.
        predict_at: (N,) places of those that are.
        targets: (N,) their labels.
        buffer: Kept from step to step, as in `fit`.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    predict_at: Tensor
    targets: Tensor
    buffer: LogitsBuffer = field(default_factory=LogitsBuffer)

    def full(self) -> Tensor:
        """Sum of nats by full logits."""
        logits = F.linear(self.hidden, self.weight).float()
        return F.cross_entropy(logits, self.labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def ours(self) -> Tensor:
        """The same by ours."""
        return nats_chunked(self.hidden[self.predict_at], self.weight, None, self.targets, buffer=self.buffer)

    @torch.no_grad()
    def evaluate_full(self) -> tuple[Tensor, Tensor]:
        """Sum of nats and right guesses by full logits."""
        logits = F.linear(self.hidden, self.weight).float()
        right = (logits.argmax(-1) == self.labels).sum()
        return F.cross_entropy(logits, self.labels, ignore_index=IGNORE_INDEX, reduction="sum"), right

    def evaluate_ours(self) -> tuple[Tensor, Tensor]:
        """The same by ours."""
        return evaluate_chunked(self.hidden[self.predict_at], self.weight, None, self.targets, self.buffer)

    def learn(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward, from no gradient."""
        self.hidden.grad = self.weight.grad = None
        (loss() / len(self.targets)).backward()  # type: ignore[no-untyped-call]


def make(dtype: torch.dtype) -> Case:
    """The same numbers every time."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=rng).to(dtype)
    weight = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=rng)).to(dtype)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    trained = torch.rand(TOKENS, generator=rng) < TRAINED
    labels = torch.where(trained, tokens, IGNORE_INDEX)
    predict_at = trained.nonzero().flatten()
    return Case(hidden.requires_grad_(), weight.requires_grad_(), labels, predict_at, tokens[predict_at])


def exact_loss(case: Case) -> float:
    """Nats per token in fp64, a few tokens at a time."""
    hidden, weight = case.hidden.detach()[case.predict_at].double(), case.weight.detach().double()
    parts = zip(hidden.split(64), case.targets.split(64), strict=True)
    return sum(float(F.cross_entropy(h @ weight.T, t, reduction="sum")) for h, t in parts) / len(case.targets)


def peak_bytes(act: Callable[[], object]) -> int:
    """Most memory held at once by tensors that `act` makes, gradients included.

    torch's profiler notes what its allocator gives and takes back, within operators too; what a matrix library keeps
    for itself is not among it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def train_rows(dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Forward and backward."""
    name, case = f"{dtype}".removeprefix("torch."), make(dtype)
    arms = {"full": lambda: case.learn(case.full), "ours": lambda: case.learn(case.ours)}
    seconds = interleaved(arms, rounds)
    yield Row(f"{name} training, time / full", ratios(seconds["ours"], seconds["full"]), at_most=MOST_TIME[dtype])
    peaks = {arm: _from_nothing(case, act) for arm, act in arms.items()}
    yield _memory(f"{name} training, memory / full", peaks)
    error = abs(float(case.ours().detach()) / len(case.targets) - exact_loss(case))
    yield Row(f"{name} training, error", (error,), "nats", at_most=MOST_ERROR, note="per token, against fp64")


def evaluation_rows(dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Forward alone, with the count of right guesses."""
    name, case = f"{dtype}".removeprefix("torch."), make(dtype)
    seconds = interleaved({"full": case.evaluate_full, "ours": case.evaluate_ours}, rounds)
    yield Row(f"{name} validation, time / full", ratios(seconds["ours"], seconds["full"]))
    peaks = {"full": _from_nothing(case, case.evaluate_full), "ours": _from_nothing(case, case.evaluate_ours)}
    yield _memory(f"{name} validation, memory / full", peaks)
    error = abs(float(case.evaluate_ours()[0]) / len(case.targets) - exact_loss(case))
    yield Row(f"{name} validation, error", (error,), "nats", at_most=MOST_ERROR, note="per token, against fp64")


def _from_nothing(case: Case, act: Callable[[], object]) -> int:
    case.hidden.grad = case.weight.grad = None
    case.buffer = LogitsBuffer()
    return peak_bytes(act)


def _memory(what: str, peaks: dict[str, int]) -> Row:
    note = f"{peaks['ours'] / 1e6:.0f} of {peaks['full'] / 1e6:.0f} MB above what was there before"
    return Row(what, (peaks["ours"] / peaks["full"],), at_most=MOST_MEMORY, note=note)


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    rounds = 3 if quick else 9
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += [*train_rows(dtype, rounds), *evaluation_rows(dtype, rounds)]
    return rows
