"""PredictionWriter: answers for `data.predict_path`, written as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.generation import generate
from lightning_trainer.preview import Prompter


class PredictionWriter(Callback):
    """Writes `predictions.jsonl`: one object per row, in the order of the file.

    Args:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy.
        seed: Of the sampling.
    """

    def __init__(self, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> None:
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self._written = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._prompter = Prompter(
            data.profile, module.tokenizer, data.rendered_system_prompt(), data.system_prompt_mode
        )
        self._path = Path(trainer.default_root_dir) / "predictions.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = self._path.with_name(f".{self._path.name}.tmp")
        self._tmp.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer one batch of conversations."""
        module: Any = pl_module
        requests = [self._prompter.request_of(row, row["origin"]) for row in batch]
        sampling = self._prompter.sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed + batch_idx
        )
        answers = generate(module.causal_lm, requests, sampling)
        with self._tmp.open("a", encoding="utf-8") as file:
            for request, answer in zip(requests, answers, strict=True):
                text = self._prompter.decode(answer.token_ids)
                check = self._prompter.profile.check(request.prompt, request.golden_answer, text)
                record = {
                    "row": request.prompt_id,
                    "prompt": request.prompt,
                    "answer": text,
                    "golden_answer": request.golden_answer,
                    "finish_reason": answer.finish_reason,
                    "check": vars(check),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._written += len(requests)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the file in place."""
        self._tmp.replace(self._path)
        trainer.print(f"{self._written} answers in {self._path}")
