"""Preview backends by the names that jobs give them."""

from __future__ import annotations

from typing import Any

from lightning_trainer.preview.base import PreviewBackend
from lightning_trainer.preview.local import LocalPreviewBackend
from lightning_trainer.preview.remote import GrpcPreviewBackend
from lightning_trainer.types import InputError

BACKENDS: dict[str, type[PreviewBackend]] = {"local": LocalPreviewBackend, "remote_3090": GrpcPreviewBackend}


def create_preview_backend(name: str, **options: Any) -> PreviewBackend:
    """Make a backend.

    Args:
        name: local or remote_3090.
        **options: Of the backend's class.

    Raises:
        InputError: There is no such backend, or an option is wrong.
    """
    if name not in BACKENDS:
        raise InputError(f"there is no preview backend {name!r}; choose from {', '.join(BACKENDS)}")
    return BACKENDS[name](**options)
