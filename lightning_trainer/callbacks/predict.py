"""PredictionWriter: answers for `data.predict_path`, written as they come."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import cycle, islice
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

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file."""
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._prompter = Prompter(
            data.profile, module.tokenizer, data.rendered_system_prompt(), data.system_prompt_mode
        )
        self._path = Path(trainer.default_root_dir) / "predictions.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._parts = [self._path.with_name(f".{self._path.name}.tmp-{rank}") for rank in range(trainer.world_size)]
        self._tmp = self._parts[trainer.global_rank]
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
        if not batch:
            return
        number = batch_idx * trainer.world_size + trainer.global_rank
        module: Any = pl_module
        requests = [self._prompter.request_of(row, row["origin"]) for row in batch]
        sampling = self._prompter.sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed + number
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

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the file together, in the order of the rows, and in place."""
        trainer.strategy.barrier("PredictionWriter")
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        whole = self._path.with_name(f".{self._path.name}.tmp")
        with ExitStack() as stack:
            file = stack.enter_context(whole.open("w", encoding="utf-8"))
            parts = cycle([stack.enter_context(part.open(encoding="utf-8")) for part in self._parts])
            written = 0
            while lines := list(islice(next(parts), data.batch_size)):
                file.writelines(lines)
                written += len(lines)
        whole.replace(self._path)
        for part in self._parts:
            part.unlink()
        trainer.print(f"{written} answers in {self._path}")
