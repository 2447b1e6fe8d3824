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
        self._last: tuple[Any, Any, int] | None = None

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of the epoch; fewer where max_steps comes before its end. Lightning takes steps for them."""
        trainer = self.trainer
        every, most = trainer.num_training_batches, trainer.max_steps * trainer.accumulate_grad_batches
        return every if most < 0 else min(every, most)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, a few times a second and at the end of the epoch."""
        now, self._last = time.monotonic(), (outputs, batch, batch_idx)
        if now - self._drawn >= 1 / REDRAWS or batch_idx + 1 == self.total_train_batches:
            self._drawn, self._last = now, None
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a run ends in the middle of an epoch, the bar shows it."""
        if self._last is not None:
            super().on_train_batch_end(trainer, pl_module, *self._last)
            self._last = None
        super().on_train_epoch_end(trainer, pl_module)

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
