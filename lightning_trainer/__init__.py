"""Fine-tune causal language models on your own GPUs, from one YAML.

Importing the package loads neither torch nor lightning: each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CausalLMModule": "model",
    "ChatDataModule": "data",
    "ConfigLoader": "engine.job.config_loader",
    "CompensatedAdamW": "model",
    "CompensatedMuon": "model",
    "DataProfile": "profiles",
    "GrpcPreviewBackend": "preview",
    "LocalPreviewBackend": "preview",
    "PreviewBackend": "preview",
    "PreviewCallback": "callbacks",
    "PreviewResult": "types",
    "SingleDtypePrecision": "precision",
    "StatusFile": "callbacks",
    "TrainerConfig": "engine.job.trainer_config",
    "TrainerEngine": "engine.trainer_engine",
    "TrainingResult": "engine.trainer_engine",
    "TrainingStatusReader": "status",
    "TrainingStatusWriter": "status",
    "create_default_config": "engine.job.trainer_config",
    "create_preview_backend": "preview",
    "get_profile": "profiles",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
