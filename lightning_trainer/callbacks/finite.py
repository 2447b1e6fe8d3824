"""A run whose loss or gradient became NaN or Inf ends: its update was not applied, the last checkpoint stays."""

from __future__ import annotations

from typing import Any

from lightning_trainer.precision import SingleDtypePrecision

FP16_PATIENCE = 20
"""Under 16-true overflowing steps are expected: the run ends when these many, and more than half of all, overflowed."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient was NaN or Inf."""


def raise_if_nonfinite(trainer: Any) -> None:
    """Ask the device whether an update was skipped. Waits for the device: call it at log steps and before a checkpoint.

    Raises:
        NonFiniteError: Some update was not applied.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, SingleDtypePrecision):
        return
    skipped = int(plugin.nonfinite_steps)
    expected = plugin.scale != 1.0 and (skipped < FP16_PATIENCE or 2 * skipped < trainer.global_step)
    if not skipped or expected:
        return
    raise NonFiniteError(
        f"the loss or the gradient was NaN or Inf at optimizer step {int(plugin.first_nonfinite)}; that update was "
        "not applied and no checkpoint was made since. Lower the learning rate, or look at the rows of that step; "
        "--ckpt_path auto goes on from the last checkpoint, or from the start where there is none"
    )
