"""RunRecord: what the run is, written down when it begins and into every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer.engine.run_directory import RunDirectory, environment


class RunRecord(Callback):
    """Writes `manifest.json` and `config.yaml`.

    Args:
        directory: Of the run.
        config: Gives the whole configuration as YAML.
        description: What the run is for.
        run_id: Its name, the same on resume.

    Attributes:
        began: Whether training has started: from then on the directory is taken.
    """

    def __init__(self, directory: RunDirectory, config: Callable[[], str], description: str, run_id: str) -> None:
        self.directory, self.config, self.description, self.run_id = directory, config, description, run_id
        self.began = False
        self._about: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both."""
        self.began = True
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        self._about = {
            "id": self.run_id,
            "date": data.run_date,
            "fingerprints": data.fingerprints(),
            "lock": module.locked.as_dict() if module.locked is not None else None,
        }
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        attempt = {**environment(), "from_step": trainer.global_step}
        attempts = [*self.directory.manifest().get("attempts", []), attempt]
        self.directory.write_manifest({"description": self.description, **self._about, "attempts": attempts})
        self.directory.save_config(self.config())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where a run was at its end before it began."""
        if not self.began:
            ends = f"trainer.max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs}"
            place = f"optimizer step {trainer.global_step}, after {trainer.current_epoch} epochs"
            trainer.print(f"nothing is left to train: the run stands at {place} ({ends})")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Every checkpoint knows what it was trained on, wherever it is resumed."""
        checkpoint["run"] = self._about
