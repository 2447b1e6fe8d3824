"""Checkpoint directories: whole or not at all, and found again."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_trainer import checkpoints
from lightning_trainer.types import InputError


def fill(text: str = "weights") -> Any:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_text(text)
        (directory / checkpoints.STATE).write_bytes(b"\0" * 100)

    return write


def make(folder: Path, step: int, text: str = "weights") -> Path:
    path = folder / checkpoints.step_name(step)
    checkpoints.write(path, fill(text), {"global_step": step})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written(tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoints", 300)
    assert path.name == "step=000300.ckpt"
    assert names(path) == ["checkpoint.json", "model.safetensors", "trainer.pt"]
    index = json.loads((path / "checkpoint.json").read_text())
    assert index["global_step"] == 300
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # printf weights | sha256sum
    assert index["files"]["model.safetensors"] == {"bytes": 7, "sha256": digest}
    assert checkpoints.damage(path) is None
    assert names(tmp_path / "checkpoints") == [path.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt(), ValueError("odd")])
def test_a_fill_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = make(tmp_path, 1, "old")

    def broken(directory: Path) -> None:
        fill("new")(directory)
        raise error

    with pytest.raises(type(error)):
        checkpoints.write(path, broken, {})
    assert names(tmp_path) == [path.name]
    assert (path / "model.safetensors").read_text() == "old"
    assert checkpoints.damage(path) is None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse a large file, as a full disk does; in a process of its own."""
    make(tmp_path, 1)
    script = f"""
import resource, signal
from pathlib import Path
from lightning_trainer import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.write(Path({str(tmp_path)!r}) / "step=000002.ckpt", lambda d: (d / "a").write_bytes(bytes(10000)), {{}})
except OSError as error:
    print("OSError", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)]
    assert names(tmp_path) == ["step=000001.ckpt"]


@pytest.mark.parametrize("place", ["_write_synced", "_sync_directory", "_describe"])
def test_an_error_while_flushing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = make(tmp_path, 1, "old")

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(checkpoints, place, broken)
    with pytest.raises(OSError, match="the disk is gone"):
        checkpoints.write(path, fill("new"), {})
    monkeypatch.undo()
    assert names(tmp_path) == [path.name]
    assert (path / "model.safetensors").read_text() == "old"


def test_a_rename_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, 1, "old")
    rename = Path.rename

    def broken(self: Path, target: Any) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        checkpoints.write(path, fill("new"), {})
    assert path.is_dir()
    assert (path / "model.safetensors").read_text() == "old"


def test_a_checkpoint_already_there_gives_way_once_the_new_one_is_whole(tmp_path: Path) -> None:
    path = make(tmp_path, 1, "first")
    make(tmp_path, 1, "second")
    assert names(tmp_path) == [path.name]
    assert (path / "model.safetensors").read_text() == "second"


def test_anything_else_already_there_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.step_name(1)
    path.mkdir()
    (path / "mine.txt").write_text("not a checkpoint")
    make(tmp_path, 1, "second")
    assert (tmp_path / f"{path.name}.old-1" / "mine.txt").read_text() == "not a checkpoint"
    assert checkpoints.step_directories(tmp_path) == [(1, path)]


def test_directories_within_a_checkpoint(tmp_path: Path) -> None:
    """A tokenizer with several chat templates saves them in `additional_chat_templates/`."""

    def with_folder(directory: Path) -> None:
        fill("weights")(directory)
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")

    path = tmp_path / checkpoints.step_name(1)
    checkpoints.write(path, with_folder, {"global_step": 1})
    assert checkpoints.damage(path) is None
    (path / "additional_chat_templates" / "tool_use.jinja").unlink()
    wrong = checkpoints.damage(path)
    assert wrong is not None
    assert "tool_use.jinja" in wrong


def test_missing_truncated_and_flipped_files_are_found(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    state = path / checkpoints.STATE
    state.write_bytes(b"\0" * 99)
    assert checkpoints.damage(path) == "trainer.pt has 99 bytes, 100 were written"
    state.write_bytes(b"\0" * 50 + b"\1" + b"\0" * 49)
    assert checkpoints.damage(path) == "trainer.pt has changed since it was written (sha256 differs)"
    state.unlink()
    assert checkpoints.damage(path) == "trainer.pt is missing"
    state.write_bytes(b"\0" * 100)
    assert checkpoints.damage(path) is None


@pytest.mark.parametrize(
    "index",
    [
        None,
        "",
        '{"global_step": 1',
        "{}",
        pytest.param("[]"),
        pytest.param('{"files": {"trainer.pt": {}}}'),
    ],
)
def test_a_broken_index_is_damage(tmp_path: Path, index: str | None) -> None:
    path = make(tmp_path, 1)
    if index is None:
        (path / checkpoints.INDEX).unlink()
    else:
        (path / checkpoints.INDEX).write_text(index)
    assert checkpoints.damage(path)


def test_about(tmp_path: Path) -> None:
    path = make(tmp_path, 7)
    assert checkpoints.about(path)["global_step"] == 7
    with pytest.raises(InputError, match="is no checkpoint of this trainer") as caught:
        checkpoints.about(tmp_path)
    assert caught.value.key == "ckpt_path"


def test_step_directories_are_in_order_of_their_number(tmp_path: Path) -> None:
    made = [make(tmp_path, step) for step in (1_000_000, 9, 10)]
    (tmp_path / "step=abc.ckpt").mkdir()
    (tmp_path / "step=000011.ckpt").write_text("a file")
    assert checkpoints.step_directories(tmp_path) == [(9, made[1]), (10, made[2]), (1_000_000, made[0])]


def test_last_is_a_relative_link(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = make(folder, 1), make(folder, 2)
    checkpoints.point_last(folder, first)
    checkpoints.point_last(folder, second)
    assert (folder / "last.ckpt").readlink() == Path("step=000002.ckpt")
    assert names(folder) == ["last.ckpt", "step=000001.ckpt", "step=000002.ckpt"]
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert checkpoints.find_last(moved, pytest.fail) == moved / "step=000002.ckpt"


def test_the_last_falls_back_to_the_newest_whole_and_says_so(tmp_path: Path) -> None:
    made = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    checkpoints.point_last(tmp_path, made[3])
    (made[3] / checkpoints.STATE).unlink()
    (made[2] / "model.safetensors").write_text("flipped")
    said: list[str] = []
    assert checkpoints.find_last(tmp_path, said.append) == made[1]
    assert said == [
        "the checkpoint step=000004.ckpt is damaged and passed over: trainer.pt is missing",
        "the checkpoint step=000003.ckpt is damaged and passed over: "
        "model.safetensors has changed since it was written (sha256 differs)",
    ]


@pytest.mark.parametrize("link", [None, "step=000009.ckpt"])
def test_without_a_link_or_with_a_dangling_one_the_newest_is_found(tmp_path: Path, link: str | None) -> None:
    made = [make(tmp_path, step) for step in (1, 2)]
    if link is not None:
        (tmp_path / "last.ckpt").symlink_to(link)
    assert checkpoints.find_last(tmp_path, pytest.fail) == made[1]


def test_a_newer_whole_checkpoint_than_the_link_is_taken(tmp_path: Path) -> None:
    made = [make(tmp_path, step) for step in (1, 2)]
    checkpoints.point_last(tmp_path, made[0])
    assert checkpoints.find_last(tmp_path, pytest.fail) == made[1]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoints.find_last(tmp_path, pytest.fail) is None
    assert checkpoints.find_last(tmp_path / "not there", pytest.fail) is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    checkpoints.point_last(tmp_path, path)
    left = tmp_path / ".step=000002.ckpt.tmp-123"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (tmp_path / ".last.ckpt.tmp-123").symlink_to("step=000002.ckpt")
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["last.ckpt", "step=000001.ckpt"]
    assert checkpoints.damage(path) is None


@pytest.mark.parametrize("content", ['{"files": {}, "global_step": 1}', "[" * 100_000])
def test_an_index_that_says_too_little_is_damage(content: str, tmp_path: Path) -> None:
    make(tmp_path, 1, "old")
    path = make(tmp_path, 2, "new")
    (path / checkpoints.INDEX).write_text(content)
    said: list[str] = []
    assert checkpoints.find_last(tmp_path, said.append) == tmp_path / checkpoints.step_name(1)
    assert len(said) == 1


def test_a_link_to_itself_is_no_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path, 1, "old")
    (tmp_path / checkpoints.LAST).unlink(missing_ok=True)
    (tmp_path / checkpoints.LAST).symlink_to(checkpoints.LAST)
    assert checkpoints.find_last(tmp_path, pytest.fail) == path
