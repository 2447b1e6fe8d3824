"""From the user's rows to batches."""

from lightning_trainer.data.datamodule import ChatDataModule

__all__ = ["ChatDataModule"]
