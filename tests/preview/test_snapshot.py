"""A slot holds the bytes of one step, where the layout says."""

import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_trainer.preview.snapshot import SPARE_BYTES, Slot, available_bytes, check_room
from lightning_trainer.rpc.layout import layout_of, raw_bytes
from lightning_trainer.types import InputError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),  # 6 bytes: what follows is not aligned
        "b": torch.arange(6, dtype=torch.float32).view(2, 3).t(),  # not contiguous
        "c": torch.empty(0, 4),
        "d": torch.tensor(7.0, dtype=torch.float16),
    }


@pytest.fixture
def slot() -> Any:
    made = Slot(layout_of(tensors()), torch.device("cpu"))
    yield made
    made.close()


def read(slot: Slot) -> bytes:
    with mmap.mmap(slot.fd, slot.nbytes, prot=mmap.PROT_READ) as memory:
        return bytes(memory)


def test_tensors_lie_end_to_end_row_major(slot: Slot) -> None:
    given = tensors()
    slot.fill(given)
    slot.settle()
    assert slot.settled()
    assert slot.nbytes == 6 + 24 + 0 + 2
    assert read(slot) == b"".join(bytes(raw_bytes(tensor)) for tensor in given.values())
    assert given["b"].stride() == (1, 3)  # the model's own tensor is as it was


def test_a_slot_holds_one_step_and_not_what_came_after(slot: Slot) -> None:
    given = tensors()
    for step in (1, 2, 3):
        for tensor in given.values():
            tensor.fill_(step)
        slot.fill(given)
        slot.settle()
        expected = b"".join(bytes(raw_bytes(tensor.clone())) for tensor in given.values())
        for tensor in given.values():
            tensor.fill_(-1)
        assert read(slot) == expected


def test_a_tensor_of_another_shape_is_refused(slot: Slot) -> None:
    with pytest.raises(ValueError, match="a is"):
        slot.fill({**tensors(), "a": torch.zeros(4)})


def test_close_gives_the_memory_back_and_may_be_repeated() -> None:
    slot = Slot(layout_of(tensors()), torch.device("cpu"))
    fd = slot.fd
    slot.close()
    slot.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_too_little_memory_is_said_with_figures() -> None:
    check_room(1000, lambda: 1000 + SPARE_BYTES)
    with pytest.raises(InputError, match=rf"need 1001 bytes .* {1000 + SPARE_BYTES} are free") as caught:
        check_room(1001, lambda: 1000 + SPARE_BYTES)
    assert caught.value.key == "preview_backend"


@pytest.mark.parametrize(("limit", "free"), [("max", 800 << 10), ("500000", 500_000 - 300_000 + 100_000)])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit: str, free: int) -> None:
    group = tmp_path / "sys/fs/cgroup/box"
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 200000\ninactive_file 100000\n")
    assert available_bytes(tmp_path) == free


def test_free_memory_is_read_from_the_kernel() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50
