"""Answers of the model in training."""

from lightning_trainer.preview.base import PreviewBackend
from lightning_trainer.preview.factory import create_preview_backend
from lightning_trainer.preview.local import LocalPreviewBackend
from lightning_trainer.preview.prompter import Prompter
from lightning_trainer.preview.remote import GrpcPreviewBackend

__all__ = ["GrpcPreviewBackend", "LocalPreviewBackend", "PreviewBackend", "Prompter", "create_preview_backend"]
