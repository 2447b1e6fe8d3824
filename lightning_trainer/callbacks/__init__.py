"""Callbacks, each to be named in the YAML by its short name."""

from lightning_trainer.callbacks.checkpoint import RunCheckpoint
from lightning_trainer.callbacks.export import HuggingFaceExport
from lightning_trainer.callbacks.find import callbacks_of
from lightning_trainer.callbacks.finite import NonFiniteError
from lightning_trainer.callbacks.predict import PredictionWriter
from lightning_trainer.callbacks.preview import PreviewCallback
from lightning_trainer.callbacks.progress import RunProgress
from lightning_trainer.callbacks.self_check import SelfCheck
from lightning_trainer.callbacks.status import MEASURED, StatusFile
from lightning_trainer.callbacks.train_log import TrainLog
from lightning_trainer.callbacks.validation import StepValidation

__all__ = [
    "MEASURED",
    "HuggingFaceExport",
    "NonFiniteError",
    "PredictionWriter",
    "PreviewCallback",
    "RunCheckpoint",
    "RunProgress",
    "SelfCheck",
    "StatusFile",
    "StepValidation",
    "TrainLog",
    "callbacks_of",
]
