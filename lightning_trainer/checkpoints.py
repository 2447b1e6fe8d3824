"""Checkpoint directories: written whole or not at all, and found again.

checkpoints/step=000300.ckpt/   what from_pretrained loads, plus
    trainer.pt                  optimizer, loops, random generators: plain types
    checkpoint.json             step, epoch, and size and sha256 of every file; written last
checkpoints/last.ckpt           relative symlink to the newest
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_trainer.types import InputError

STATE, INDEX, LAST = "trainer.pt", "checkpoint.json", "last.ckpt"

_STEP = re.compile(r"step=(\d+)\.ckpt")

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors tells what the system said."""

_FULL = 1 << 20
"""Bytes left on a disk that counts as full: libraries that write for us do not say why they failed."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what was there before is as it was."""

    def __str__(self) -> str:
        return str(self.strerror)


def step_name(step: int) -> str:
    """Directory name of an optimizer step."""
    return f"step={step:06d}.ckpt"


def step_directories(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every step checkpoint, oldest first, whole or not."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step=*.ckpt") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def write(target: Path, fill: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Make a checkpoint directory: under a temporary name beside `target`, flushed to disk, then renamed.

    Args:
        target: Where it will stand. A checkpoint already there gives way once this one is whole; anything else there
            is moved aside.
        fill: Writes the files into the directory it is given.
        about: Plain values for `checkpoint.json`.

    Raises:
        CheckpointWriteError: A full disk, a read-only directory; nothing that was there has changed.
    """
    tmp = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        _make_folder(target.parent)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        fill(tmp)
        files = {str(path.relative_to(tmp)): _describe(path) for path in sorted(tmp.rglob("*")) if path.is_file()}
        _write_synced(tmp / INDEX, json.dumps({**about, "files": files}, indent=2) + "\n")
        for directory in (tmp, *(path for path in tmp.rglob("*") if path.is_dir())):
            _sync_directory(directory)
        _put_in_place(tmp, target)
    except OSError as error:
        number, why = explain(error, tmp)  # while what was written still fills the disk
        raise CheckpointWriteError(number, f"the checkpoint {target} could not be written: {why}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # after the rename there is none


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_directory(path.parent)


def _put_in_place(tmp: Path, target: Path) -> None:
    aside = _aside(target)
    try:
        if target.exists():
            target.rename(aside)
        tmp.rename(target)
    except BaseException:  # a second Ctrl-C too
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    _sync_directory(target.parent)
    if (aside / INDEX).exists():
        try:
            remove(aside)
        except OSError as error:  # the new one stands
            warnings.warn(f"{aside} is no longer needed and could not be deleted: {error}", stacklevel=2)


def remove(directory: Path) -> None:
    """Delete a checkpoint; killed half-way, it leaves no half of one under its name."""
    tmp = directory.with_name(f".{directory.name}.old.tmp-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)  # of a removal that failed
    directory.rename(tmp)
    shutil.rmtree(tmp)


def explain(error: Exception, tmp: Path) -> tuple[int, str]:
    """(errno, why a write failed and what to do), for errors of libraries too, which do not say that a disk is full."""
    told = _OS_ERROR.search(str(error))
    number = int(told[1]) if told else getattr(error, "errno", None) or errno.EIO
    try:
        there = next(path for path in (tmp, *tmp.parents) if path.exists())
        free = shutil.disk_usage(there).free
        largest = max((path.stat().st_size for path in tmp.rglob("*") if path.is_file()), default=0)
    except OSError:  # the disk itself fails
        return number, str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or (number == errno.EIO and free < _FULL):
        return errno.ENOSPC, f"the disk of {tmp.parent} is full ({free // 1024} KiB are left); free some space there"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number == errno.EFBIG or largest >= limit != resource.RLIM_INFINITY:
        lift = "lift the limit (ulimit -f) or choose another disk"
        return errno.EFBIG, f"no file may be larger than {limit} bytes here; {lift}"
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return number, f"{reason}: {getattr(error, 'filename', None) or there}; make {tmp.parent} writable"
    return number, reason


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def about(directory: Path) -> dict[str, Any]:
    """What `checkpoint.json` says.

    Raises:
        InputError: The directory is no checkpoint of ours.
    """
    try:
        content: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(directory)!r} is no checkpoint of this trainer: {error}", key="ckpt_path") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(directory / INDEX)!r} is no index of a checkpoint", key="ckpt_path")
    return content


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads every byte."""
    try:
        index = about(directory)
        files = {name: (want["bytes"], want["sha256"]) for name, want in index["files"].items()}
    except InputError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{INDEX} does not list its files"
    if STATE not in files or not any(name.endswith(".safetensors") for name in files):
        return f"{INDEX} lists no {STATE} or no weights"
    if not isinstance(index.get("global_step"), int):
        return f"{INDEX} does not say which optimizer step it is of"
    for name, (size, digest) in files.items():
        wrong = _damage_of(directory / name, size, digest)
        if wrong is not None:
            return f"{name} {wrong}"
    return None


def _damage_of(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, {size} were written"
    try:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError as error:  # a bad sector is damage, not the end of the search for a whole one
        return f"cannot be read: {error.strerror}"
    return None if same else "has changed since it was written (sha256 differs)"


def point_last(folder: Path, target: Path) -> None:
    """Let `last.ckpt` name `target`, in one step.

    Raises:
        CheckpointWriteError: It still names what it named.
    """
    tmp, last = folder / f".{LAST}.tmp-{os.getpid()}", folder / LAST
    try:
        tmp.unlink(missing_ok=True)
        tmp.symlink_to(target.name)
        if last.is_dir() and not last.is_symlink():  # a run that was copied with its links followed
            last.rename(_aside(last))
        os.replace(tmp, last)
        _sync_directory(folder)
    except OSError as error:
        number, why = explain(error, tmp)
        raise CheckpointWriteError(number, f"{last} could not be made to name {target.name}: {why}") from error


def find_last(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    Args:
        folder: The run's `checkpoints`.
        say: Told of every damaged checkpoint that was passed over.
    """
    candidates = [path for _, path in reversed(step_directories(folder))]
    try:
        last = (folder / LAST).resolve()
    except (OSError, RuntimeError):  # a link to itself
        last = folder / "none"
    if last.is_dir() and last not in (path.resolve() for path in candidates):
        candidates.append(last)  # a run whose step directories were renamed
    for path in candidates:
        wrong = damage(path)
        if wrong is None:
            return path
        say(f"the checkpoint {path.name} is damaged and passed over: {wrong}")
    return None


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps: the run goes on from `step`, and theirs is another future.

    Returns:
        Where they are now.
    """
    moved = [(path, _aside(path)) for number, path in step_directories(folder) if number > step]
    for path, aside in moved:
        path.rename(aside)
    if moved:
        _sync_directory(folder)
    return [aside for _, aside in moved]


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed save or removal left under a temporary name."""
    for path in folder.glob(".*.tmp-*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
