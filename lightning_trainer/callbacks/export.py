"""HuggingFaceExport: the trained model as a directory that transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_trainer import pretrained


class HuggingFaceExport(Callback):
    """Writes model and tokenizer when training ends.

    Args:
        directory: Where; null: `export` in the run directory. What stands there is replaced only when the new one is
            whole.

    Attributes:
        written: Where, once it is.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self.written: Path | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the export."""
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        target = Path(self.directory) if self.directory else Path(trainer.default_root_dir) / "export"
        tmp, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            pretrained.save_pretrained(module.causal_lm, module.tokenizer, tmp)
            if target.exists():
                target.rename(old)
            tmp.rename(target)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        self.written = target
        trainer.print(f"exported to {target}")
