"""What is logged while training, and at which step: optimizer steps completed, from 1."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.callbacks.finite import raise_if_nonfinite
from lightning_trainer.model.frozen import UpdateSample
from lightning_trainer.precision import SingleDtypePrecision
from lightning_trainer.types import Batch


class TrainLog(Callback):
    """Writes train/* every `trainer.log_every_n_steps` optimizer steps, and at the first and the last.

    Between log steps it only counts on the host: reading the loss waits for the device, and so does `self.log`.
    Time spent in validation, previews and checkpoints is not counted as training.

    Attributes:
        last: What was logged last.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._batches = self._tokens = self._trained = self._step_tokens = 0
        self._sample: UpdateSample | None = None
        self._seconds = self._started = self._waited = self._rate = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at log steps."""
        if isinstance(batch, Batch):
            self._batches += 1
            self._tokens += sum(batch.example_lengths) if batch.row_ids else 0
            self._trained += len(batch.targets)
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        due = stepped and self._is_due(trainer, trainer.global_step)
        if due:
            raise_if_nonfinite(trainer)  # waits for the device: the clock below sees finished work
        self._seconds += time.perf_counter() - self._started
        self._step_tokens = getattr(batch, "step_tokens", 1)
        if due:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks may look at the loss now."""
        self._offer(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same."""
        self._offer(trainer)

    def _offer(self, trainer: Trainer) -> None:
        """Let callbacks that monitor a metric find train/loss, as `self.log` would, which costs every step."""
        if "train/loss" in self.last:
            trainer.callback_metrics["train/loss"] = torch.tensor(self.last["train/loss"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the rate this step is made with: once it is made, the scheduler has moved on."""
        self._rate = float(optimizer.param_groups[0]["lr"])
        plugin = trainer.precision_plugin
        rounds = isinstance(plugin, SingleDtypePrecision) and plugin.dtype != torch.float32
        self._sample = UpdateSample(optimizer) if rounds and self._is_due(trainer, trainer.global_step + 1) else None

    @staticmethod
    def _is_due(trainer: Trainer, step: int) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector of the Trainer
        return step % every == 0 or step == 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is logged in any case."""
        if self._batches:  # as many on every rank: all of them log, or none
            raise_if_nonfinite(trainer)
            self._log(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What was counted since the last log step, by all ranks."""
        tokens, trained = _sums(trainer, [self._tokens, self._trained])
        counted = {"batches": self._batches, "tokens": int(tokens), "trained": int(trained), "seconds": self._seconds}
        checkpoint["train_log"] = {**counted, "last": self.last}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting; what all ranks had counted is taken up by the first."""
        counted = checkpoint.get("train_log", {})
        self._batches, self.last = counted.get("batches", 0), counted.get("last", {})
        if trainer.is_global_zero:
            self._tokens, self._trained = counted.get("tokens", 0), counted.get("trained", 0)
            self._seconds = counted.get("seconds", 0.0)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        nats = float(getattr(module, "step_nats", 0.0))
        tokens, trained, nats = _sums(trainer, [self._tokens, self._trained, nats])
        waited = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        seconds, self._waited = self._seconds + waited - self._waited, waited
        metrics = {
            "train/loss": nats / self._step_tokens,
            "train/lr": self._rate,
            "train/tokens_per_second": tokens / max(seconds, 1e-9),
            "train/trained_token_fraction": trained / max(tokens, 1),
            **_precision_metrics(trainer),
        }
        if self._sample is not None:
            metrics["precision/frozen_update_fraction"] = self._sample.frozen_fraction()
            self._sample = None
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._batches = self._tokens = self._trained = 0
        self._seconds = 0.0
        self.last = metrics
        self._offer(trainer)


def _sums(trainer: Trainer, counted: list[float]) -> list[float]:
    """Sums over all ranks."""
    if trainer.world_size == 1:
        return counted
    here = torch.tensor(counted, dtype=torch.float64, device=trainer.strategy.root_device)
    summed: list[float] = trainer.strategy.reduce(here, reduce_op="sum").tolist()
    return summed


def _precision_metrics(trainer: Trainer) -> dict[str, float]:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, SingleDtypePrecision) or plugin.grad_norm is None:
        return {}
    metrics = {"train/grad_norm": float(plugin.grad_norm)}
    if plugin.scale != 1.0:
        metrics["train/skipped_steps"] = float(plugin.nonfinite_steps)
    return metrics
