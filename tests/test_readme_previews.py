"""The README's two terminals: a worker, and a trainer that is previewed by it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_trainer.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Previews on a second GPU")[2].partition("\n## ")[0]

SMALL = [
    "--trainer.accelerator",
    "cpu",
    "--data.max_length",
    "256",
    "--data.batch_size",
    "2",
    "--trainer.max_steps",
    "6",
]


def command(word: str) -> list[str]:
    """The first command of that name in the section, without environment and program."""
    [line, *_] = re.findall(rf"^    (?:\S+=\S+ )?lightning-trainer ({word} .*)$", SECTION, flags=re.MULTILINE)
    return str(line).split()


@pytest.fixture
def address(tiny_model_dir: Path) -> Iterator[str]:
    """Of a worker started as the README starts it, on a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = [word.replace("models/mine", str(tiny_model_dir)).replace(":8765", f":{port}") for word in command("serve")]
    worker = subprocess.Popen([sys.executable, "-m", "lightning_trainer", *words], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline().startswith("listening on ")
    yield f"127.0.0.1:{port}"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    worker.stdout.close()


def test_two_terminals(
    address: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    chat_rows: Any,
    write_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    write_rows(chat_rows(60), "chats.jsonl")
    [block, *_] = re.findall(r"```yaml\n# run.yaml\n(.*?)```", README, flags=re.DOTALL)
    run = yaml.safe_load(block.replace("Qwen/Qwen3-0.6B", str(tiny_model_dir)))
    run["trainer"]["precision"] = "32-true"  # that of the tiny model on the worker
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = [word.replace("127.0.0.1:8765", address) for word in command("fit")]

    assert main(["check", *words[1:], *SMALL]) == 0
    assert f"the worker at {address} answers and holds the same model" in capsys.readouterr().out
    assert main([*words, *SMALL]) == 0
    assert f"preview worker {address}: connected" in capsys.readouterr().out
    lines = (tmp_path / "outputs" / "mine" / "previews.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers
    assert {(answer["backend_type"], answer["success"]) for answer in answers} == {("remote", True)}
    assert {answer["weights_step"] for answer in answers} == {6}


def test_the_overlay_is_that_key_alone() -> None:
    overlay = yaml.safe_load((ROOT / "configs" / "preview" / "remote.yaml").read_text(encoding="utf-8"))
    assert list(overlay) == ["preview_backend"]


def test_check_says_that_nobody_answers(
    tiny_model_dir: Path, tmp_path: Path, chat_rows: Any, write_rows: Any, capsys: Any
) -> None:
    rows = write_rows(chat_rows(60), "chats.jsonl")
    words = [
        "--model.pretrained",
        str(tiny_model_dir),
        "--data.train_path",
        str(rows),
        "--trainer.precision",
        "32-true",
    ]
    words += ["--trainer.default_root_dir", str(tmp_path / "run"), *SMALL, "--preview_backend", "GrpcPreviewBackend"]
    main(["check", *words, "--preview_backend.address", "127.0.0.1:1"])
    assert "warning: preview_backend: the worker at 127.0.0.1:1 cannot be used: " in capsys.readouterr().out
