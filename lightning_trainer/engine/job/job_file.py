"""A job's JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_trainer.engine.job.flat import nested
from lightning_trainer.types import InputError


def read_job(path: str | Path) -> dict[str, Any]:
    """The nested values of a job's JSON file.

    Raises:
        InputError: No such file, no JSON, no object, or a name that is none of ours.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise InputError(f"{path}: not a job's JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a job is a JSON object, not {type(values).__name__}")
    try:
        return nested(values)
    except InputError as error:
        raise InputError(f"{path}: {error}", key=error.key) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values
