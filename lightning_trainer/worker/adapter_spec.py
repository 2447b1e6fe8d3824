"""Adapters as a trainer describes them on the wire, checked against the model before any are made."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

from lightning_trainer.adapters import LoraSettings
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Reason, Refusal
from lightning_trainer.rpc.limits import ADAPTER_RANK, NAME_BYTES


def settings_of(spec: pb.AdapterSpec, modules: Set[str]) -> LoraSettings:
    """The settings to make such adapters with.

    Args:
        modules: Names of the model's modules, which those in `spec` must be of: patterns are not taken.

    Raises:
        Refusal: A value is out of its range, or a name is of no module.
    """
    _require(0 < spec.rank <= ADAPTER_RANK, "adapter.rank", spec.rank)
    whole = math.isfinite(spec.alpha) and spec.alpha >= 1 and spec.alpha == int(spec.alpha)
    _require(whole, "adapter.alpha", spec.alpha)
    _require(len(spec.target_modules) > 0, "adapter.target_modules", "empty")
    for field in ("target_modules", "modules_to_save"):
        names = getattr(spec, field)
        _require(len(names) <= len(modules), f"adapter.{field}", f"{len(names)} names")
        for name in names:
            _require(name in modules, f"adapter.{field}", repr(name[:NAME_BYTES]))
    return LoraSettings(
        rank=spec.rank,
        alpha=int(spec.alpha),
        target_modules=list(spec.target_modules),
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        dtype="fp32" if spec.fp32 else None,
        modules_to_save=list(spec.modules_to_save),
    )


def _require(holds: bool, field: str, value: Any) -> None:
    if not holds:
        raise Refusal(Reason.REASON_INVALID_ARGUMENT, f"{field} is {value}", [field])
