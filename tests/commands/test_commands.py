"""check, inspect, status and convert, as they are typed."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_trainer.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_yaml(tmp_path: Path, tiny_model_dir: Path, chat_rows: Any, write_rows: Any) -> Callable[..., Path]:
    """A run.yaml; keyword arguments are merged into its sections."""

    def make(**sections: Any) -> Path:
        config: dict[str, Any] = {
            "model": {"pretrained": str(tiny_model_dir)},
            "data": {
                "train_path": str(write_rows(chat_rows(40))),
                "profile": "Plain",
                "max_length": 160,
                "batch_size": 1,
                "val_fraction": 0.2,
            },
            "trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "max_epochs": 2},
        }
        for section, values in sections.items():
            config[section] = {**config[section], **values}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return make


def test_check_says_what_fit_would_do(run_yaml: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    path = run_yaml()
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", "--config", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["check", "--config", str(path)]) == 0
    assert f"{report['run']['steps']} optimizer steps" in capsys.readouterr().out
    assert main(["fit", "--config", str(path), "--trainer.callbacks", "[]"]) == 0
    assert f"\n{report['run']['steps']} optimizer steps: train/loss" in capsys.readouterr().out


def test_the_exit_status_of_check(run_yaml: Callable[..., Path], capsys: Capture) -> None:
    slow = run_yaml(model={"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-5}}})
    assert main(["check", "--config", str(slow)]) == 0
    assert main(["check", "--strict", "--config", str(slow)]) == 1
    assert "84 % of the weights never move at lr 1e-5" in " ".join(capsys.readouterr().out.split())
    assert main(["check", "--config", str(run_yaml(data={"max_length": 20}))]) == 2
    assert main(["check", "--config", str(slow), "--data.max_len", "3"]) == 2
    assert "did you mean --data.max_length?" in capsys.readouterr().err


def test_check_says_that_the_directory_is_taken(run_yaml: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["check", "--config", str(run_yaml())]) == 2
    assert "already holds a run" in " ".join(capsys.readouterr().out.split())
    assert main(["check", "--strict", "--config", str(run_yaml()), "--overwrite", "true"]) == 0
    assert (tmp_path / "run").exists()


def test_inspect_shows_rows_and_writes_a_page(run_yaml: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    path = run_yaml()
    assert main(["inspect", "--config", str(path), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "⟦(add " in out
    assert "⟧⟪<|im_end|>⟫" in out
    assert "\nexample 2:" in out
    assert "\nexample 3:" not in out
    assert main(["inspect", "--config", str(path), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["inspect", "--config", str(path), "--rows", "0"]) == 2
    assert "--rows must be at least 1, not 0" in capsys.readouterr().err
    assert main(["inspect", "--config", str(path), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert not (tmp_path / "run").exists()


def test_status_of_a_run_and_of_none(run_yaml: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    assert main(["fit", "--config", str(run_yaml())]) == 0
    capsys.readouterr()
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "completed" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["status"], state["is_training"]) == ("completed", False)
    assert main(["status", str(tmp_path)]) == 2
    assert "status.json" in capsys.readouterr().err


def test_convert_refuses_to_write_over_a_file(tmp_path: Path, tiny_model_dir: Path, capsys: Capture) -> None:
    out = tmp_path / "run.yaml"
    words = ["convert", "--dataset", "rows.jsonl", "--model", str(tiny_model_dir), "-o", str(out)]
    assert main(words) == 0
    assert "not built yet, without effect: monitoring." in capsys.readouterr().err
    assert yaml.safe_load(out.read_text(encoding="utf-8"))["data"]["train_path"] == "rows.jsonl"
    assert main(words) == 2
    assert "is already there" in capsys.readouterr().err
    assert main(words[:-2]) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")


def test_each_command_has_help(capsys: Capture) -> None:
    for command in ("check", "inspect", "status", "convert"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"lightning-trainer {command}" in capsys.readouterr().out


def test_status_and_convert_load_no_torch(tmp_path: Path) -> None:
    code = "import sys, lightning_trainer.cli as c\nprint(c.main(sys.argv[1:]), 'torch' in sys.modules)"
    for words in (["status", str(tmp_path)], ["convert", "nowhere.json"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=os.environ)
        assert done.stdout.splitlines()[-1] == "2 False"


def test_what_torchao_says_when_it_is_imported_is_no_news(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    main(["status", str(tmp_path / "nowhere")])
    for name, text in (
        ("torchao", "Failed to load x.so"),
        ("torchao", "news"),
        ("torch.utils._pytree", "<enum 'A'> is"),
    ):
        logging.getLogger(name).warning(text)
    assert caplog.messages == ["news"]
