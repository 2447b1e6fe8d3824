"""RunLogger: TensorBoard at `<run>/tensorboard`, without gaps or doubles when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Events of one run in one place.

    Hyperparameters are not logged: `config.yaml` beside it holds the whole configuration.

    Args:
        run_directory: Of the run.
        resumed_step: Optimizer step the run goes on from; what an earlier attempt logged after it is hidden.
    """

    def __init__(self, run_directory: Path, resumed_step: int = 0) -> None:
        purge: dict[str, Any] = {"purge_step": resumed_step + 1}
        super().__init__(
            save_dir=str(run_directory / "tensorboard"), name="", version="", default_hp_metric=False, **purge
        )

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save(self) -> None:
        """Flush events; no hparams.yaml."""
        if self._experiment is not None:
            self._experiment.flush()
