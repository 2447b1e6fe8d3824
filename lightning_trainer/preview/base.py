"""What a preview backend is: prompts in, answers out, each labelled with the step of the weights that wrote it."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_trainer.preview.prompter import Prompter
from lightning_trainer.types import PreviewRequest, PreviewResult, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_trainer.adapters import Adapter


GAVE_WAY = "another preview was asked for before this one was answered"


class PreviewBackend(ABC):
    """Generates answers with the weights of one optimizer step.

    `bind` comes first, once. Then `submit` hands prompts over, as token ids, and `collect` returns what is done, at
    once or steps later; `settle` comes before the weights change. `finish` and `close` end it. Several may ask through
    one backend, each with prompts of its own names: `claim` tells their answers apart.

    Attributes:
        backend_type: Stands in every result.
        run_id: Names the run, on resume too.
    """

    backend_type: ClassVar[str]

    def __init__(self) -> None:
        self.run_id = uuid.uuid4().hex
        self._prompter: Prompter | None = None
        self._model: PreTrainedModel | None = None
        self._adapter: Adapter | None = None
        self._unclaimed: list[PreviewResult] = []

    def is_bound_to(self, model: PreTrainedModel) -> bool:
        """Whether `bind` was called with this model, and `close` not since."""
        return self._model is model

    def bind(self, prompter: Prompter, model: PreTrainedModel, adapter: Adapter | None = None) -> None:
        """Tie the backend to what makes prompts and reads answers, and to the model whose weights are asked.

        Args:
            prompter: Of the run.
            model: In training.
            adapter: What of it is trained, where that is adapters.

        Raises:
            InputError: The backend cannot serve this model, or is not there and must be.
        """
        self._prompter, self._model, self._adapter = prompter, model, adapter

    @property
    def prompter(self) -> Prompter:
        """What makes prompts and reads answers.

        Raises:
            RuntimeError: The backend is not bound.
        """
        if self._prompter is None:
            raise RuntimeError(f"{type(self).__name__}.bind(prompter, model) comes before previews")
        return self._prompter

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained.

        Raises:
            RuntimeError: The backend is not bound.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__}.bind(prompter, model) comes before previews")
        return self._model

    def examine(
        self, model: PreTrainedModel, load_base: Callable[[], PreTrainedModel] | None = None
    ) -> tuple[str, str]:
        """Try, before a run, whether there would be answers.

        Args:
            model: Its shapes count, not its weights.
            load_base: Loads the weights that the run's adapters lie on, to be compared; None where it has none.

        Returns:
            (what answers, why nothing would); one of them is empty, or both where there is nothing to try.
        """
        return "", ""

    @abstractmethod
    def submit(self, requests: Sequence[PreviewRequest], sampling: SamplingParams, step: int) -> None:
        """Ask for answers by the weights of optimizer step `step`, which are those the model holds now.

        Until `settle` is called, the weights must stay as they are.
        """

    @abstractmethod
    def collect(self, timeout: float = 0.0) -> list[PreviewResult]:
        """Answers that are done and not yet collected, in order; waits up to `timeout` seconds for the first."""

    def claim(self, done: Sequence[PreviewResult], prompt_ids: Container[str]) -> list[PreviewResult]:
        """Of what is done, now and before, the answers to these prompts; the rest stays for others.

        Args:
            done: From `collect` or `finish`.
            prompt_ids: Names of the prompts.
        """
        if not done and not self._unclaimed:  # as at nearly every step
            return []
        unclaimed = [*self._unclaimed, *done]
        self._unclaimed = [result for result in unclaimed if result.prompt_id not in prompt_ids]
        return [result for result in unclaimed if result.prompt_id in prompt_ids]

    def settle(self) -> None:
        """What was submitted holds the weights of its step from here on: they are about to change."""
        return

    def make_room(self) -> None:
        """Wait, for a bounded time, until a preview asked for now would not be dropped: the run is about to end."""
        return

    def finish(self) -> list[PreviewResult]:
        """Wait for what is under way, for a bounded time; what is not done by then comes as failed."""
        return self.collect()

    def metrics(self) -> dict[str, float]:
        """Figures of the backend's own, by the names they have under `preview/`."""
        return {}

    def notices(self) -> list[str]:
        """What a person should be told since the last call, a line each."""
        return []

    def close(self) -> None:
        """Let go of whatever is held; may be called again."""
        self._prompter = self._model = self._adapter = None
        self._unclaimed = []

    def preview(
        self,
        prompt: str,
        golden_answer: str | None = None,
        step: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        **sampling: Any,
    ) -> PreviewResult:
        """One answer to one prompt, now.

        Args:
            prompt: What the user says; profile and template are applied to it.
            golden_answer: What a right answer says.
            step: Optimizer step the weights are of.
            max_new_tokens: Most tokens of the answer.
            temperature: 0 is greedy.
            **sampling: Other fields of `SamplingParams`.
        """
        name = f"preview-{uuid.uuid4().hex}"
        request = self.prompter.request({"prompt": prompt}, prompt_id=name, golden=golden_answer, step=step)
        params = self.prompter.sampling(max_new_tokens=max_new_tokens, temperature=temperature, **sampling)
        self.submit([request], params, step)
        self.settle()  # nobody else knows that a copy may be under way
        while done := self.collect(timeout=float("inf")):
            if own := self.claim(done, {name}):
                return own[0]
        return failed(request, self.backend_type, GAVE_WAY)


def failed(request: PreviewRequest, backend_type: str, message: str) -> PreviewResult:
    """The record of a preview that did not come about."""
    return PreviewResult(
        success=False,
        text="",
        prompt=request.prompt,
        golden_answer=request.golden_answer,
        step=request.step,
        tokens_generated=0,
        generation_time_sec=0.0,
        tokens_per_sec=0.0,
        backend_type=backend_type,
        timestamp=time.time(),
        error_message=message,
        finish_reason="error",
        prompt_id=request.prompt_id,
    )
