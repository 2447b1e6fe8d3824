"""`verify-resume`, as it is typed: what it finds, what it leaves, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import ForkServer, Job

from lightning_trainer import cli
from lightning_trainer.commands import verify_resume
from lightning_trainer.diagnose.verify_resume import Record, read_record

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def verify(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, its attempts forked from a process that has imported everything."""

    def launch(plan: Path, log: Path) -> int:
        return server.run(Job(["verify-resume", "--attempt", str(plan)], log=str(log)))

    original = verify_resume.run

    def run(command: str, words: list[str]) -> int:
        return original(command, words, launch)

    monkeypatch.setattr(verify_resume, "run", run)
    return lambda config, *words: cli.main(["verify-resume", "--config", str(config), *words])


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "verify" in path.name or path.name == "run")


def test_a_plain_configuration_is_exact(
    verify: Any, job: Callable[..., Path], dropout_model: Path, tmp_path: Path, capsys: Any
) -> None:
    """With workers, dropout and accumulation, over the end of an epoch; previews and export stay away."""
    config = job(
        rows=16,
        model={"pretrained": str(dropout_model)},
        data={"num_workers": 2, "batch_size": 1},
        trainer={"max_epochs": 4, "callbacks": ["PreviewCallback", "LearningRateMonitor", "HuggingFaceExport"]},
        checkpoint={"monitor": "val/loss", "every_n_train_steps": 1},
    )
    assert verify(config, "--steps", "7") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "resume is exact over 7 steps"
    assert "left out, as they only write: PreviewCallback, HuggingFaceExport" in out
    rows = [line.split() for line in out if line.lstrip()[:1].isdigit() and "/3" not in line]
    assert [row[0] for row in rows] == [str(step) for step in range(1, 8)]
    assert all(row[1] == row[3] == "same" for row in rows)
    assert rows[2][4:] == ["<-", "stopped", "here"]
    for kind in ("weights", "optimizer", "schedule", "random generators", "place in the data"):
        assert f"{kind:<18} identical" in out
    assert left_behind(tmp_path) == []


def test_a_run_shorter_than_the_steps_is_stopped_in_its_middle(
    verify: Any, job: Callable[..., Path], capsys: Any
) -> None:
    config = job(trainer={"max_steps": 4})
    assert verify(config, "--steps", "100") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "resume is exact over 4 steps"
    assert [line.split()[0] for line in out if line.endswith("<- stopped here")] == ["2"]


def test_a_weight_that_is_not_what_was_saved_is_named(verify: Any, job: Callable[..., Path], capsys: Any) -> None:
    config = job(trainer={"callbacks": [{"class_path": "planted.NudgeOnResume"}]})
    assert verify(config, "--steps", "4") == 1
    out = capsys.readouterr().out
    assert "resume is not exact; what differs first: step 3, loss: " in out
    assert "  weights: model.norm.weight: " in out
    assert "values differ, by at most 0.25; the first, [" in out
    assert "came before the stop" not in out


def test_a_generator_that_is_not_saved_is_caught(verify: Any, job: Callable[..., Path], capsys: Any) -> None:
    assert verify(job(trainer={"callbacks": [{"class_path": "planted.Forgetful"}]}), "--steps", "4") == 1
    assert "what differs first: step 3, loss: " in capsys.readouterr().out


def test_training_that_does_not_repeat_is_told_apart(verify: Any, job: Callable[..., Path], capsys: Any) -> None:
    assert verify(job(trainer={"callbacks": [{"class_path": "planted.TrueNoise"}]}), "--steps", "4") == 1
    out = capsys.readouterr().out
    assert "what differs first: step 1, loss: " in out
    assert "step 1 came before the stop: two runs from the start differ, so training itself does not repeat" in out
    assert "weights            differ" in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--steps", "1"], "--steps must be at least 2, not 1"),
        (["--data.max_lenght", "3"], "did you mean --data.max_length?"),
        (
            ["--data.min_length", "150"],
            "run.yaml:5:3: data.train_path: no train row",
        ),  # found by the attempt, which has read the rows
    ],
)
def test_what_is_wrong_with_the_configuration_exits_2(
    words: list[str], error: str, verify: Any, job: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    assert verify(job(), *words) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert error in message
    assert ".verify-resume" not in message
    assert left_behind(tmp_path) == []


def test_an_attempt_that_fails_exits_1(verify: Any, job: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    config = job(trainer={"callbacks": [{"class_path": "planted.SmallFiles", "init_args": {"first": 2, "last": 99}}]})
    assert verify(config, "--steps", "4") == 1
    assert "no file may be larger than 20000 bytes" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_a_run_that_ends_where_it_is_stopped_proves_nothing(
    verify: Any, job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def read(folder: Path, name: str) -> Record:
        return read_record(folder, "nothing" if name == "resumed" else name)

    monkeypatch.setattr(verify_resume, "read_record", read)
    config = job(trainer={"callbacks": ["TQDMProgressBar"], "enable_progress_bar": True})
    assert verify(config, "--steps", "4") == 1
    told = capsys.readouterr()
    assert "the run ends at optimizer step 2, where it was stopped, and nothing was left to go on with" in told.err
    assert "exact" not in told.out


def start(config: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "lightning_trainer", "verify-resume", "--config", str(config), "--steps", "4"]
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_ctrl_c_leaves_nothing(job: Callable[..., Path], tmp_path: Path) -> None:
    with start(job()) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1/3 ")
        [folder] = tmp_path.glob(".run.verify-resume-*")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert not folder.exists()
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_in_processes_of_its_own_and_beside_a_run(job: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing in the user's run directory changes; two checkpoints are the most there are at a time."""
    config = job(trainer={"max_steps": 2})
    assert cli.main(["fit", "--config", str(config)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    longer = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    longer["trainer"]["max_steps"] = 40
    config.write_text(yaml.safe_dump(longer))
    most = 0
    with start(config) as process:
        while process.poll() is None:
            most = max(most, len(list(tmp_path.glob(".run.verify-resume-*/*/checkpoints/*step=*.ckpt*"))))
        assert process.stdout is not None
        assert process.stdout.read().strip().endswith("resume is exact over 4 steps")
    assert process.returncode == 0
    assert most == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert left_behind(tmp_path) == ["run"]
