"""Arms `fit` and `fit_previews`: `lightning-trainer fit`, end to end through its command line.

All that is on by default is on: progress bar, TensorBoard, status file, checkpoints, the self-check. `fit` puts the
previews off to the end of the run, which is behind the counted steps; `fit_previews` leaves them at their interval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import meter
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from workload import TokenRows

from lightning_trainer import cli

NEVER = 1_000_000


class StepClock(Callback):
    """Tells a meter of each step.

    Attributes:
        measured: The meter; one run in a process.
    """

    measured: meter.Meter

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Everything of the steps before is done, every callback's work with it."""
        self.measured.passed(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One pack is one step."""
        nats: Any = pl_module.step_nats
        self.measured.saw(len(batch.targets), nats)


def configuration(given: argparse.Namespace, folder: Path, steps: int) -> dict[str, Any]:
    """The run's YAML: what the arms have in common, and defaults."""
    preview: dict[str, Any] = {"class_path": "PreviewCallback"}
    if given.arm != "fit_previews":
        preview["init_args"] = {"every_n_steps": NEVER}
    return {
        "model": {
            "pretrained": str(given.workload / "model"),
            "compile": given.compile,
            "optimizer": {
                "class_path": "CompensatedAdamW",  # a plain fused AdamW in fp32; exact weights in bf16
                "init_args": {"lr": meter.LEARNING_RATE, "betas": list(meter.BETAS)},
            },
            "lr_scheduler": {"class_path": "WarmupConstant", "init_args": {"warmup_steps": 0}},
        },
        "data": {
            "train_path": str(given.workload / "chats.jsonl"),
            "val_fraction": 0,
            "profile": "Plain",
            "max_length": TokenRows.load(given.workload).max_length,
            "batch_size": 1,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "accelerator": "gpu" if given.device == "cuda" else "cpu",
            "devices": 1,
            "precision": "bf16-true" if given.device == "cuda" else "32-true",
            "max_steps": steps,
            "default_root_dir": str(folder / "run"),
            "callbacks": [preview, "StatusFile", "HuggingFaceExport", f"{__name__}.{StepClock.__name__}"],
        },
    }


def main() -> None:
    """Train and report."""
    given = meter.arguments(__doc__, "fit", "fit_previews")
    StepClock.measured = meter.Meter(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # One step more than are counted: the last one ends where the next begins.
        run = configuration(given, folder, StepClock.measured.last + 1)
        (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        status = cli.main(["fit", "--config", str(folder / "run.yaml")])
    if status:
        raise SystemExit(status)
    StepClock.measured.report("lightning", "transformers")


if __name__ == "__main__":
    main()
