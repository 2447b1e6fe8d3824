"""RunLogger: TensorBoard, without gaps or doubles when a run is resumed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Events of one run in one place.

    Hyperparameters are not logged: `config.yaml` beside it holds the whole configuration.

    Args:
        directory: Where the events go.
    """

    def __init__(self, directory: str) -> None:
        super().__init__(save_dir=directory, name="", version="", default_hp_metric=False)

    def resume_from(self, step: int) -> None:
        """Hide what an earlier attempt logged after this optimizer step; before the first event is written."""
        self._kwargs["purge_step"] = step + 1

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save(self) -> None:
        """Flush events; no hparams.yaml."""
        if self._experiment is not None:
            self._experiment.flush()
