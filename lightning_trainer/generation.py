"""Generate answers: token ids in, token ids out. The local backend, the preview worker and `predict` all call it."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_trainer.logits_rules import bounded
from lightning_trainer.types import PROMPTS_PER_BATCH, FinishReason, PreviewRequest, SamplingParams, seed_of_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnStep = Callable[[int, list[int]], None]
"""Called once per generated token of a batch, with the number of its first prompt and the new token of each row."""


@dataclass(frozen=True)
class Generation:
    """Answer to one prompt.

    Attributes:
        token_ids: Generated tokens, the stop token included.
        finish_reason: `non_finite` when the logits became NaN or Inf: the weights have diverged.
        seconds: Wall time of the batch this prompt was generated in.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: float


def generate(
    model: PreTrainedModel,
    requests: Sequence[PreviewRequest],
    sampling: SamplingParams,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """Answer every request, in order.

    The model is left as it was found: flags, attention, random generators. Greedy answers do not depend on which
    prompts share a batch. Sampled ones depend on the seed and on the order of the prompts; each batch of
    PROMPTS_PER_BATCH has a seed of its own (`seed_of_batch`), so that it may as well be asked for by itself.

    Args:
        model: On any device; its weights are only read.
        requests: Prompts of any lengths; shorter ones are padded on the left.
        sampling: For all prompts alike.
        on_step: Sees every token as it is chosen: padding where a row has stopped, -1 from the step on at which its
            logits were NaN or Inf. What it raises ends the generation and is raised here.
    """
    answers: list[Generation] = []
    with quiet(model), torch.random.fork_rng(devices=_cuda_devices(model)):
        for number, start in enumerate(range(0, len(requests), PROMPTS_PER_BATCH)):
            torch.manual_seed(seed_of_batch(sampling.seed, number))
            step = None if on_step is None else partial(on_step, start)
            answers += _generate_batch(model, requests[start : start + PROMPTS_PER_BATCH], sampling, step)
    return answers


def first_difference(
    model: PreTrainedModel, prompt_ids: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> tuple[int, int, int, float] | None:
    """Where two answers to one prompt part, and how near the model was to the other token.

    Where a device rounds otherwise, greedy answers part at a token whose gap is as small as the rounding; a large gap
    says that other weights or another prompt were read.

    Args:
        model: The one that gave `ours`.
        prompt_ids: Of the prompt, without padding.
        ours: Generated tokens.
        theirs: Those of another device or dtype.

    Returns:
        (place among the generated tokens, our token, their token, our token's logit less their token's), or None where
        they agree as far as the shorter one goes.
    """
    places = (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    place = next(places, None)
    if place is None:
        return None
    read = torch.tensor([[*prompt_ids, *ours[:place]]], device=model.device)
    with quiet(model), torch.inference_mode():
        logits = model(input_ids=read, use_cache=False).logits[0, -1].float()
    return place, ours[place], theirs[place], float(logits[ours[place]] - logits[theirs[place]])


def _generate_batch(
    model: PreTrainedModel,
    requests: Sequence[PreviewRequest],
    sampling: SamplingParams,
    on_step: Callable[[list[int]], None] | None,
) -> list[Generation]:
    from transformers import GenerationConfig

    from lightning_trainer.logits_rules import RuleProcessor

    started = time.perf_counter()
    pad = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
    input_ids, attention_mask = _left_pad([request.prompt_ids for request in requests], pad, model.device)
    finite = _FiniteGuard(len(requests))
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        chosen["top_k"] = sampling.top_k
    config = GenerationConfig(
        **chosen,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_token_ids) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    processors: list[Any] = [finite]
    if any(request.rules for request in requests):
        processors.append(RuleProcessor([request.rules for request in requests], input_ids.shape[1]))
    hooks: dict[str, Any] = {} if on_step is None else {"stopping_criteria": [_Watcher(on_step, finite)]}
    generate_tokens: Any = model.generate
    with torch.inference_mode():
        output = generate_tokens(
            input_ids, attention_mask=attention_mask, generation_config=config, logits_processor=processors, **hooks
        )
    rows = output[:, input_ids.shape[1] :].tolist()
    seconds = time.perf_counter() - started
    broken = finite.broken.tolist()
    return [_finish(row, bad, sampling, seconds) for row, bad in zip(rows, broken, strict=True)]


def _finish(row: list[int], broken: bool, sampling: SamplingParams, seconds: float) -> Generation:
    if broken:
        return Generation((), "non_finite", seconds)
    for place, token in enumerate(row):
        if token in sampling.stop_token_ids:
            return Generation(tuple(row[: place + 1]), "eos", seconds)
    return Generation(tuple(row), "length", seconds)


def _left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) int64 ids and mask, prompts ending at the same column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


class _FiniteGuard:
    """A logits processor that notes rows with NaN or Inf and keeps sampling from raising on them."""

    def __init__(self, rows: int) -> None:
        self.broken = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = ~torch.isfinite(scores).all(dim=-1)
        self.broken = self.broken.to(scores.device) | bad
        # Clamped, so that dividing by the temperature leaves it finite: on a GPU, drawing from NaN ends the process.
        return torch.where(bad[:, None], torch.zeros_like(scores), bounded(scores, scores.dtype))


class _Watcher:
    """A stopping criterion that stops nothing: transformers calls it once per token."""

    def __init__(self, on_step: Callable[[list[int]], None], finite: _FiniteGuard) -> None:
        self._on_step, self._finite = on_step, finite

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens = torch.where(self._finite.broken, -1, input_ids[:, -1])
        self._on_step(tokens.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def uncompiled() -> AbstractContextManager[Any]:
    """Within, layers that are compiled compute as if they were not, and nothing is compiled."""
    if "torch._dynamo" not in sys.modules:  # nor is anything compiled; to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without leaving a trace.

    Within: every module in eval mode, dropout and gradient checkpointing off, plain SDPA (ours knows only packed
    rows: a cached decode through it would return other tokens), nothing compiled, KV cache on. After: each module's own
    flag, the attention, the cache switch and the random generators of Python, numpy and torch as they were.
    """
    from transformers import GenerationConfig

    flags = [(module, module.training) for module in model.modules()]
    checkpointing: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    attn, use_cache = model.config._attn_implementation, model.config.use_cache
    # What a request leaves unset, transformers takes from here: the model's own would change answers unasked.
    own_defaults, model.generation_config = model.generation_config, GenerationConfig()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        _set_attention(model, "sdpa" if attn.startswith("lightning_trainer") else attn)
        model.config.use_cache = True
        with uncompiled():
            yield
    finally:
        model.config.use_cache = use_cache
        model.generation_config = own_defaults
        _set_attention(model, attn)
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, training in flags:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
