"""RunProgress: the bar in the terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_trainer.callbacks.find import callbacks_of
from lightning_trainer.callbacks.train_log import TrainLog

REDRAWS = 4
"""In a second: more is seen by nobody, and every step would pay for it."""


class RunProgress(RichProgressBar):
    """Micro-batches of the epoch, time left, and what TrainLog knows of the newest log step."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=REDRAWS)
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, a few times a second and at the end of the epoch."""
        now = time.monotonic()
        if now - self._drawn >= 1 / REDRAWS or batch_idx + 1 == self.total_train_batches:
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        for log in callbacks_of(trainer, TrainLog):
            if log.last:
                rate = round(log.last["train/tokens_per_second"])
                shown |= {"train/loss": log.last["train/loss"], "tokens/s": f"{rate:,}"}
        return shown

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")
