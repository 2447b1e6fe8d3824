"""StatusFile: keeps `status.json` of the run while it trains."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_trainer.callbacks.find import callbacks_of
from lightning_trainer.callbacks.preview import PreviewCallback
from lightning_trainer.callbacks.train_log import TrainLog
from lightning_trainer.signals import Interrupted
from lightning_trainer.status import Heartbeat, TrainingStatusWriter
from lightning_trainer.types import InputError, PreviewResult

LEAST_SECONDS = 1.0
"""Between two updates: reading the loss waits for the device."""

MEASURED = (
    *("current_step", "epoch", "loss", "learning_rate", "tokens_per_sec", "validation_loss", "val_train_gap"),
    *("current_prompt", "golden_answer", "model_answer", "answer_matches", "recent_examples"),
    *("total_evals", "total_correct", "accuracy_percent"),
)
"""What belongs to the steps behind the run, and so to each checkpoint."""


@dataclass(frozen=True)
class _Step:
    """One optimizer step; its nats are read from the device only when they are written."""

    number: int
    epoch: int
    rate: float
    nats: Tensor | None
    tokens: int


class StatusFile(Callback):
    """Writes `status.json` into the run directory: step, loss, previews, and whether the run still lives.

    Args:
        every_n_steps: Optimizer steps between updates; the first and the last are written in any case, and between
            them never more than one a second.
        recent_examples: Newest previews kept in the file.

    Attributes:
        writers: Told of everything; `on_fit_start` adds the run's own, unless one for the same path is there.
    """

    def __init__(self, every_n_steps: int = 2, recent_examples: int = 5) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("recent_examples", recent_examples)):
            if value < 1:
                raise InputError(f"StatusFile.{name} must be at least 1, not {value}")
        self.every_n_steps, self.recent_examples = every_n_steps, recent_examples
        self.writers: list[TrainingStatusWriter] = []
        self._own: TrainingStatusWriter | None = None
        self._main: TrainingStatusWriter  # of the run's own path, whoever gave it
        self._heartbeats: list[Heartbeat] = []
        self._checkpoint: dict[str, Any] | None = None
        self._active = self._warned = False
        self._rate = 0.0
        self._forget()

    def _forget(self) -> None:
        self._placed = False
        self._step: _Step | None = None
        self._written: int | None = None
        self._clock = 0.0
        self._previews: list[PreviewCallback] = []
        self._held: list[list[PreviewResult]] = []
        self._seen: list[PreviewResult] = []
        self._examples: list[dict[str, Any]] = []
        self._evals = self._correct = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run trains, from now on with a heartbeat."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._forget()
        with self._guard():
            name = str(getattr(pl_module, "pretrained", ""))
            self._add_own(trainer, name)
            self._update(status="training")
            for writer in self.writers:
                if not writer.model_name:  # else the caller's own name stays
                    writer.update(model_name=name)
            self._heartbeats = [Heartbeat(writer) for writer in self.writers]
            for heartbeat in self._heartbeats:
                heartbeat.start()
            self._active = True

    def _add_own(self, trainer: Trainer, name: str) -> None:
        self.writers = [writer for writer in self.writers if writer is not self._own]  # an earlier run's
        path = Path(trainer.default_root_dir) / "status.json"
        given = [writer for writer in self.writers if writer.path.resolve() == path.resolve()]
        self._own = None if given else TrainingStatusWriter(path, model_name=name, **_sizes(trainer))
        self.writers += [] if self._own is None else [self._own]
        self._main = self._own or given[0]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what was known at the checkpoint: the file may hold a later, abandoned step."""
        self._checkpoint = checkpoint.get("status")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run stands, now that the checkpoint is read and the steps are counted."""
        if self._active:
            self._place(trainer)

    def _place(self, trainer: Trainer) -> None:
        self._placed = True
        begun = dict.fromkeys(MEASURED) if trainer.global_step == 0 else {}
        known, self._checkpoint = self._checkpoint or begun, None
        with self._guard():
            held = {**self._main.state, **known}
            self._evals, self._correct = held["total_evals"] or 0, held["total_correct"] or 0
            self._examples = list(held["recent_examples"] or [])
            self._previews = callbacks_of(trainer, PreviewCallback)
            self._held = [callback.results for callback in self._previews]
            self._seen = list(chain.from_iterable(self._held))  # of an earlier run in this process
            here = {"current_step": trainer.global_step, "epoch": trainer.current_epoch}
            steps = trainer.estimated_stepping_batches
            self._update(**{**known, **here, **self._previewed(), "total_steps": steps})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the step before, when it is time.

        Here and not at its end, because TrainLog's clock runs from here: work that the device does while the loss is
        waited for counts as training.
        """
        if self._active and self._is_due():
            with self._guard():
                self._write(trainer)

    def _is_due(self) -> bool:
        if self._step is None or self._step.number == self._written:
            return False
        if self._written is None:
            return True
        return self._step.number % self.every_n_steps == 0 and time.monotonic() - self._clock >= LEAST_SECONDS

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the rate this step is made with: once it is made, the scheduler has moved on."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a step boundary, note the step, without waiting for the device, and count its previews."""
        if not self._active or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        with self._guard():
            nats, tokens = getattr(pl_module, "step_nats", None), getattr(batch, "step_tokens", 0)
            self._step = _Step(trainer.global_step, trainer.current_epoch, self._rate, nats, tokens)
            self._count()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the loss of this validation, and how far it is from that of the step before it."""
        if not self._active or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with self._guard():
            self._write(trainer)
            if (found := trainer.callback_metrics.get("val/loss")) is not None:
                loss, trained = float(found), self._main.state["loss"]
                self._update(validation_loss=loss, val_train_gap=None if trained is None else loss - trained)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is known at this step, so that a resumed run counts no preview twice."""
        if self._active:
            with self._guard():
                self._write(trainer)
                state = self._main.state
                checkpoint["status"] = {name: state[name] for name in MEASURED}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is written in any case."""
        if self._active:
            with self._guard():
                self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run is through."""
        if self._active and not self._placed:  # nothing was left to train
            self._place(trainer)
        self._end(trainer, "completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say that the run was stopped, or why it crashed."""
        if isinstance(exception, KeyboardInterrupt | Interrupted):
            self._end(trainer, "paused")
        else:
            self._end(trainer, "crashed", error_type=type(exception).__name__, error_message=str(exception))
        self._active = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is written from here on."""
        self._stop_heartbeats()
        self._active = False

    def _end(self, trainer: Trainer, status: Any, **fields: Any) -> None:
        self._stop_heartbeats()
        if not self._active:
            return
        with self._guard():
            self._write(trainer)
        with self._guard():
            for writer in self.writers:
                writer.finish(status, **fields)

    def _stop_heartbeats(self) -> None:
        for heartbeat in self._heartbeats:
            heartbeat.stop()
        self._heartbeats = []

    def _write(self, trainer: Trainer) -> None:
        self._count()
        self._update(**self._stepped(trainer), **self._previewed())
        if self._step is not None:
            self._written, self._clock = self._step.number, time.monotonic()

    def _update(self, **fields: Any) -> None:
        for writer in self.writers:
            writer.update(**fields)

    def _stepped(self, trainer: Trainer) -> dict[str, Any]:
        """What the last step was; nothing before the first."""
        step = self._step
        if step is None:
            return {}
        logged = _logged(trainer)
        loss = logged.get("train/loss")
        if trainer.world_size == 1 and step.nats is not None and step.tokens:
            loss = float(step.nats) / step.tokens  # with more ranks a collective, which must not hang on a clock
        return {
            "current_step": step.number,
            "epoch": step.epoch,
            "loss": loss,
            "learning_rate": step.rate,
            "tokens_per_sec": logged.get("train/tokens_per_second"),
        }

    def _previewed(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "recent_examples": self._examples,
            "total_evals": self._evals,
            "total_correct": self._correct,
            "accuracy_percent": 100 * self._correct / self._evals if self._evals else None,
        }
        if self._examples:
            newest = self._examples[-1]
            fields["current_prompt"] = newest["prompt"]
            fields |= {name: newest[name] for name in ("golden_answer", "model_answer", "answer_matches")}
        return fields

    def _count(self) -> None:
        """Take up the previews that came since the last call."""
        held = [callback.results for callback in self._previews]
        if all(map(operator.is_, held, self._held)):
            return
        self._held = held
        results = list(chain.from_iterable(held))
        fresh = [result for result in results if not any(result is old for old in self._seen)]
        self._seen = results
        self._evals += len(fresh)
        self._correct += sum(result.check is not None and result.check.passed for result in fresh)
        self._examples = [*self._examples, *map(_example, fresh)][-self.recent_examples :]

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a status must never end a training run: it is said once, and tried again later
            if not self._warned:
                rank_zero_warn(f"the status file could not be kept: {type(error).__name__}: {error}")
            self._warned = True


def _sizes(trainer: Trainer) -> dict[str, Any]:
    asked = [preview.max_new_tokens for preview in callbacks_of(trainer, PreviewCallback)]
    rows = getattr(getattr(trainer, "datamodule", None), "max_length", None)
    known = {"max_output_tokens": max(asked, default=None), "context_window": rows}
    return {name: size for name, size in known.items() if size is not None}


def _logged(trainer: Trainer) -> dict[str, float]:
    return next((callback.last for callback in callbacks_of(trainer, TrainLog)), {})


def _example(result: PreviewResult) -> dict[str, Any]:
    check = result.check
    return {
        "step": result.step,
        "prompt": result.prompt,
        "golden_answer": result.golden_answer,
        "model_answer": result.text,
        "answer_matches": None if check is None else check.passed,
        "reason": result.error_message or (check.reason if check is not None else ""),
    }
