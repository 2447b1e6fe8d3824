"""The nouns every package shares.

Nothing here imports torch at run time: these records cross process and package borders, so they hold plain
values (the one exception is `Batch`, which holds tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Message = dict[str, Any]
"""One chat message as chat templates take it: `role`, `content` and whatever else the template reads."""

Row = Mapping[str, Any]
"""One row as it stands in the user's file."""

IGNORE_INDEX = -100
"""Label of a token that is not trained on; the value torch's cross entropy ignores."""


class InputError(ValueError):
    """Something the user can put right before training begins: exit status 2, no traceback.

    Args:
        message: What was wrong, the value, and the way out.
        key: Dotted key of the configuration the message is about, so that its file and line can be named.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class CheckResult:
    """What a profile says of one answer.

    Attributes:
        ok: The answer keeps the profile's contract (markers, prefix, suffix, …).
        correct: The answer is right; None where the profile cannot tell.
        reason: Why `ok` or `correct` is False; empty otherwise.
    """

    ok: bool
    correct: bool | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Contract kept and not known to be wrong."""
        return self.ok and self.correct is not False


@dataclass(frozen=True)
class PenaltyWindow:
    """For `steps` generated tokens the penalty is multiplied by `multiplier`."""

    steps: int
    multiplier: float


@dataclass(frozen=True)
class TokenPenalty:
    """Subtract `penalty`, times the multiplier of the schedule's present window, from the logits of `token_ids`."""

    token_ids: tuple[int, ...]
    penalty: float
    schedule: tuple[PenaltyWindow, ...] = ()
    label: str = "token_penalty"


@dataclass(frozen=True)
class AfterSequence:
    """Once any of `triggers` was *generated* in full, push the answer towards its end.

    With k tokens generated after the trigger, every token but `exempt_ids` loses
    `min(base_penalty * growth**k, max_penalty)` and each of `exempt_ids` gains `exempt_bonus`.
    The prompt's own tokens never trigger.
    """

    triggers: tuple[tuple[int, ...], ...]
    base_penalty: float
    growth: float
    max_penalty: float
    exempt_ids: tuple[int, ...]
    exempt_bonus: float = 0.0
    label: str = "after_sequence"


@dataclass(frozen=True)
class ForbidTokens:
    """These tokens are never generated."""

    token_ids: tuple[int, ...]
    label: str = "forbid"


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive and multiply negative logits of the last `window` generated tokens by `penalty`."""

    penalty: float
    window: int
    label: str = "repetition"


LogitsRule = TokenPenalty | AfterSequence | ForbidTokens | RepetitionPenalty
"""A closed set of rules as data: token ids in, so that a worker needs neither tokenizer nor profile."""


LEAST_TEMPERATURE = 1e-4
"""Logits divided by less than this may overflow, and no token would have a probability."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Most tokens generated per prompt.
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: 0 keeps every token.
        seed: Seeds sampling; without effect when greedy.
        stop_token_ids: Tokens that end an answer (end-of-turn, end-of-text).
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a number from {LEAST_TEMPERATURE:g}, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must lie in [0, 2**63), not {self.seed}")


PROMPTS_PER_BATCH = 16
"""Prompts generated at once, here or by a worker; more are split, so that the KV cache stays bounded."""


def seed_of_batch(seed: int, number: int) -> int:
    """Seed of batch `number` of a request; that of the first is the request's own."""
    return (seed + number) % (1 << 63)


@dataclass(frozen=True)
class PreviewRequest:
    """One prompt, as token ids. Text fields are for the reader of the result; generation never looks at them."""

    prompt_ids: tuple[int, ...]
    rules: tuple[LogitsRule, ...] = ()
    prompt_id: str = ""
    prompt: str = ""
    golden_answer: str | None = None
    step: int = 0


FinishReason = Literal["eos", "length", "non_finite", "error"]


SKIPPED = "skipped: "
"""How the error message of a preview begins that was not tried."""


@dataclass(frozen=True)
class PreviewResult:
    """One answer, labelled with the optimizer step of the weights that wrote it.

    Attributes:
        step: Optimizer step at which the preview was asked for.
        weights_step: Optimizer step of the weights that wrote the answer.
        tokens_generated: Answer tokens, the stop token included.
        timestamp: Unix seconds.
    """

    success: bool
    text: str
    prompt: str
    golden_answer: str | None
    step: int
    tokens_generated: int
    generation_time_sec: float
    tokens_per_sec: float
    backend_type: str
    timestamp: float
    error_message: str | None = None
    weights_step: int | None = None
    finish_reason: FinishReason | None = None
    check: CheckResult | None = None
    prompt_id: str = ""
    seed: int = 0

    @property
    def was_skipped(self) -> bool:
        """Whether it was not even tried, because nobody would have answered."""
        return (self.error_message or "").startswith(SKIPPED)


@dataclass
class Batch:
    """One micro-batch.

    Packed: `input_ids`, `labels` and `position_ids` are (1, T), every example of the micro-batch laid end to end;
    `example_lengths` says where each ends. Unpacked: they are (B, T), right-padded, and `attention_mask` marks tokens.

    Attributes:
        input_ids: int64.
        labels: int64; -100 where the token is not trained on. The first token of each example never is.
        predict_at: (N,) int64, places in the flattened (B*T) input whose next token is trained on.
        targets: (N,) int64, those next tokens. Both are made on the host, so that the loss never waits for the device.
        position_ids: int64, from 0 within each example.
        attention_mask: (B, T) int64, 1 on tokens; None when packed.
        example_lengths: Tokens of each example, in order. On the host: reading it never waits for the device.
        step_tokens: Trained tokens of the whole optimizer step, over all micro-batches and ranks.
        row_ids: Position of each example in the tokenised split.
    """

    input_ids: Tensor
    labels: Tensor
    predict_at: Tensor
    targets: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    example_lengths: tuple[int, ...]
    step_tokens: int
    row_ids: tuple[int, ...] = field(default=())

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy does not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with computing."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "labels", "predict_at", "targets", "position_ids", "attention_mask")
        changed: dict[str, Any] = {n: fn(tensor) for n in names if (tensor := getattr(self, n)) is not None}
        return replace(self, **changed)
