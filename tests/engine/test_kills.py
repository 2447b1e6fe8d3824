"""SIGKILL at any moment: what is left can be gone on with, and ends as if nothing had happened.

Real runs of the command line, killed again and again in one run directory. Each that follows starts from the files
alone, and what it trains on and what it loses is compared, step by step, with a run that nobody disturbed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import KILLED, ForkServer, Job

from lightning_trainer import checkpoints

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 10, "num_prompts": 1, "max_new_tokens": 4}}

EVERY = 2
"""Optimizer steps between checkpoints."""

STAGES = (
    "mkdir checkpoints/.step",
    "half .step/model.safetensors",
    "half .step/trainer.pt",
    "fsync .step/trainer.pt",
    "open .step/checkpoint.json",
    "fsync .step/checkpoint.json",
    "fsync checkpoints/.step",
    "rename checkpoints/.step",
    "fsync run/checkpoints",
    "symlink checkpoints/.last.ckpt",
    "rename checkpoints/.last.ckpt",
    "fsync run/checkpoints",
    "rename checkpoints/step",
    "remove trainer.pt",
    "rmdir checkpoints/.step",
    "done ",
)
"""What a write does, in this order, among other things; `.step` is a checkpoint under a temporary name."""

Place = tuple[int, int, int]
Scalars = Callable[[Path], dict[str, list[tuple[int, float]]]]


@dataclass
class Chain:
    """One run directory, and attempt after attempt in it."""

    server: ForkServer
    folder: Path
    config: Path
    attempts: int = 0
    seen: dict[Place, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, *words: str, **kill: Any) -> int:
        """Go on from the newest checkpoint, or begin; note what was trained."""
        self.attempts += 1
        name = self.folder / f"attempt-{self.attempts}"
        given = ["fit", "--config", str(self.config), "--trainer.default_root_dir", str(self.run), *words]
        job = Job([*given, "--ckpt_path", "auto"], log=f"{name}.log", record=f"{name}.jsonl", **kill)
        status = self.server.run(job)
        self._note(Path(job.record))
        return status

    def _note(self, record: Path) -> None:
        for line in record.read_text().splitlines() if record.exists() else []:
            entry = json.loads(line)
            place, value = tuple(entry["place"]), (entry["rows"], entry["loss"])
            assert self.seen.setdefault(place, value) == value, f"attempt {self.attempts} differs at {place}"

    def newest(self) -> int | None:
        """Step of the checkpoint that would be resumed from; nothing is damaged."""
        found = checkpoints.find_last(self.checkpoints, pytest.fail)
        return None if found is None else int(checkpoints.about(found)["global_step"])

    def log(self) -> str:
        return (self.folder / f"attempt-{self.attempts}.log").read_text()


@pytest.fixture
def chain(job: Callable[..., Path], server: ForkServer, dropout_model: Path, tmp_path: Path) -> Callable[..., Chain]:
    """Runs of the same job, each in its own directory."""
    config = job(
        rows=120,
        model={"pretrained": str(dropout_model)},
        data={"profile": "EmojiThink", "max_length": 512, "num_workers": 2, "batch_size": 1},
        trainer={"max_epochs": -1, "limit_val_batches": 2, "callbacks": [PREVIEW]},
        checkpoint={"every_n_train_steps": EVERY, "keep_last": 1},
    )

    def make(name: str) -> Chain:
        (tmp_path / name).mkdir()
        return Chain(server, tmp_path / name, config)

    return make


@pytest.fixture
def equal(scalars: Scalars, weights: Any, lines: Any) -> Callable[[Chain, Chain], None]:
    """Nothing tells two runs apart but their clocks."""

    def compare(first: Chain, second: Chain) -> None:
        assert second.seen == first.seen
        found = [scalars(run.run) for run in (first, second)]
        for curves in found:
            for clock in ("train/tokens_per_second", "preview/latency_seconds", "preview/stall_ms"):
                curves.pop(clock, None)
        assert found[0] == found[1]
        previews = [
            [(line["step"], line["text"]) for line in lines(run.run / "previews.jsonl")] for run in (first, second)
        ]
        assert previews[0] == previews[1]
        one, two = (weights(run.checkpoints / "last.ckpt") for run in (first, second))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []

    return compare


@pytest.fixture
def points(chain: Callable[..., Chain], tmp_path: Path) -> list[str]:
    """What happens on the disk while a run writes its second checkpoint, in order."""
    file = tmp_path / "points.txt"
    probe = chain("probe")
    assert probe.start("--trainer.max_steps", str(2 * EVERY), in_save=2, points=str(file)) == 0, probe.log()
    return file.read_text().splitlines()


def test_the_points_are_all_of_a_write(points: list[str]) -> None:
    """Nothing is renamed before it is flushed, no link is set before the rename, nothing is deleted before the link."""
    inside = [point.split("/")[-1] for point in points if point.startswith("fsync .step/")]
    assert {"model.safetensors", "trainer.pt", "config.json", "tokenizer.json", "checkpoint.json"} <= set(inside)
    assert inside[-1] == "checkpoint.json"
    left = iter(points)
    assert [stage for stage in STAGES if stage not in left] == [], points


def killed_at_each(chain: Callable[..., Chain], equal: Any, points: list[str], numbers: list[int], words: Path) -> None:
    straight, killed = chain("straight"), chain("killed")
    steps = ["--trainer.max_steps", str(2 * EVERY * len(numbers) + EVERY)]
    renamed = points.index("rename checkpoints/.step") + 1
    at = 0
    for number in numbers:
        name = points[number - 1]
        assert killed.start(*steps, in_save=2, kill_at=number, points=str(words)) == KILLED, killed.log()
        at += EVERY if number <= renamed else 2 * EVERY
        assert killed.newest() == at, f"killed at {number}, {name}"
    assert killed.start(*steps) == 0, killed.log()
    assert not list(killed.checkpoints.glob(".*"))
    assert straight.start(*steps) == 0, straight.log()
    equal(straight, killed)


def test_killed_at_the_stages_of_a_write(chain: Any, equal: Any, points: list[str], tmp_path: Path) -> None:
    numbers = sorted({points.index(stage) + 1 for stage in STAGES})[::2]  # all of them: the slow test below
    killed_at_each(chain, equal, points, numbers, tmp_path / "again.txt")


@pytest.mark.slow
def test_killed_at_every_stage_of_a_write(chain: Any, equal: Any, points: list[str], tmp_path: Path) -> None:
    killed_at_each(chain, equal, points, list(range(1, len(points) + 1)), tmp_path / "again.txt")


def test_killed_in_its_first_write_it_begins_again(chain: Any, equal: Any, points: list[str], tmp_path: Path) -> None:
    """No checkpoint had ever been whole: nothing is resumed from, nothing of the first attempt stays."""
    straight, killed = chain("straight"), chain("killed")
    steps = ["--trainer.max_steps", str(2 * EVERY)]
    for number in (1, points.index("half .step/trainer.pt") + 1):
        assert killed.start(*steps, in_save=1, kill_at=number, points=str(tmp_path / "again.txt")) == KILLED
        assert killed.newest() is None
    assert killed.start(*steps) == 0, killed.log()
    assert not list(killed.checkpoints.glob(".*"))
    assert straight.start(*steps) == 0, straight.log()
    equal(straight, killed)


def killed_at_random(chain: Callable[..., Chain], equal: Any, kills: int, steps: int, seed: int) -> None:
    straight, killed = chain("straight"), chain("killed")
    words = ["--trainer.max_steps", str(steps)]
    rng = random.Random(seed)
    newest = 0
    for _ in range(kills):
        assert killed.start(*words, kill_after=rng.uniform(0.0, 1.0)) == KILLED, killed.log()
        before, newest = newest, killed.newest() or 0
        assert newest >= before
    assert newest > 0
    assert killed.start(*words) == 0, killed.log()
    assert straight.start(*words) == 0, straight.log()
    equal(straight, killed)


def test_killed_at_random_moments(chain: Any, equal: Any) -> None:
    killed_at_random(chain, equal, kills=4, steps=100, seed=4)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(chain: Any, equal: Any) -> None:
    killed_at_random(chain, equal, kills=20, steps=600, seed=20)
