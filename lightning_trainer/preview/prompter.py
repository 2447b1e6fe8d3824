"""Prompter: the same profile and chat template as training make the prompts and read the answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_trainer import template
from lightning_trainer.profiles import DataProfile
from lightning_trainer.profiles.base import SystemPromptMode, accepted_keywords
from lightning_trainer.profiles.row_forms import text_of
from lightning_trainer.types import FinishReason, PreviewRequest, PreviewResult, Row, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompter:
    """Turns rows into requests of token ids, and token ids into checked answers.

    Args:
        profile: Of the run.
        tokenizer: With its chat template.
        system_prompt: Rendered, or None.
        system_prompt_mode: As in training.
    """

    def __init__(
        self,
        profile: DataProfile,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        system_prompt_mode: SystemPromptMode = "prepend",
    ) -> None:
        self.profile, self.tokenizer = profile, tokenizer
        self.system_prompt, self.system_prompt_mode = system_prompt, system_prompt_mode
        self.stop_token_ids = template.stop_token_ids(tokenizer)

    def request(self, row: Row, prompt_id: str, golden: str | None = None, step: int = 0) -> PreviewRequest:
        """Request for a row as a user would write it: profile and template are applied here."""
        keywords = accepted_keywords(self.profile, system_prompt_mode=self.system_prompt_mode)
        conversation = self.profile.transform_example(row, 0, self.system_prompt, **keywords)
        return self.request_of(conversation, prompt_id, golden, step)

    def request_of(
        self, conversation: dict[str, Any], prompt_id: str, golden: str | None = None, step: int = 0
    ) -> PreviewRequest:
        """Request for a conversation the profile has already made; a closing assistant turn is the golden answer."""
        messages = list(conversation["messages"])
        if messages[-1]["role"] == "assistant":
            golden = text_of(messages.pop()) if golden is None else golden
        if not messages:
            raise ValueError("the conversation starts with the assistant: there is no prompt to answer")
        prompt = text_of(messages[-1])
        return PreviewRequest(
            prompt_ids=template.prompt_ids(self.tokenizer, {**conversation, "messages": messages}),
            rules=self.profile.build_logits_rules(self.tokenizer, prompt),
            prompt_id=prompt_id,
            prompt=prompt,
            golden_answer=golden,
            step=step,
        )

    def sampling(self, **fields: Any) -> SamplingParams:
        """Sampling parameters that stop where the template ends a turn."""
        return SamplingParams(**{"stop_token_ids": self.stop_token_ids, **fields})

    def result(
        self,
        request: PreviewRequest,
        token_ids: Sequence[int],
        finish_reason: FinishReason,
        seconds: float,
        backend_type: str,
        weights_step: int,
        seed: int,
    ) -> PreviewResult:
        """The answer as text, with the profile's verdict."""
        text = self.decode(token_ids)
        return PreviewResult(
            success=finish_reason != "non_finite",
            text=text,
            prompt=request.prompt,
            golden_answer=request.golden_answer,
            step=request.step,
            tokens_generated=len(token_ids),
            generation_time_sec=seconds,
            tokens_per_sec=len(token_ids) / seconds if seconds > 0 else 0.0,
            backend_type=backend_type,
            timestamp=time.time(),
            error_message="the logits were NaN or Inf" if finish_reason == "non_finite" else None,
            weights_step=weights_step,
            finish_reason=finish_reason,
            check=self.profile.check(request.prompt, request.golden_answer, text),
            prompt_id=request.prompt_id,
            seed=seed,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, without the token that ends it; everything else stands as it was generated."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
