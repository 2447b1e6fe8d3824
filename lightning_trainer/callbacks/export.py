"""HuggingFaceExport: the trained model as a directory that transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer import pretrained
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to merge into packed weights.

        Raises:
            InputError: The base is quantised.
        """
        if self.merge and getattr(pl_module, "packed_base", False):
            raise InputError(
                "HuggingFaceExport cannot merge adapters into 4-bit weights: set merge: false", key="trainer.callbacks"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the export."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        target = Path(self.directory) if self.directory else Path(trainer.default_root_dir) / "export"
        tmp, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            module.save_pretrained(tmp)
            if self.merge and module.adapter is not None:
                merged = module.adapter.merged()
                pretrained.save_weights(merged, module.causal_lm, module.tokenizer, tmp / "merged")
            if target.exists():
                target.rename(old)
            tmp.rename(target)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        self.written = target
        trainer.print(f"exported to {target}")
