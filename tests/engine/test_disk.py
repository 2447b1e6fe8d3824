"""Disks that fill, files that may not grow, folders that cannot be written: nothing good is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import KILLED, ForkServer, Job

from lightning_trainer import checkpoints

Fit = Callable[..., tuple[int, str]]


@pytest.fixture
def fit(server: ForkServer, job: Callable[..., Path], tmp_path: Path) -> Fit:
    """Run eight optimizer steps, with a checkpoint after every second; the status, and what was said."""
    config = job(trainer={"max_steps": 8}, data={"val_fraction": 0.0}, checkpoint={"every_n_train_steps": 2})

    def run(*words: str, **more: Any) -> tuple[int, str]:
        log = tmp_path / "log.txt"
        log.unlink(missing_ok=True)
        status = server.run(Job(["fit", "--config", str(config), *words], log=str(log), **more))
        return status, log.read_text()

    return run


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of its own at `place`; only root can make one, and not in every container."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is refused here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def planted(name: str, first: int, last: int, **more: int) -> list[str]:
    arguments = ", ".join(f"{key}: {value}" for key, value in {"first": first, "last": last, **more}.items())
    return ["--trainer.callbacks", f"[{{class_path: planted.{name}, init_args: {{{arguments}}}}}]"]


def steps(folder: Path) -> list[int]:
    found = [step for step, path in checkpoints.step_directories(folder) if checkpoints.damage(path) is None]
    assert len(found) == len([path for path in folder.iterdir() if path.name != "last.ckpt"]), "something else is left"
    return found


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["model.safetensors", "trainer.pt"])
def test_a_limit_on_files_stops_the_run_in_words(limit: int, fit: Fit, tmp_path: Path, weights: Any) -> None:
    status, said = fit(*planted("SmallFiles", 4, 99, limit=limit))
    assert status == 1
    assert last_line(said).startswith("error: the checkpoint ")
    assert f"no file may be larger than {limit} bytes here; lift the limit (ulimit -f) or choose another" in said
    assert "step=000002.ckpt, is intact; --ckpt_path last goes on from it" in last_line(said)
    assert "Traceback" not in said
    assert steps(tmp_path / "run" / "checkpoints") == [2]
    straight = ["--trainer.default_root_dir", str(tmp_path / "straight")]
    assert fit(*straight)[0] == 0
    assert fit("--ckpt_path", "last")[0] == 0
    found = [weights(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("run", "straight")]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])


def test_going_on_after_a_failed_save_tries_again_at_the_next(fit: Fit, tmp_path: Path) -> None:
    status, said = fit(*planted("SmallFiles", 2, 6), "--checkpoint.on_save_failure", "continue")
    assert status == 0, said
    assert "optimizer step 2: the checkpoint" in said
    assert "there is none before it. Failure 1 of this attempt; training goes on" in said
    assert "Failure 2 of this attempt" in said
    assert steps(tmp_path / "run" / "checkpoints") == [6, 8]


def test_the_end_of_a_run_must_be_saved(fit: Fit, tmp_path: Path) -> None:
    status, said = fit(*planted("SmallFiles", 7, 99), "--checkpoint.on_save_failure", "continue")
    assert status == 1
    assert "step=000008.ckpt could not be written" in last_line(said)
    assert "step=000006.ckpt, is intact" in last_line(said)
    assert steps(tmp_path / "run" / "checkpoints") == [2, 4, 6]


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_disk_that_fills(choice: str, fit: Fit, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        words = ["--trainer.default_root_dir", str(disk / "run"), "--checkpoint.on_save_failure", choice]
        status, said = fit(*words, *planted("FullDisk", 3, 5))
        assert f"the disk of {disk / 'run' / 'checkpoints'} is full" in said
        assert "free some space there" in said
        assert "Traceback" not in said
        assert status == (1 if choice == "stop" else 0), said
        assert steps(disk / "run" / "checkpoints") == ([2] if choice == "stop" else [2, 6, 8])


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_folder_that_cannot_be_written(choice: str, fit: Fit, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with small_disk(folder, "8m") if os.geteuid() == 0 else contextlib.nullcontext():
        words = ["--ckpt_path", "auto", "--checkpoint.on_save_failure", choice]
        status, said = fit(*words, *planted("ReadOnly", 3, 5))
        assert f"make {folder} writable" in said
        assert "Traceback" not in said
        assert status == (1 if choice == "stop" else 0), said
        assert steps(folder) == ([2] if choice == "stop" else [2, 6, 8])


def test_the_temporary_folder_does_not_matter(fit: Fit, tmp_path: Path) -> None:
    """Lightning's own write stages there, and a kill while it copies leaves a torn checkpoint."""
    elsewhere = Path("/dev/shm") / f"lightning-trainer-{os.getpid()}"
    if not elsewhere.parent.is_dir() or elsewhere.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system at hand")
    elsewhere.mkdir()
    try:
        environment = {"TMPDIR": str(elsewhere)}
        killed = {"in_save": 2, "kill_at": 14, "points": str(tmp_path / "points.txt")}
        assert fit(env=environment, **killed)[0] == KILLED
        assert (tmp_path / "points.txt").read_text().splitlines()[-1] == "half .step/trainer.pt"
        assert [path for path in elsewhere.rglob("*") if path.is_file()] == []
        assert checkpoints.find_last(tmp_path / "run" / "checkpoints", pytest.fail) is not None
        assert fit("--ckpt_path", "last", env={"TMPDIR": str(tmp_path / "not there")})[0] == 0
        assert steps(tmp_path / "run" / "checkpoints") == [4, 6, 8]
    finally:
        subprocess.run(["rm", "-r", str(elsewhere)], check=True)


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return "were written"


def flip(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "has changed since it was written (sha256 differs)"


def remove(path: Path) -> str:
    path.unlink()
    return "is missing"


def test_a_damaged_checkpoint_is_named_and_never_picked(fit: Fit, tmp_path: Path, weights: Any) -> None:
    assert fit()[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    straight = {key: value.clone() for key, value in weights(folder / "last.ckpt").items()}  # the file will change
    for number, harm in enumerate((truncate, flip, remove)):
        file = ("model.safetensors", "trainer.pt", "config.json")[number]
        wrong = harm(folder / "step=000008.ckpt" / file)
        status, said = fit("--ckpt_path", "last")
        assert status == 0, said
        assert f"step=000008.ckpt is damaged and passed over: {file} " in said
        assert wrong in said
        again = weights(folder / "last.ckpt")
        assert all(torch.equal(straight[key], again[key]) for key in straight)
        assert (folder / f"step=000008.ckpt.old-{number + 1}").is_dir()
    flip(folder / "step=000008.ckpt" / "trainer.pt")
    status, said = fit("--ckpt_path", str(folder / "step=000008.ckpt"))
    assert status == 2
    assert "is damaged: trainer.pt has changed" in last_line(said)
