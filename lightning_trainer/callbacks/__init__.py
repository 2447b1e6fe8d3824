"""Callbacks, each to be named in the YAML by its short name."""

from lightning_trainer.callbacks.checkpoint import Interrupted, RunCheckpoint
from lightning_trainer.callbacks.export import HuggingFaceExport
from lightning_trainer.callbacks.finite import NonFiniteError
from lightning_trainer.callbacks.predict import PredictionWriter
from lightning_trainer.callbacks.preview import PreviewCallback
from lightning_trainer.callbacks.self_check import SelfCheck
from lightning_trainer.callbacks.status import StatusFile
from lightning_trainer.callbacks.train_log import TrainLog

__all__ = [
    "HuggingFaceExport",
    "Interrupted",
    "NonFiniteError",
    "PredictionWriter",
    "PreviewCallback",
    "RunCheckpoint",
    "SelfCheck",
    "StatusFile",
    "TrainLog",
]
