"""RunCheckpoint: saves at optimizer-step boundaries only, and ends an interrupted run with a checkpoint."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_trainer import checkpoints
from lightning_trainer.callbacks import generators
from lightning_trainer.callbacks.finite import raise_if_nonfinite
from lightning_trainer.signals import ANSWERED, Interrupted, in_main_thread, protected
from lightning_trainer.types import InputError


class RunCheckpoint(Checkpoint):
    """Writes `checkpoints/step=NNNNNN.ckpt`, lets `last.ckpt` point at the newest, ends a run that a signal stops.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        keep_last: Newest step directories kept, besides the best.
        monitor: Metric by which the best are kept, e.g. val/loss; null keeps none besides the newest.
        mode: Whether the best monitor is the smallest or the largest.
        save_top_k: How many of the best are kept; -1 keeps all.
        on_save_failure: stop ends the run when a checkpoint cannot be written, e.g. on a full disk; continue warns
            and tries again at the next interval. A run's last checkpoint must be written either way.

    Attributes:
        last_path: The newest checkpoint.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        keep_last: int = 3,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        on_save_failure: Literal["stop", "continue"] = "stop",
    ) -> None:
        for name, value, least in (
            ("every_n_train_steps", every_n_train_steps, 1),
            ("keep_last", keep_last, 1),
            ("save_top_k", save_top_k, -1),
        ):
            if value < least:
                raise InputError(f"must be at least {least}, not {value}", key=f"checkpoint.{name}")
        self.every_n_train_steps, self.keep_last = every_n_train_steps, keep_last
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.on_save_failure = on_save_failure
        self._save_failures = 0
        self.best: list[tuple[float, int]] = []
        self.last_path: Path | None = None
        self._saved_step = -1
        self._signal = 0
        self._handlers: dict[int, Any] = {}
        self._boundary: tuple[int, dict[str, Any]] | None = None
        self._validation_due = False
        self._save_after_validation = False
        self._rng: list[dict[str, Any]] = []
        self._host_group: Any = None
        self._stop_asked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear away what a killed save left behind."""
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checkpoints.remove_leftovers(self._folder(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a monitor that nothing will ever set; note who has the signals, before Lightning takes them.

        Raises:
            InputError: See above.
        """
        if in_main_thread():
            self._handlers = {signum: signal.getsignal(signum) for signum in ANSWERED}
        if self.monitor is not None and not trainer.limit_val_batches:
            raise InputError(
                f"there is no validation in this run, and so no {self.monitor!r}", key="checkpoint.monitor"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals, put the random generators where they were, make up for a validation cut short."""
        for signum in self._handlers:
            signal.signal(signum, self._on_signal)
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._host_group = torch.distributed.new_group(backend="gloo")
        # The loaders may have been made before the checkpoint was read (to count the steps for a schedule); Lightning
        # then forgets to hand them their state.
        loop = trainer.fit_loop
        loop._load_combined_loader_states()  # may refuse: nothing is moved before it
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for path in checkpoints.set_aside_after(self._folder(trainer), trainer.global_step):
                trainer.print(f"a checkpoint of a later step, from before this start, is now {path.name}")
        epochs: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.ready:
            # Saved at an epoch's last batch: the next epoch is a new one, which Lightning would not count, so that
            # the counters of the checkpoint after this one would not tell where it stands.
            loop.reset_restart_stage()
        generators.restore(trainer, self._rng)
        self._rng = []
        if self._validation_due:
            self._validation_due = False
            _validate_now(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a step boundary: save when it is time, and end the run when a signal asked for it."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            # A stop, by a clock say, waits for the step's end: what is half accumulated could not be gone on with.
            self._stop_asked |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_asked
        self._validation_due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        step = trainer.global_step
        ends = loop._num_ready_batches_reached() or trainer.should_stop or step == trainer.max_steps
        if self._validation_due or ends:
            # Between here and the next batch Lightning's counters mean "past the batch"; a checkpoint made there
            # must still say "at this boundary", or its resume would skip or repeat a batch.
            self._boundary = (step, copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict()))
        self._save_after_validation = step % self.every_n_train_steps == 0
        if self._save_after_validation and not self._validation_due:
            self.save(trainer)
        self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A signal does not wait for a long validation; the resumed run makes up for it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the score of this step, and save it where it is among the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == 0:
            return
        self._validation_due = False
        before, self.best = self.best, self._ranked(trainer)
        is_best = any(step == trainer.global_step for _, step in self.best)
        # Where a save was due at this step, it waited for this, to have the metrics and the new order in it.
        if (self._save_after_validation or is_best) and not self.save(trainer):
            self.best = before  # what is not on disk must not push out what is

    def _ranked(self, trainer: Trainer) -> list[tuple[float, int]]:
        """The best, this step among them where it is one of them."""
        if self.monitor is None:
            return self.best
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise InputError(
                f"there is no metric {self.monitor!r}; choose from {', '.join(sorted(trainer.callback_metrics))}",
                key="checkpoint.monitor",
            )
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(
            [*(entry for entry in self.best if entry[1] != trainer.global_step), (float(score), trainer.global_step)],
            key=lambda entry: math.inf if math.isnan(entry[0]) else sign * entry[0],
        )
        return ranked if self.save_top_k == -1 else ranked[: self.save_top_k]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of a run is always saved."""
        if trainer.global_step and trainer.global_step != self._saved_step:
            self.save(trainer, must=True)
        self._end_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal and signum == signal.SIGINT:
            raise Interrupted(signum)  # the second Ctrl-C does not wait
        self._signal = signum

    def _end_if_asked(self, trainer: Trainer) -> None:
        signum = self._signal_of_any_rank(trainer)
        if not signum:
            return
        trainer.print(f"{signal.Signals(signum).name}: saving a checkpoint at optimizer step {trainer.global_step}")
        if trainer.global_step and trainer.global_step != self._saved_step:
            self.save(trainer, must=True)
        raise Interrupted(signum)

    def _signal_of_any_rank(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self._signal
        asked = torch.tensor(self._signal)
        # Among the processors, not the devices: those would have to finish what they are doing first.
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self._host_group)
        return int(asked)

    def save(self, trainer: Trainer, must: bool = False) -> bool:
        """Write a checkpoint of this optimizer step, let `last.ckpt` name it, delete what is no longer kept.

        Args:
            trainer: Of the run. All ranks call this.
            must: A failure ends the run, whatever `on_save_failure` says.

        Returns:
            Whether it is there.

        Raises:
            NonFiniteError: Some update since the last checkpoint was not finite.
            CheckpointWriteError: It could not be written; the previous one is intact.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return True
        raise_if_nonfinite(trainer)
        path = self._folder(trainer) / checkpoints.step_name(trainer.global_step)
        # Rank 0 alone writes, and says whether there is something to write and whether it could: all must end
        # together, or go on together.
        number, failure, is_there = trainer.strategy.broadcast(self._prepare(trainer, path))
        if failure is None and not is_there:
            number, failure = trainer.strategy.broadcast(self._write(trainer, path))
        if failure is None:
            number, failure = trainer.strategy.broadcast(self._point_to(trainer, path))
        if failure is not None:
            self._failed(trainer, number, failure, must)
            return False
        self._saved_step, self.last_path = trainer.global_step, path
        if trainer.is_global_zero:
            self._prune(path.parent)
        trainer.strategy.barrier("RunCheckpoint.save")
        return True

    def _prepare(self, trainer: Trainer, path: Path) -> tuple[int, str | None, bool]:
        """(errno, message, whether the checkpoint is there) after what it has behind it is on disk, too.

        Or a kill would leave a gap in the curves. A checkpoint of this step that the run was resumed from may stand in
        another run's directory, and is not this one.
        """
        is_there = trainer.global_step == self._saved_step and _same_path(path, self.last_path)
        try:
            for logger in trainer.loggers if trainer.is_global_zero else ():
                flush = getattr(getattr(logger, "experiment", None), "flush", None)
                if flush is not None:
                    flush()
        except OSError as error:
            return error.errno or 0, str(error), is_there
        return 0, None, is_there

    @staticmethod
    def _write(trainer: Trainer, path: Path) -> tuple[int, str | None]:
        """(errno, message) of what failed on this rank; all ranks call this."""
        with protected():
            try:
                trainer.save_checkpoint(path)
            except checkpoints.CheckpointWriteError as error:
                trainer.strategy.barrier("Trainer.save_checkpoint")  # where the ranks that do not write wait
                return error.errno or 0, str(error)
        return 0, None

    @staticmethod
    def _point_to(trainer: Trainer, path: Path) -> tuple[int, str | None]:
        try:
            if trainer.is_global_zero:
                checkpoints.point_last(path.parent, path)
        except checkpoints.CheckpointWriteError as error:
            return error.errno or 0, str(error)
        return 0, None

    def _failed(self, trainer: Trainer, number: int, failure: str, must: bool) -> None:
        self._save_failures += 1
        left = f"the last one, {self.last_path}, is intact" if self.last_path else "there is none before it"
        if must or self.on_save_failure == "stop":
            way = "; --ckpt_path last goes on from it" if self.last_path else ""
            raise checkpoints.CheckpointWriteError(number, f"{failure}; {left}{way}")
        rank_zero_warn(
            f"optimizer step {trainer.global_step}: {failure}; {left}. Failure {self._save_failures} of this attempt; "
            "training goes on (checkpoint.on_save_failure: continue) and tries again at the next interval"
        )

    def _prune(self, folder: Path) -> None:
        keep = {step for _, step in self.best}
        for step, path in checkpoints.step_directories(folder)[: -self.keep_last]:
            if step in keep or path == self.last_path:
                continue
            try:
                checkpoints.remove(path)
            except OSError as error:  # the new one is safe: no reason to end a run
                rank_zero_warn(f"{path} should no longer be kept and could not be deleted: {error}")

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add every rank's random generators and where the run stands, to every checkpoint, whoever makes it."""
        checkpoint["rng"] = generators.states_of_ranks(trainer)
        checkpoint["validation_due"] = self._validation_due
        checkpoint["mid_window"] = trainer.fit_loop.epoch_loop._should_accumulate()
        if self._boundary is not None and self._boundary[0] == trainer.global_step:
            checkpoint["loops"] = self._boundary[1]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that has lost gradients; remember what `on_train_start` puts back.

        Raises:
            InputError: A stock ModelCheckpoint made it between two micro-batches of an optimizer step.
        """
        if trainer.state.fn != "fit":
            return
        if checkpoint.get("mid_window"):
            raise InputError(
                "this checkpoint was made in the middle of an optimizer step (its first micro-batches' gradients are "
                "lost); resume from one of checkpoints/step=*.ckpt",
                key="ckpt_path",
            )
        self._rng = checkpoint.get("rng", [])
        self._validation_due = bool(checkpoint.get("validation_due"))
        self._saved_step, self.last_path = int(checkpoint["global_step"]), checkpoint.get("directory")

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": [list(entry) for entry in self.best]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on keeping the best."""
        self.best = [(float(score), int(step)) for score, step in state_dict["best"]]


def _same_path(path: Path, other: Path | None) -> bool:
    return other is not None and path.resolve() == other.resolve()


def _validate_now(trainer: Trainer) -> None:
    """Run the validation that was due when the checkpoint was made, as the training loop would have."""
    trainer.print("the checkpoint was made before a validation that was due; it is made up for now")
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # from its first batch, not from where the validation before it ended
    trainer.validating = True
    loop.run()
    trainer.training = True
