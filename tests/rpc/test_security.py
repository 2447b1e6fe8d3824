"""Who may connect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_trainer.rpc.security import check_exposure, parse_address, read_token, same_token
from lightning_trainer.types import InputError


@pytest.mark.parametrize(
    ("text", "target", "loopback"),
    [
        ("127.0.0.1:8765", "127.0.0.1:8765", True),
        ("127.9.9.9:1", "127.9.9.9:1", True),
        ("localhost:8765", "localhost:8765", True),
        ("[::1]:8765", "[::1]:8765", True),
        ("unix:/tmp/s", "unix:/tmp/s", True),
        ("0.0.0.0:8765", "0.0.0.0:8765", False),
        ("[::]:8765", "[::]:8765", False),
        ("192.168.1.5:8765", "192.168.1.5:8765", False),
        ("box:8765", "box:8765", False),
        ("localhost.evil.example:1", "localhost.evil.example:1", False),
    ],
)
def test_addresses(text: str, target: str, loopback: bool) -> None:
    address = parse_address(text)
    assert (address.target, address.is_loopback) == (target, loopback)


@pytest.mark.parametrize(
    "text", ["", "8765", "box", "box:", ":8765", "::1:8765", "box:x", "box:65536", "unix:", "[box]:1", "a:٣"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError):
        parse_address(text)


@pytest.mark.parametrize(
    ("tls", "token", "insecure", "refused"),
    [
        (False, False, False, "has not TLS and a token"),
        (True, False, False, "has not a token"),
        (False, True, False, "has not TLS"),
        (True, True, False, ""),
        (False, False, True, ""),
        (False, True, True, "in the clear"),
        (True, False, True, "has not a token"),
        (True, True, True, ""),
    ],
)
def test_beyond_loopback(tls: bool, token: bool, insecure: bool, refused: str) -> None:
    check_exposure(parse_address("127.0.0.1:1"), tls, token, insecure)
    if not refused:
        check_exposure(parse_address("0.0.0.0:1"), tls, token, insecure)
        return
    with pytest.raises(InputError, match=refused):
        check_exposure(parse_address("0.0.0.0:1"), tls, token, insecure)


def _token(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_file(tmp_path: Path) -> None:
    assert read_token(_token(tmp_path / "t", "a" * 32 + "\n")) == "a" * 32


@pytest.mark.parametrize(
    ("text", "mode", "error"),
    [
        ("a" * 32, 0o640, "chmod 600"),
        ("a" * 32, 0o604, "chmod 600"),
        ("a" * 31, 0o600, "at least 32"),
        ("", 0o600, "at least 32"),
        ("a" * 32 + " b", 0o600, "one word"),
        ("ä" * 32, 0o600, "no ASCII"),
    ],
)
def test_what_is_no_token_file(text: str, mode: int, error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=error):
        read_token(_token(tmp_path / "t", text, mode))


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_tokens_are_compared_whole() -> None:
    assert same_token("a" * 32, "a" * 32)
    assert not same_token("a" * 31, "a" * 32)
    assert not same_token("", "a" * 32)
    assert not same_token("\udc80", "a" * 32)


def test_certificates_are_made(tmp_path: Path) -> None:
    import subprocess

    tool = Path(__file__).parents[2] / "tools" / "make_certs"
    folder = tmp_path / "certs"
    done = subprocess.run([tool, folder, "127.0.0.1", "box.lan"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "IP:127.0.0.1,DNS:box.lan" in done.stdout
    assert sorted(os.listdir(folder)) == ["ca.key", "ca.pem", "token", "worker.key", "worker.pem"]  # noqa: PTH208
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(read_token(folder / "token")) == 64
    again = subprocess.run([tool, folder, "127.0.0.1"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is there already" in again.stderr
