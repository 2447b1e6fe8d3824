"""Slot: a copy of the weights of one optimizer step, in memory that the dispatcher reads."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_trainer.rpc.layout import Entry
from lightning_trainer.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

KEY = "preview_backend"

SPARE_BYTES = 256 << 20
"""Left to everything else."""


def available_bytes(root: Path = Path("/")) -> int:
    """What can be had without swapping, of the machine and of the control group (a container's limit).

    Args:
        root: Where `proc` and `sys` lie.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in each control group that this process is in and that has a limit; file caches count as free."""
    try:
        named = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    inner = next((line.removeprefix("0::/") for line in named if line.startswith("0::")), "")
    top = root / "sys/fs/cgroup"
    for group in [top / inner, *(top / inner).parents]:
        try:
            most, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
            cached = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            if most.strip() != "max":
                yield max(0, int(most) - int(used) + int(cached.get("inactive_file", 0)))
        except OSError:
            pass  # the root group has no limit, and a container may not see all of them
        if group == top:
            return


def check_room(needed: int, available: Callable[[], int] = available_bytes) -> None:
    """Refuse slots that would push the training process out of memory.

    Args:
        needed: Bytes of all slots.

    Raises:
        InputError: There is too little memory.
    """
    free = available()
    if needed + SPARE_BYTES > free:
        raise InputError(
            f"remote previews need {needed} bytes of host memory for a copy of the weights, beside {SPARE_BYTES} to "
            f"spare, and {free} are free: train adapters (model.lora), whose copy is small, or take "
            "LocalPreviewBackend",
            key=KEY,
        )


class Slot:
    """Memory of exactly the layout's bytes; the tensors lie end to end.

    All of it is of one step: `fill` copies every tensor, and nothing may change them before `settle` was called.

    Args:
        layout: Tensors and their order.
        device: That the tensors are on. Copies from a GPU run beside the training on a stream of their own.

    Attributes:
        fd: To be handed to the dispatcher.
        nbytes: Of the memory.
    """

    def __init__(self, layout: Sequence[Entry], device: torch.device) -> None:
        self._layout = tuple(layout)
        self.nbytes = sum(entry.nbytes for entry in self._layout)
        self.fd = os.memfd_create("preview-weights", os.MFD_CLOEXEC)
        self._bytes: Tensor | None = None
        self._copies: _DeviceCopies | None = None
        try:
            os.ftruncate(self.fd, self.nbytes)
            # Populated now: a page that is first touched within a training step would make that step wait.
            self._memory = mmap.mmap(self.fd, self.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
            self._copies = _DeviceCopies(self._bytes, device) if device.type == "cuda" else None
        except BaseException:
            os.close(self.fd)
            raise

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors to their places; from a GPU, begin to.

        Args:
            tensors: Every one of the layout, by name.

        Raises:
            ValueError: One is not as the layout says.
        """
        if self._copies is not None:
            self._copies.begin(lambda: self._copy(tensors))
        else:
            self._copy(tensors)

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._bytes is not None, "the slot is closed"
        start = 0
        for entry in self._layout:
            tensor = tensors[entry.name].detach()
            if tuple(tensor.shape) != entry.shape or tensor.nbytes != entry.nbytes:
                raise ValueError(f"{entry.name} is {tuple(tensor.shape)} {tensor.dtype}, was {entry.shape}")
            # As bytes: the layout packs tensors of 2 and 4 bytes a value without gaps.
            values = tensor.contiguous().view(-1).view(torch.uint8)
            self._bytes[start : start + entry.nbytes].copy_(values, non_blocking=self._copies is not None)
            start += entry.nbytes

    def settled(self) -> bool:
        """Whether the copies are through."""
        return self._copies is None or self._copies.done()

    def settle(self) -> None:
        """Have what the device does from here on come after the copies; the host does not wait for it."""
        if self._copies is not None:
            self._copies.precede()

    def wait(self) -> None:
        """Wait until the copies are through."""
        if self._copies is not None:
            self._copies.wait()

    def close(self) -> None:
        """Give the memory back."""
        if self._bytes is None:
            return
        self.wait()
        if self._copies is not None:
            self._copies.close()
        self._bytes = self._copies = None
        self._memory.close()
        os.close(self.fd)


class _DeviceCopies:
    """Copies from a GPU to page-locked memory, after what training has enqueued and beside what it enqueues next."""

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        self._device, self._memory = device, memory
        self._stream = torch.cuda.Stream(device)
        self._event: Any = torch.cuda.Event()
        runtime: Any = torch.cuda.cudart()
        # Refused where the limit on locked memory is low: copies are right without, but make the host wait.
        self._pinned = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
        if not self._pinned:
            self._forget_error()

    def _forget_error(self) -> None:
        """CUDA keeps the error of a call that failed, and torch would raise it at the next kernel, within training."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)

    def begin(self, copy: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
            self._event.record(self._stream)

    def done(self) -> bool:
        return bool(self._event.query())

    def precede(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()

    def close(self) -> None:
        if self._pinned:
            runtime: Any = torch.cuda.cudart()
            if int(runtime.cudaHostUnregister(self._memory.data_ptr())) != 0:
                self._forget_error()
