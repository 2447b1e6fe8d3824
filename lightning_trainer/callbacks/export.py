"""HuggingFaceExport: the trained model as a directory that transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError

from lightning_trainer import checkpoints, pretrained
from lightning_trainer.types import InputError


class HuggingFaceExport(Callback):
    """Writes model and tokenizer when training ends; of a run with model.lora the adapters, as peft loads them.

    Args:
        directory: Where; null: `export` in the run directory. What stands there is replaced only when the new one is
            whole.
        merge: Write the whole model too, adapters added to its weights, as `merged` in the directory. Each weight is
            rounded once to the run's dtype: under bf16-true what is smaller than half its step is lost.

    Attributes:
        written: Where, once it is.
    """

    def __init__(self, directory: str | None = None, merge: bool = False) -> None:
        self.directory, self.merge = directory, merge
        self.written: Path | None = None
        self._trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to merge into packed weights.

        Raises:
            InputError: The base is quantised.
        """
        if self.merge and getattr(pl_module, "packed_base", False):
            raise InputError(
                "HuggingFaceExport cannot merge adapters into 4-bit weights: set merge: false", key="trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there will be something new to export."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the export, once the last checkpoint is safe; of a run that was through before, if it is missing.

        Raises:
            CheckpointWriteError: It could not be written.
        """
        if trainer.fast_dev_run or not trainer.is_global_zero or not trainer.global_step:  # type: ignore[attr-defined]
            return
        target = Path(self.directory) if self.directory else Path(trainer.default_root_dir) / "export"
        if not self._trained and target.exists():
            return
        tmp, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
        try:
            _remove_leftovers(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._write(tmp, pl_module)
            if target.exists():
                target.rename(old)
            tmp.rename(target)
        except (OSError, SafetensorError) as error:
            number, why = checkpoints.explain(error, tmp)
            way = "the last checkpoint has the model, and --ckpt_path last exports it"
            text = f"the export {target} could not be written: {why}; {way}"
            raise checkpoints.CheckpointWriteError(number, text) from error
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        self.written = target
        trainer.print(f"exported to {target}")

    def _write(self, directory: Path, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.save_pretrained(directory)
        if self.merge and module.adapter is not None:
            merged = module.adapter.merged()
            pretrained.save_weights(merged, module.causal_lm, module.tokenizer, directory / "merged")


def _remove_leftovers(target: Path) -> None:
    """What a kill left; an export that was about to be replaced is put back."""
    for old in target.parent.glob(f".{target.name}.old-*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for tmp in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(tmp, ignore_errors=True)
