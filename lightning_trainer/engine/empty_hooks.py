"""Hooks of a step that a callback leaves empty are not called.

Lightning (2.6) calls every hook of every callback, each within a context of its profiler: for a dozen callbacks a
hundred calls of nothing in every step. What is not callable it passes over.
"""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


def pass_over_empty_hooks(trainer: Trainer) -> None:
    """Have the Trainer pass over the hooks of a step that its callbacks do not define."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of the Trainer
    for callback in callbacks:
        for name in STEP_HOOKS:
            if getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback):
                setattr(callback, name, None)
