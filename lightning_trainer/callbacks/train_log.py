"""What is logged while training, and at which step: optimizer steps completed, from 1."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.callbacks.finite import raise_if_nonfinite
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.types import Batch


class TrainLog(Callback):
    """Writes train/* every `trainer.log_every_n_steps` optimizer steps.

    Between log steps it only counts on the host: reading the loss waits for the device, and so does `self.log`.
    Time spent in validation, previews and checkpoints is not counted as training.
    """

    def __init__(self) -> None:
        self._tokens = self._trained = 0
        self._seconds = self._started = self._waited = 0.0
        self.last: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at log steps."""
        if isinstance(batch, Batch) and batch.row_ids:
            self._tokens += sum(batch.example_lengths)
            self._trained += len(batch.targets)
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector of the Trainer
        due = stepped and (trainer.global_step % every == 0 or trainer.global_step == 1)
        if due:
            raise_if_nonfinite(trainer)  # waits for the device: the clock below sees finished work
        self._seconds += time.perf_counter() - self._started
        if due:
            self._log(trainer, pl_module, batch)

    def _log(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        waited = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        seconds, self._waited = self._seconds + waited - self._waited, waited
        counts = torch.tensor([float(self._tokens), float(self._trained)], dtype=torch.float64)
        sums = [counts, getattr(module, "step_nats", torch.zeros(())).detach().double().cpu().reshape(1)]
        total = torch.cat(sums).to(trainer.strategy.root_device)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        tokens, trained, nats = total.tolist()
        loss = nats / getattr(batch, "step_tokens", 1)
        metrics = {
            "train/loss": loss,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"]
            if not trainer.lr_scheduler_configs
            else _lr(trainer),
            "train/tokens_per_second": tokens / max(seconds, 1e-9),
            "train/trained_token_fraction": trained / max(tokens, 1),
            **_precision_metrics(trainer),
        }
        self.last = metrics
        module.log_dict(
            {"train/loss": loss, "train/tokens_per_second": metrics["train/tokens_per_second"]},
            prog_bar=True,
            logger=False,
            batch_size=1,
        )
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._tokens = self._trained = 0
        self._seconds = 0.0


def _lr(trainer: Trainer) -> float:
    """The rate the step just made was made with: the scheduler has already moved on to the next."""
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    factor = getattr(scheduler, "factor", None)
    if factor is None:
        return float(trainer.optimizers[0].param_groups[0]["lr"])
    return float(scheduler.base_lrs[0] * factor(max(scheduler.last_epoch - 1, 0)))


def _precision_metrics(trainer: Trainer) -> dict[str, float]:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, SingleDtypePrecision) or plugin.grad_norm is None:
        return {}
    metrics = {"train/grad_norm": float(plugin.grad_norm)}
    if plugin.scale != 1.0:
        metrics["train/skipped_steps"] = float(plugin.nonfinite_steps)
    return metrics
