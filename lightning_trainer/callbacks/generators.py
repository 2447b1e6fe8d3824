"""The random generators of every rank: each goes on with its own after a resume."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def states_of_ranks(trainer: Trainer) -> list[dict[str, Any]]:
    """States of all generators by rank, in types that `torch.load(weights_only=True)` takes; all ranks call this."""
    own = _states(trainer.strategy.root_device)
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states


def restore(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Put this rank's generators where they were; a rank that has no state gets numbers of its own.

    All ranks begin with the seed of the run, and would drop out the same places of different rows.
    """
    rank = trainer.global_rank
    if rank < len(states):
        _set(states[rank], trainer.strategy.root_device)
    elif rank:
        seed = torch.initial_seed() + rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


def _states(device: torch.device) -> dict[str, Any]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set(states: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
