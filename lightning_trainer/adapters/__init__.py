"""Adapters beside a frozen model."""

from lightning_trainer.adapters.adapter import Adapter, adapted_layers, bits_digest, put_in
from lightning_trainer.adapters.files import other_contents, read_config
from lightning_trainer.adapters.settings import LoraSettings, refuse_contradictions

__all__ = [
    "Adapter",
    "LoraSettings",
    "adapted_layers",
    "bits_digest",
    "other_contents",
    "put_in",
    "read_config",
    "refuse_contradictions",
]
