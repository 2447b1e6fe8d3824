"""StepValidation: validations between optimizer steps, and counted in them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.types import InputError


class StepValidation(Callback):
    """Decides when the Trainer validates. It counts micro-batches, and would validate in the middle of a step.

    A checkpoint of the weights that such a validation scored would lack their gradients so far; so a validation that
    falls between two micro-batches waits for their step.

    Args:
        every_n_steps: Optimizer steps between validations, over all epochs; null: trainer.val_check_interval and
            trainer.check_val_every_n_epoch, which count micro-batches and epochs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"must be at least 1, not {every_n_steps}", key="validation.every_n_steps")
        self.every_n_steps = every_n_steps
        self._postponed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the question from the loop."""
        loop: Any = trainer.fit_loop.epoch_loop
        stock = loop._should_check_val_fx

        def should_check(data_fetcher: Any) -> bool:
            if self.every_n_steps is not None:
                due = trainer.enable_validation and trainer.global_step % self.every_n_steps == 0
                return bool(due) and not loop._should_accumulate()
            due = bool(stock(data_fetcher))
            if loop._should_accumulate():
                self._postponed |= due
                return False
            return due or self._postponed

        loop._should_check_val_fx = should_check

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was postponed is done."""
        self._postponed = False
