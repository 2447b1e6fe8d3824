"""RunLogger: TensorBoard, without gaps or doubles when a run is resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

AWAITED_SECONDS = 2.0
"""Event files dated further ahead of the clock than this are not waited for."""


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

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; made when it is first asked for, by the first rank."""
        if self._experiment is None and not getattr(rank_zero_only, "rank", 0):
            _await_the_second_after(_newest_event_file(Path(self.log_dir)), self.log_dir)
        return super().experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save(self) -> None:
        """Flush events; no hparams.yaml."""
        if self._experiment is not None:
            self._experiment.flush()


def _newest_event_file(directory: Path) -> int:
    """The latest second in the name of an event file (`events.out.tfevents.SECOND.host.pid.n`); 0 without one."""
    names = [path.name.split(".") for path in directory.glob("events.out.tfevents.*")]
    return max((int(parts[3]) for parts in names if parts[3].isdecimal()), default=0)


def _await_the_second_after(second: int, directory: str) -> None:
    """TensorBoard reads event files in the order of their names: of two of one second, the later may come first.

    What the later one hides of the earlier would then stay, and the earlier would hide what the later tells.
    """
    ahead = second + 1 - time.time()
    if ahead > AWAITED_SECONDS:
        rank_zero_warn(
            f"{directory} has event files dated {ahead:.0f} s ahead of this machine's clock. TensorBoard reads them "
            "after what this attempt logs and may hide it; set the clock, or move those files away"
        )
        return
    while time.time() < second + 1:
        time.sleep(max(second + 1 - time.time(), 0.001))
