"""The run directory: whose it is, what it remembers, where to go on from."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_trainer import checkpoints
from lightning_trainer.types import InputError

MANIFEST, CONFIG, LOCK = "manifest.json", "config.yaml", ".lock"

_PACKAGES = ("lightning-trainer", "torch", "lightning", "transformers", "datasets", "tokenizers", "safetensors")


class RunDirectory:
    """One run's directory.

    Args:
        path: `trainer.default_root_dir`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints stand."""
        return self.path / "checkpoints"

    def holds_a_run(self) -> bool:
        """Whether a run has been started here."""
        return (self.path / MANIFEST).exists() or self.checkpoints.exists()

    def has_no_checkpoint(self) -> bool:
        """Whether no checkpoint stands here, not even a damaged one."""
        return not checkpoints.step_directories(self.checkpoints)

    def check_writable(self) -> None:
        """Refuse a place where nothing can be written, before hours of work are done for it.

        Raises:
            InputError: See above.
        """
        there = self.path
        try:
            while not there.exists() and there != there.parent:
                there = there.parent
        except OSError as error:  # a name that is too long
            raise InputError(f"{error.strerror}: {str(self.path)!r}", key="trainer.default_root_dir") from error
        if not there.is_dir():
            raise InputError(f"{str(there)!r} is a file; name a directory", key="trainer.default_root_dir")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{str(there)!r} is not writable", key="trainer.default_root_dir")

    def refuse(self) -> None:
        """Say that the directory is taken.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{str(self.path)!r} already holds a run; --ckpt_path last goes on with it, --overwrite true moves it "
            "aside, --trainer.default_root_dir OTHER starts elsewhere",
            key="trainer.default_root_dir",
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out for as long as the block lasts; a killed process holds nothing.

        Raises:
            InputError: Another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another process is training in {str(self.path)!r}; wait for its end, or name another directory",
                    key="trainer.default_root_dir",
                ) from error
            yield

    def move_aside(self) -> None:
        """Rename the directory; nothing is deleted."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        os.rename(self.path, aside)
        rank_zero_info(f"the old run was moved to {aside}")

    def resolve_checkpoint(self, wanted: str | None) -> Path | None:
        """The checkpoint directory that `--ckpt_path` means; None to start from the beginning.

        Args:
            wanted: `last` (there must be one), `auto` (the beginning where there is none), a path, or None.

        Raises:
            InputError: It is not there.
        """
        if wanted is None:
            return None
        if wanted in ("last", "auto"):
            found = checkpoints.find_last(self.checkpoints, rank_zero_warn)
            if found is None and not self.has_no_checkpoint():
                raise InputError(
                    f"all checkpoints in {str(self.checkpoints)!r} are damaged; name another with --ckpt_path, or "
                    "start anew with --overwrite true",
                    key="ckpt_path",
                )
            if found is None and wanted == "last":
                raise InputError(
                    f"--ckpt_path last: there is no whole checkpoint in {str(self.checkpoints)!r}; --ckpt_path auto "
                    "starts from the beginning then",
                    key="ckpt_path",
                )
            if found is not None:
                rank_zero_info(f"resuming from {found}")
            return found
        path = Path(wanted)
        if not path.is_dir():
            known = ", ".join(p.name for _, p in checkpoints.step_directories(self.checkpoints)) or "none"
            raise InputError(
                f"there is no checkpoint directory {wanted!r}; in {str(self.checkpoints)!r} there are: {known}",
                key="ckpt_path",
            )
        return path

    def manifest(self) -> dict[str, Any]:
        """What the run was started with; empty before the first start."""
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}; a run without it cannot be resumed") from error
        return content

    def write_manifest(self, content: dict[str, Any]) -> None:
        """Replace the manifest in one step."""
        self.path.mkdir(parents=True, exist_ok=True)
        tmp = self.path / f".{MANIFEST}.tmp"
        tmp.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(tmp, self.path / MANIFEST)

    def save_config(self, text: str) -> None:
        """Write `config.yaml`; what an earlier attempt ran with is kept as `config.1.yaml`, `config.2.yaml`, …."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / CONFIG
        if path.exists():
            if path.read_text(encoding="utf-8") == text:
                return
            number = 1
            while (old := self.path / f"config.{number}.yaml").exists():
                number += 1
            os.replace(path, old)
        path.write_text(text, encoding="utf-8")


def check_unchanged(old: dict[str, str], new: dict[str, str], allowed: list[str]) -> None:
    """Compare the fingerprints of a run with those it is resumed with.

    Args:
        old: From the manifest.
        new: Of what is configured now.
        allowed: Names that may differ.

    Raises:
        InputError: Something else differs; both values are named.
    """
    known = [*new, "lock"]
    unknown = [name for name in allowed if name not in known]
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is nothing that could have changed; choose from {', '.join(known)}", key="allow_changed"
        )
    changed = [name for name in new if name in old and old[name] != new[name]]
    for name in changed:
        if name in allowed:
            rank_zero_warn(
                f"{name} is not what the run began with (allowed): {_short(old[name])} -> {_short(new[name])}"
            )
    refused = [name for name in changed if name not in allowed]
    if refused:
        lines = [f"  {name}: was {_short(old[name])}, is {_short(new[name])}" for name in refused]
        what = "this is not what the run began with:\n" + "\n".join(lines)
        way = f"put it back, or resume with --allow-changed {' '.join(refused)}"
        raise InputError(f"{what}\n{way}", key="ckpt_path")


def _short(fingerprint: str) -> str:
    """A hash by its beginning; what stands before it in full."""
    *name, digest = fingerprint.split(" ")
    return " ".join([*name, digest[:12]])


def rank() -> int:
    """Of this process; 0 before any launcher has said otherwise."""
    known: Any = rank_zero_only
    return int(getattr(known, "rank", 0) or 0)


def environment() -> dict[str, Any]:
    """Versions, and the git revision of the directory the run was started in."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "git": _git_revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
