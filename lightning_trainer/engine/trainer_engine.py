"""TrainerEngine: `fit` from Python, for callers that want a result and not an exit status."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_trainer.callbacks import MEASURED, RunCheckpoint, StatusFile, TrainLog, callbacks_of
from lightning_trainer.engine.job.lowering import lower, remarks
from lightning_trainer.engine.job.trainer_config import TrainerConfig
from lightning_trainer.engine.run import quiet_stack
from lightning_trainer.engine.run_directory import MANIFEST, rank
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.signals import Interrupted, interruptible
from lightning_trainer.status import Ending, TrainingStatusWriter


@dataclass(frozen=True)
class TrainingResult:
    """What came of a job.

    Attributes:
        success: The job ended as it should.
        global_step: Optimizer steps completed, over all attempts of the run.
        runtime_sec: Seconds from the call to its end.
        last_checkpoint_path: Newest checkpoint of the run.
        final_loss: Nats per trained token of the last logged optimizer step.
        summary: metrics, config, profile, precision.
        error_message: None, or why it failed.
        error_type: None, or the name of the exception.
    """

    success: bool
    global_step: int
    runtime_sec: float
    last_checkpoint_path: str | None = None
    final_loss: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error_message: str | None = None
    error_type: str | None = None


class TrainerEngine:
    """Runs jobs, one after the other.

    Args:
        status_writer: Told how the job stands, from its start to its end; besides `status.json` in the run directory.
    """

    def __init__(self, status_writer: TrainingStatusWriter | None = None) -> None:
        self.status_writer = status_writer

    def run_job(self, config: TrainerConfig | Mapping[str, Any]) -> TrainingResult:
        """Train, exactly as `fit` does on the configuration that `lower(config)` gives.

        Args:
            config: The job, or its `to_dict`.

        Returns:
            The result, of a failed job too: an exception of the job does not leave this call.

        Raises:
            KeyboardInterrupt: SIGINT came; a checkpoint is written where one could be.
            SystemExit: SIGTERM came, status 143; the same.
        """
        job = _Job(self.status_writer)
        try:
            return job.run(config)
        except Interrupted as stop:
            if stop.signum == signal.SIGINT:
                raise KeyboardInterrupt from stop
            raise SystemExit(128 + stop.signum) from stop
        finally:
            job.release()


class _Job:
    """One call of `run_job`: what it holds is gone after `release`."""

    def __init__(self, status_writer: TrainingStatusWriter | None) -> None:
        self.status_writer = status_writer if rank() == 0 else None
        self.started = time.monotonic()
        self.config: TrainerConfig | None = None
        self.cli: TrainerCLI | None = None

    def run(self, config: TrainerConfig | Mapping[str, Any]) -> TrainingResult:
        try:
            with interruptible(), quiet_stack():
                self._run(config)
        except Interrupted:
            self._tell("paused")
            raise
        except Exception as error:  # the boundary: a caller that runs many jobs is told, and goes on
            self._tell("crashed", error_type=type(error).__name__, error_message=str(error))
            return self._result(error)
        return self._result(None)

    def _tell(self, status: Ending, **fields: Any) -> None:
        if self.status_writer is not None and self._may_tell():
            self.status_writer.finish(status, **fields)

    def _run(self, config: TrainerConfig | Mapping[str, Any]) -> None:
        if self.status_writer is not None and self._may_tell():  # nothing of a job before it stays
            self.status_writer.update(**dict.fromkeys(MEASURED), status="training", total_steps=None)
        self.config = config if isinstance(config, TrainerConfig) else TrainerConfig.from_dict(config)
        self.cli = TrainerCLI({"subcommand": "fit", "fit": lower(self.config)})
        for line in remarks(self.config):
            rank_zero_info(line)
        self._attach_status(self.cli)
        self.cli.run()

    def _attach_status(self, cli: TrainerCLI) -> None:
        for callback in callbacks_of(cli.trainer, StatusFile):
            callback.writers += [] if self.status_writer is None else [self.status_writer]

    def _may_tell(self) -> bool:
        """Whether the caller's file is this job's to write: in a run's directory only once that run is this job's."""
        assert self.status_writer is not None
        began = self.cli is not None and self.cli.began
        return began or not (self.status_writer.path.parent / MANIFEST).exists()

    def _result(self, error: Exception | None) -> TrainingResult:
        trainer: Any = self.cli.trainer if self.cli is not None else None
        logged = callbacks_of(trainer, TrainLog)[0].last if trainer is not None else {}
        saved = callbacks_of(trainer, RunCheckpoint)[0].last_path if trainer is not None else None
        return TrainingResult(
            success=error is None,
            global_step=trainer.global_step if trainer is not None else 0,
            runtime_sec=time.monotonic() - self.started,
            last_checkpoint_path=str(saved) if saved is not None else None,
            final_loss=logged.get("train/loss"),
            summary=self._summary(logged),
            error_message=None if error is None else str(error),
            error_type=None if error is None else type(error).__name__,
        )

    def _summary(self, logged: dict[str, float]) -> dict[str, Any]:
        if self.config is None:
            return {}
        measured = self.cli.trainer.callback_metrics if self.cli is not None else {}
        metrics = {name: float(value) for name, value in measured.items() if not name.startswith("tokens/")}
        return {
            "metrics": {**metrics, **logged},
            "config": self.config.to_dict(),
            "profile": self.config.profile.name,
            "precision": self.config.hyperparams.fp_precision,
        }

    def release(self) -> None:
        """Let go of model, optimizer and data: they hold each other, so the collector must be asked."""
        self.cli = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
