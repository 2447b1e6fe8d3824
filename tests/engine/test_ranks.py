"""Runs of two ranks: what they train on, what they leave behind, and how they end, whichever of them is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer, Job
from forked_ranks import REPORT, SENT, Report

slow = pytest.mark.slow

TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")

SOON = 40.0
"""Seconds; what never ends, or ends by a timeout of torch, takes minutes."""

Scalars = Callable[[Path], dict[str, list[tuple[int, float]]]]


@dataclass(frozen=True)
class Runs:
    """Starts runs that read their configuration from a file."""

    server: ForkServer
    folder: Path

    def one(self, config: Path, name: str, *words: str, command: str = "fit") -> None:
        """A run of one process."""
        log = self.folder / f"{name}.log"
        assert self.server.run(Job(self._words(command, config, name, words), log=str(log))) == 0, log.read_text()

    def two(
        self, config: Path, name: str, *words: str, command: str = "fit", setup: str = "", to: Sequence[int] = ()
    ) -> Report:
        """A run of two ranks, which ends soon and leaves no process; `to` is for the `setup`."""
        report, sent = (self.folder / f"{name}.{kind}" for kind in ("json", "sent"))
        for path in (report, sent):
            path.unlink(missing_ok=True)
        job = Job(
            self._words(command, config, name, (*TWO, *words)),
            log=str(self.folder / f"{name}.log"),
            main="forked_ranks:main",
            setup=setup,
            env={REPORT: str(report), SENT: str(sent), "RANKS_TO": json.dumps(list(to))},
        )
        assert self.server.run(job) == 0
        found = Report(**json.loads(report.read_text()))
        assert found.left == [], self.log(name)
        assert found.seconds < SOON, self.log(name)
        return found

    def _words(self, command: str, config: Path, name: str, words: tuple[str, ...]) -> list[str]:
        return [command, "--config", str(config), "--trainer.default_root_dir", str(self.folder / name), *words]

    def log(self, name: str) -> str:
        """What a run printed."""
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def runs(server: ForkServer, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


@pytest.fixture
def dropout_job(job: Callable[..., Path], dropout_model: Path) -> Callable[..., Path]:
    """A job that draws random numbers in each of its steps."""

    def make(**sections: Any) -> Path:
        return job(model={"pretrained": str(dropout_model)}, **sections)

    return make


@pytest.fixture(scope="module")
def straight_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def straight(straight_folder: Path, server: ForkServer, dropout_job: Callable[..., Path]) -> Path:
    """A run of two ranks that nobody stopped; made once."""
    runs = Runs(server, straight_folder)
    if not (straight_folder / "run").exists():
        assert runs.two(dropout_job(), "run").status == 0, runs.log("run")
    return straight_folder / "run"


@pytest.fixture
def differences(weights: Any, scalars: Scalars) -> Callable[[Path, Path], list[str]]:
    """What tells the ends of two runs apart, but for their clocks."""

    def find(first: Path, second: Path) -> list[str]:
        one, two = ({**weights(run / "checkpoints/last.ckpt"), **generators(run)} for run in (first, second))
        assert one.keys() == two.keys()
        curves = [{tag: c for tag, c in scalars(run).items() if "second" not in tag} for run in (first, second)]
        assert curves[0].keys() == curves[1].keys()
        found = [key for key in one if not torch.equal(one[key], two[key])]
        return found + [tag for tag in curves[0] if curves[1][tag] != curves[0][tag]]

    return find


def generators(run: Path) -> dict[str, torch.Tensor]:
    """The generators that dropout draws from, by rank, as the newest checkpoint has them."""
    states = torch.load(run / "checkpoints/last.ckpt/trainer.pt", weights_only=True)["rng"]
    return {f"rank {rank}": state["torch"] for rank, state in enumerate(states)}


def planted(name: str, **arguments: Any) -> str:
    return json.dumps({"class_path": f"planted.{name}", "init_args": arguments})


@pytest.mark.parametrize("packing", ["true", "false"])
def test_two_ranks_are_one_process_with_twice_the_batch(
    packing: str, job: Callable[..., Path], runs: Runs, tmp_path: Path, scalars: Scalars
) -> None:
    """Step by step, over rows of unequal lengths; in the last step of an epoch rank 1 has less to do, or nothing."""
    config = job(rows=29)
    for name, size in (("one", "4"), ("two", "2")):
        (tmp_path / f"of-{name}").mkdir()
        words = ["--data.packing", packing, "--data.batch_size", size]
        words += ["--trainer.callbacks+", planted("Gradients", folder=str(tmp_path / f"of-{name}"))]
        if name == "one":
            runs.one(config, name, *words)
        else:
            assert runs.two(config, name, *words).status == 0, runs.log(name)
    assert "sync_dist" not in runs.log("two")

    one, two = (scalars(tmp_path / name) for name in ("one", "two"))
    compared = {"train/loss", "train/grad_norm", "train/lr", "train/trained_token_fraction", "val/loss"}
    assert compared <= one.keys() == two.keys()
    for tag in sorted(compared):
        assert two[tag] == [pytest.approx(point, rel=1e-6) for point in one[tag]]

    steps = [step for step, _ in one["train/loss"]]
    assert len(steps) > 3
    for step in steps:
        gradient = torch.load(tmp_path / f"of-one/0-{step - 1}.pt")
        ranks = [torch.load(tmp_path / f"of-two/{rank}-{step - 1}.pt") for rank in (0, 1)]
        assert torch.equal(*ranks)
        assert (ranks[0] - gradient).norm() / gradient.norm() < 1e-6


@pytest.mark.parametrize(
    ("by", "to"),
    [(0, [1]), (1, [0]), pytest.param(1, [0, 1], marks=slow), pytest.param(1, [1], marks=slow)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_rank_that_is_stopped_stops_the_run_and_it_goes_on_bit_identically(
    by: int,
    to: list[int],
    straight: Path,
    dropout_job: Callable[..., Path],
    runs: Runs,
    tmp_path: Path,
    differences: Callable[[Path, Path], list[str]],
) -> None:
    config, run = dropout_job(), tmp_path / "run"
    ended = runs.two(config, "run", "--trainer.callbacks+", planted("Signals", by=by, to=to))
    assert ended.status == 128 + signal.SIGTERM, runs.log("run")
    assert "Traceback" not in runs.log("run")
    assert [path.name for path in (run / "checkpoints").glob("step=*")] == ["step=000003.ckpt"]
    at_stop = generators(run)
    assert not torch.equal(at_stop["rank 0"], at_stop["rank 1"])

    assert runs.two(config, "run", "--ckpt_path", "last").status == 0, runs.log("run")
    assert differences(straight, run) == []


def test_ctrl_c_reaches_both_and_ends_with_130(dropout_job: Callable[..., Path], runs: Runs, tmp_path: Path) -> None:
    callback = planted("Signals", by=0, to=[0, 1], signum=int(signal.SIGINT))
    ended = runs.two(dropout_job(), "run", "--trainer.callbacks+", callback)
    assert ended.status == 128 + signal.SIGINT, runs.log("run")
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_signal_in_a_validation_is_answered_there(
    straight: Path,
    dropout_job: Callable[..., Path],
    runs: Runs,
    tmp_path: Path,
    differences: Callable[[Path, Path], list[str]],
) -> None:
    config, last = dropout_job(), max(int(path.name[5:11]) for path in (straight / "checkpoints").glob("step=*"))
    callback = planted("Signals", by=1, to=[1], step=last // 2, hook="on_validation_batch_start")
    ended = runs.two(config, "run", "--trainer.callbacks+", callback)
    assert ended.status == 128 + signal.SIGTERM, runs.log("run")
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step=*")] == [f"step={last // 2:06d}.ckpt"]
    assert runs.two(config, "run", "--ckpt_path", "last").status == 0, runs.log("run")
    assert differences(straight, tmp_path / "run") == []


@pytest.mark.parametrize(
    ("when", "to"),
    [
        ("long_preparation", [0]),
        pytest.param("long_preparation", [1], marks=slow),
        pytest.param("long_preparation", [0, 1], marks=slow),
        pytest.param("late_rank_1", [0], marks=slow),
        ("late_rank_1", [1]),
        ("late_rank_1", [0, 1]),
    ],
    ids=str,
)
def test_a_signal_before_training_ends_the_run_at_once(
    when: str, to: list[int], dropout_job: Callable[..., Path], runs: Runs, tmp_path: Path
) -> None:
    """One rank waits for the other in C, where Python answers no signal."""
    ended = runs.two(dropout_job(), "run", setup=f"planted:{when}", to=to)
    assert ended.status == 128 + signal.SIGTERM, runs.log("run")
    assert not list((tmp_path / "run").glob("checkpoints/step=*"))


@pytest.mark.parametrize("by", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_it_says_so(
    by: int, dropout_job: Callable[..., Path], runs: Runs
) -> None:
    ended = runs.two(
        dropout_job(), "run", "--trainer.callbacks+", planted("Signals", by=by, to=[1], signum=int(signal.SIGKILL))
    )
    assert ended.status == 1, runs.log("run")
    assert "error: rank 1 was killed (SIGKILL)" in runs.log("run")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_the_run_and_is_shown(
    rank: int, dropout_job: Callable[..., Path], runs: Runs
) -> None:
    ended = runs.two(dropout_job(), "run", "--trainer.callbacks+", planted("Fails", rank=rank))
    assert ended.status == 1, runs.log("run")
    assert f"ValueError: rank {rank} has found something" in runs.log("run")
    assert ("error: rank 1 ended with an error" in runs.log("run")) == (rank == 1)


def test_ranks_do_not_outlive_the_first(dropout_job: Callable[..., Path], runs: Runs) -> None:
    callback = planted("Signals", by=1, to=[0], signum=int(signal.SIGKILL))
    ended = runs.two(dropout_job(), "run", "--trainer.callbacks+", callback)
    assert ended.status == -signal.SIGKILL, runs.log("run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_later_is_waited_for(rank: int, job: Callable[..., Path], runs: Runs) -> None:
    """The end of rank 0 does not look to rank 1 like a failure."""
    words = ["--trainer.max_steps", "1", "--trainer.callbacks+", planted("SlowEnd", rank=rank)]
    assert runs.two(job(), "run", *words).status == 0
    assert "error" not in runs.log("run")


@pytest.mark.parametrize("callback", ["SmallFiles", "FullForLogs"])
def test_a_disk_that_is_full_for_a_while_holds_no_rank_up(
    callback: str,
    straight: Path,
    dropout_job: Callable[..., Path],
    runs: Runs,
    tmp_path: Path,
    differences: Callable[[Path, Path], list[str]],
) -> None:
    config = dropout_job(checkpoint={"every_n_train_steps": 1, "on_save_failure": "continue", "keep_last": 99})
    assert runs.two(config, "run", "--trainer.callbacks+", planted(callback, first=2, last=4)).status == 0
    there = {path.name for path in (tmp_path / "run/checkpoints").glob("step=*")}
    assert {"step=000001.ckpt", "step=000004.ckpt"} <= there
    assert not {"step=000002.ckpt", "step=000003.ckpt"} & there
    assert "Failure 2 of this attempt" in runs.log("run")
    assert differences(straight, tmp_path / "run") == []


def test_predictions_are_in_the_order_of_the_file(job: Callable[..., Path], runs: Runs, tmp_path: Path) -> None:
    """Nine rows, two at a time: the last turn has nothing for rank 1. Sampled: the same numbers are drawn, too."""
    config = job(rows=9)
    words = ["--data.predict_path", str(tmp_path / "rows.jsonl"), "--prediction.max_new_tokens", "4"]
    words += ["--prediction.temperature", "1.0"]
    runs.one(config, "one", *words, command="predict")
    assert runs.two(config, "two", *words, command="predict").status == 0, runs.log("two")
    one, two = ((tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert [json.loads(line)["row"].rpartition(":")[2] for line in one] == [str(n) for n in range(1, 10)]
    assert two == one
    assert not list((tmp_path / "two").glob(".predictions*"))


def test_a_signal_to_one_rank_ends_predictions(job: Callable[..., Path], runs: Runs, tmp_path: Path) -> None:
    config = job(rows=9)
    callback = planted("Signals", by=1, to=[1], step=0, hook="on_predict_batch_start")
    words = ["--data.predict_path", str(tmp_path / "rows.jsonl"), "--trainer.callbacks+", callback]
    assert runs.two(config, "run", *words, command="predict").status == 128 + signal.SIGTERM, runs.log("run")


@dataclass(frozen=True)
class Started:
    """A run started as a user starts it."""

    folder: Path

    def run(self, *command: str) -> tuple[int, float]:
        """Exit status, and seconds from the first signal to the end."""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
        sent = self.folder / "sent"
        with (self.folder / "started.log").open("w") as log:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=log,
                env={**environment, SENT: str(sent), "RANKS_TEST": str(self.folder)},
                timeout=150,
                check=False,
            )
        took = time.time() - sent.stat().st_mtime
        return done.returncode, took

    def log(self) -> str:
        """What it printed."""
        return (self.folder / "started.log").read_text()

    def left(self) -> list[str]:
        """Its processes that have not ended."""
        mark, found = f"RANKS_TEST={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # another user's, or ended while we looked
                found += [path.parent.name] if mark in path.read_bytes().split(b"\0") else []
        return found


@pytest.mark.slow
def test_started_as_users_do(dropout_job: Callable[..., Path], tmp_path: Path) -> None:
    """The second process is started by the first."""
    words = ["fit", "--config", str(dropout_job()), *TWO, "--trainer.callbacks+", planted("Signals", by=0, to=[1])]
    started = Started(tmp_path)
    status, seconds = started.run("lightning_trainer", *words)
    assert status == 128 + signal.SIGTERM, started.log()
    assert seconds < SOON
    assert started.left() == []
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().name == "step=000003.ckpt"


@pytest.mark.slow
def test_started_by_torchrun(
    straight: Path,
    dropout_job: Callable[..., Path],
    runs: Runs,
    tmp_path: Path,
    differences: Callable[[Path, Path], list[str]],
) -> None:
    """Which gets the signal itself, as rank 1's parent, and passes it on to both."""
    config, started = dropout_job(), Started(tmp_path)
    words = ["fit", "--config", str(config), *TWO, "--trainer.callbacks+", planted("Signals", by=1, to=[0])]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lightning_trainer"]
    status, seconds = started.run(*torchrun, *words)
    assert status != 0
    assert seconds < SOON
    assert started.left() == []
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().name == "step=000003.ckpt", started.log()
    assert runs.two(config, "run", "--ckpt_path", "last").status == 0, runs.log("run")
    assert differences(straight, tmp_path / "run") == []
