"""One attempt of `verify-resume`: a run in a process of its own that notes what it trains on, and stops itself.

It stops as `SIGTERM` stops a run: RunCheckpoint writes a checkpoint and the process ends.
"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.engine.run import known_failures, quiet_stack
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.types import Batch, InputError


@dataclass(frozen=True)
class Plan:
    """What an attempt does.

    Args:
        words: Options of `fit`.
        record: Its beginning is the name of every rank's record.
        steps: Optimizer step after which it stops, if the run does not end before.
        halfway: It stops after half of them instead.
        date: Of the run, for system prompts that hold it; all attempts have the same.
    """

    words: list[str]
    record: str
    steps: int
    halfway: bool
    date: str

    def save(self, path: Path) -> None:
        """Write it down for the process that carries it out."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def carry_out(path: Path) -> None:
    """Train as the plan in this file says.

    Raises:
        Interrupted: It was stopped where it should be.
        ConfigError: Wrong before training began.
        FailedRun: Wrong while training.
    """
    plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    with quiet_stack():
        cli = TrainerCLI(["fit", *plan.words])
        cli.datamodule.run_date = plan.date
        trainer: Any = cli.trainer
        trainer.callbacks.insert(0, StopAfter(plan))
        with known_failures():
            cli.run()


class StopAfter(Callback):
    """Notes rows and loss of every optimizer step, and sends the process SIGTERM after the last.

    The record is JSON lines: the names of the trained parameters in the optimizer's order and the device, then
    `{"step", "rows", "loss"}` of every step.

    Args:
        plan: Of the attempt.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._last = plan.steps
        self._rows: list[tuple[int, ...]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle where to stop, now that the run's length is known.

        Raises:
            InputError: A run of one optimizer step has no middle.
        """
        planned = trainer.estimated_stepping_batches
        end = int(min(self.plan.steps, planned if planned > 0 else math.inf))
        if end < 2:
            raise InputError("verify-resume stops in the middle; this run has only one optimizer step", key="trainer")
        self._last = end // 2 if self.plan.halfway else end
        names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        self._write(trainer, {"parameters": names, "device": trainer.strategy.root_device.type}, "w")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the micro-batch; stop after the last step."""
        assert isinstance(batch, Batch)
        self._rows.append(batch.row_ids)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        nats: Any = pl_module.step_nats
        loss = float(nats) / batch.step_tokens
        self._write(trainer, {"step": trainer.global_step, "rows": self._rows, "loss": loss}, "a")
        self._rows = []
        if trainer.global_step == self._last and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)  # answered by RunCheckpoint, at this boundary

    def _write(self, trainer: Trainer, entry: dict[str, Any], mode: str) -> None:
        path = Path(f"{self.plan.record}-{trainer.global_rank}.jsonl")
        with path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
