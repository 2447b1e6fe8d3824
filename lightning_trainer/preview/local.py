"""LocalPreviewBackend: answers by the model that trains, in the training thread, between two optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_trainer.generation import generate
from lightning_trainer.preview.base import PreviewBackend
from lightning_trainer.types import PreviewRequest, PreviewResult, SamplingParams


class LocalPreviewBackend(PreviewBackend):
    """Generates at once, with the weights as they are; training waits for it and is not changed by it."""

    backend_type: ClassVar[str] = "local"

    def __init__(self) -> None:
        super().__init__()
        self._done: list[PreviewResult] = []

    def submit(self, requests: Sequence[PreviewRequest], sampling: SamplingParams, step: int) -> None:
        """Generate the answers now."""
        answers = generate(self.model, requests, sampling)
        self._done += [
            self.prompter.result(
                request,
                answer.token_ids,
                answer.finish_reason,
                answer.seconds,
                self.backend_type,
                weights_step=step,
                seed=sampling.seed,
            )
            for request, answer in zip(requests, answers, strict=True)
        ]

    def collect(self, timeout: float = 0.0) -> list[PreviewResult]:
        """The answers of every `submit` since the last call."""
        done, self._done = self._done, []
        return done
