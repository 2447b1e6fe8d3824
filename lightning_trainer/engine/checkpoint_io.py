"""DirectoryCheckpointIO: Lightning's checkpoints as directories that transformers loads.

In Lightning's hands it serves every callback that saves, a stock ModelCheckpoint included.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError

from lightning_trainer import checkpoints
from lightning_trainer.types import InputError


class DirectoryCheckpointIO(CheckpointIO):
    """Writes and reads `step=NNNNNN.ckpt/`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one directory, whole or not at all.

        Args:
            checkpoint: Lightning's; `pretrained`, when there, is called with the directory and writes the model.
            path: Of the directory.
            storage_options: Not used.
        """
        state = dict(checkpoint)
        write_pretrained = state.pop("pretrained", None)

        def fill(directory: Path) -> None:
            # Both report a full disk as errors of their own.
            try:
                if write_pretrained is not None:
                    write_pretrained(directory)
                torch.save(state, directory / checkpoints.STATE)
                # Or it would be found out on resume. Mapped: only what is not tensors is read.
                torch.load(directory / checkpoints.STATE, map_location="cpu", weights_only=True, mmap=True)
            except UnpicklingError as error:
                raise OSError(
                    errno.EINVAL, f"what a callback keeps cannot be read back: {_object_in(error)}"
                ) from error
            except (SafetensorError, RuntimeError) as error:
                raise OSError(errno.EIO, str(error)) from error

        about = {name: state.get(name) for name in ("global_step", "epoch", "run")}
        checkpoints.write(Path(path), fill, about)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the trainer's state; the weights stay where they are, for the module to fetch from `directory`.

        Raises:
            InputError: The checkpoint is damaged, or none of ours.
        """
        directory = Path(path).resolve()
        if not directory.is_dir():
            raise InputError(f"there is no checkpoint directory {str(path)!r}", key="ckpt_path")
        wrong = checkpoints.damage(directory)
        if wrong is not None:
            raise InputError(f"the checkpoint {str(path)!r} is damaged: {wrong}", key="ckpt_path")
        state: dict[str, Any] = torch.load(directory / checkpoints.STATE, map_location="cpu", weights_only=True)
        return {**state, "directory": directory}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint directory, or a link to one."""
        target = Path(path)
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            checkpoints.remove(target)


def _object_in(error: UnpicklingError) -> str:
    """What torch will not read, and what may be kept instead."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = found[1] if found else str(error).splitlines()[0]
    return f"{what}; its state_dict() may hold tensors, numbers, strings, lists and dicts"
