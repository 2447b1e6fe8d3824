"""Whether a worker can be used, heard before a run begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_trainer.preview.companion import Companion
from lightning_trainer.preview.dialogue import Setup
from lightning_trainer.preview.publication import Publication
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import base_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 2.9
"""Most that the start of training waits for the worker's first answer."""

LOADING_SECONDS = 120.0
"""Most that a run which must have the worker waits while that loads its model."""

LOADING = "loading its model"
"""In what a worker says then."""

NO_ANSWER = f"no answer within {SECONDS:g} s"


def why_not(companion: Companion, is_required: bool = False) -> str:
    """Why the worker cannot be used, or empty.

    Args:
        companion: Just started.
        is_required: Whether to wait for a worker that is not ready yet.
    """
    started = time.monotonic()
    while (left := started + _patience(companion, is_required) - time.monotonic()) > 0:
        if companion.state in ("connected", "off") or (companion.state and not _waits(companion, is_required)):
            break
        companion.receive(left)
    return "" if companion.state == "connected" else companion.why or NO_ANSWER


def _waits(companion: Companion, is_required: bool) -> bool:
    return is_required and LOADING in companion.why


def _patience(companion: Companion, is_required: bool) -> float:
    return LOADING_SECONDS if _waits(companion, is_required) else SECONDS


def examine(
    publication: Publication,
    setup_of: Callable[[Publication], Setup],
    load_base: Callable[[], PreTrainedModel] | None,
) -> str:
    """Why a run could not use the worker, or empty; nothing is sent.

    Args:
        publication: Of the model without its weights.
        setup_of: For a dispatcher.
        load_base: Loads the weights that adapters lie on; called once the worker answers and the rest is equal.
    """
    why = _asked(setup_of(publication if load_base is None else replace(publication, kind=pb.UPDATE_KIND_ADAPTER)))
    if why or load_base is None:
        return why
    identity = pb.ModelIdentity()
    identity.CopyFrom(publication.identity)
    identity.frozen_base_sha256 = base_digest(load_base())
    return _asked(setup_of(replace(publication, identity=identity)))


def _asked(setup: Setup) -> str:
    companion = Companion(setup)
    try:
        return why_not(companion)
    finally:
        companion.stop()
