"""Answers of the model in training."""

from lightning_trainer.preview.base import PreviewBackend
from lightning_trainer.preview.local import LocalPreviewBackend
from lightning_trainer.preview.prompter import Prompter

__all__ = ["LocalPreviewBackend", "PreviewBackend", "Prompter"]
