"""Whatever becomes of the preview worker, the run is the same to the last bit, and ends in time."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import ChaosProxy, WorkerProcess, eventually
from fork_server import ForkServer, Job

from lightning_trainer import pretrained
from lightning_trainer.preview.dialogue import Deadlines, Setup
from lightning_trainer.preview.publication import publication_of

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 2, "num_prompts": 2, "max_new_tokens": 6}}

FLUSH = 2.0
"""Seconds that the end of a run waits for answers."""


@pytest.fixture(scope="module")
def setup(tiny_model_dir: Path) -> str:
    """What a worker must know to take this model's weights."""
    found = publication_of(pretrained.load_model(str(tiny_model_dir), torch.float32), None)
    plain = Setup(
        address="",
        ca=None,
        token=None,
        run_id="",
        kind=int(found.kind),
        identity=found.identity.SerializeToString(),
        adapter=b"",
        layout=found.layout,
        slots=(),
        deadlines=Deadlines(),
    )
    return json.dumps(plain.to_json())


class Stage:
    """Worker, network and run of one test."""

    def __init__(self, stack: ExitStack, setup: str) -> None:
        self.stack, self.setup = stack, setup
        self.worker = stack.enter_context(WorkerProcess(setup))
        self.proxy = stack.enter_context(ChaosProxy(self.worker.address))

    def kill(self) -> None:
        self.worker.send(signal.SIGKILL)

    def freeze(self) -> None:
        self.worker.send(signal.SIGSTOP)

    def slow(self) -> None:
        self.proxy.rate = 20_000.0
        self.proxy.set("throttle")

    def restart(self) -> None:
        self.kill()
        self.proxy.target = self.stack.enter_context(WorkerProcess(self.setup)).address
        self.proxy.set("reset")
        self.proxy.set("pass")

    def part(self) -> None:
        self.proxy.set("blackhole")

    def leave(self) -> None:
        """Nothing happens."""


@pytest.fixture
def stage(setup: str) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack, setup)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """Weights of the run without previews, once it was made."""
    return {}


@pytest.mark.parametrize("fault", ["leave", "kill", "freeze", "slow", "restart", "part"])
def test_remote_previews_change_nothing(
    fault: str,
    stage: Stage,
    undisturbed: dict[str, Any],
    server: ForkServer,
    job: Callable[..., Path],
    weights: Any,
    lines: Any,
    tmp_path: Path,
) -> None:
    config = job(rows=60, trainer={"max_epochs": 3})

    def fit(name: str, callbacks: list[Any], *words: str) -> Path:
        run = tmp_path / name
        given = ["fit", "--config", str(config), "--trainer.default_root_dir", str(run)]
        given += ["--trainer.callbacks", json.dumps(callbacks), *words]
        log = tmp_path / f"{name}.log"
        assert server.run(Job(given, log=str(log), record=str(tmp_path / f"{name}.jsonl"))) == 0, log.read_text()
        return run

    if not undisturbed:
        undisturbed.update({k: v.clone() for k, v in weights(fit("off", []) / "checkpoints/last.ckpt").items()})
        found = weights(fit("local", [PREVIEW]) / "checkpoints/last.ckpt")
        assert [key for key, value in undisturbed.items() if not torch.equal(found[key], value)] == []

    remote = ["--preview_backend", "GrpcPreviewBackend", "--preview_backend.address", stage.proxy.address]
    remote += ["--preview_backend.flush_timeout", str(FLUSH)]
    record = tmp_path / "remote.jsonl"
    acting = threading.Thread(target=lambda: eventually(lambda: _steps(record) >= 24, 60) and getattr(stage, fault)())
    acting.start()
    run = fit("remote", [PREVIEW, "planted.Slow"], *remote)
    left = time.time() - record.stat().st_mtime  # since the last step
    acting.join()
    found = weights(run / "checkpoints/last.ckpt")
    assert [key for key, value in undisturbed.items() if not torch.equal(found[key], value)] == []
    answers = lines(run / "previews.jsonl")
    assert any(answer["success"] for answer in answers)
    assert all(answer["weights_step"] == answer["step"] for answer in answers if answer["success"])
    assert left < FLUSH + 3
    if fault in ("kill", "freeze", "part"):
        assert not answers[-1]["success"]


def _steps(record: Path) -> int:
    return len(record.read_bytes().splitlines()) if record.exists() else 0
