"""`fit` on a GPU: what only a device can show. Everything else is tested on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_trainer.cli import main
from lightning_trainer.model import adamw_kernel
from lightning_trainer.model.optim import _both_ways

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of what a device does
]

PREVIEW = {"class_path": "PreviewCallback", "init_args": {"every_n_steps": 4, "num_prompts": 2, "max_new_tokens": 6}}
COMMAND = [sys.executable, "-m", "lightning_trainer"]


class Waits(Callback):
    """Notes where the host waits for the device, from the fourth step on.

    Attributes:
        places: File and line of each.
        status_reads: Those of StatusFile, which reads the loss once a second; not among `places`.
        batches: Looked at.
        seconds: They took.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self.status_reads = self.batches = 0
        self.seconds = 0.0
        self._stack: ExitStack | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self._stack is not None:
            self.batches += 1
        elif trainer.global_step == 3:
            self._stack = ExitStack()
            self._said = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._began = time.monotonic()

    def on_train_end(self, *_: Any) -> None:
        assert self._stack is not None
        torch.cuda.set_sync_debug_mode("default")
        self.seconds = time.monotonic() - self._began
        waits = [w for w in self._said if "called a synchronizing" in str(w.message)]
        self.places.extend(f"{w.filename}:{w.lineno}" for w in waits if "status.py" not in w.filename)
        self.status_reads = len(waits) - len(self.places)
        self._stack.close()


@pytest.fixture
def fit(job: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Train on the GPU; the run's directory. Keyword arguments are the job's sections."""

    def run(name: str, *words: str, precision: str = "bf16-true", **sections: Any) -> Path:
        trainer = {"accelerator": "gpu", "devices": 1, "precision": precision, **sections.pop("trainer", {})}
        config = job(trainer=trainer, **sections)
        assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / name), *words]) == 0
        return tmp_path / name

    return run


def assert_close(one: list[tuple[int, float]], two: list[tuple[int, float]], rel: float) -> None:
    """Curves over the same steps."""
    assert [step for step, _ in one] == [step for step, _ in two]
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=rel)


@pytest.mark.parametrize(("precision", "rel"), [("32-true", 1e-4), ("bf16-true", 5e-3), ("16-true", 2e-3)])
def test_a_gpu_learns_what_a_cpu_learns(fit: Any, scalars: Any, precision: str, rel: float) -> None:
    """Other kernels for attention, the loss and the optimizer, and the same curves."""
    gpu = fit("gpu", precision=precision)
    if precision == "bf16-true":
        assert adamw_kernel.works_on(torch.device("cuda", 0), _both_ways)
    # 16-true is a GPU's alone: it is held against fp32.
    on_cpu = "32-true" if precision == "16-true" else precision
    cpu = fit("cpu", precision=on_cpu, trainer={"accelerator": "cpu", "devices": 1})
    for tag in ("train/loss", "val/loss"):
        assert_close(scalars(gpu)[tag], scalars(cpu)[tag], rel)
    assert_close(scalars(gpu)["train/grad_norm"], scalars(cpu)["train/grad_norm"], 10 * rel)


@pytest.mark.parametrize(("loss", "checkpointing"), [("full", False), ("full", True), ("chunked", True)])
def test_losses_and_checkpointing_agree(fit: Any, scalars: Any, loss: str, checkpointing: bool) -> None:
    options = {"trainer": {"deterministic": True}, "precision": "32-true"}
    plain = fit("plain", **options)
    other = fit("other", "--model.loss", loss, "--model.gradient_checkpointing", str(checkpointing).lower(), **options)
    assert_close(scalars(plain)["train/loss"], scalars(other)["train/loss"], 1e-5)


@pytest.mark.slow
def test_a_compiled_run_is_the_run(fit: Any, scalars: Any, caplog: Any) -> None:
    plain = fit("plain")
    compiled = fit("compiled", "--model.compile", "true")
    assert "compiled 2 layers" in caplog.text
    for tag in ("train/loss", "val/loss"):
        assert_close(scalars(plain)[tag], scalars(compiled)[tag], 5e-3)


EIGHT_BIT = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1e-3, "bf16_stochastic_round": True}}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({"class_path": "CompensatedMuon", "init_args": {"lr": 1e-3}}, id="muon"),
        pytest.param(EIGHT_BIT, id="8 bit", marks=pytest.mark.slow),  # it is compiled
        pytest.param({"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "fused": True}}, id="fused"),
    ],
)
def test_other_optimizers_learn(fit: Any, scalars: Any, optimizer: dict[str, Any]) -> None:
    if "torchao" in optimizer["class_path"]:
        pytest.importorskip("torchao")
    config = json.dumps(optimizer)
    run = fit("run", "--model.optimizer", config, trainer={"max_epochs": 6})
    losses = [value for _, value in scalars(run)["train/loss"]]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"use_dora": True}], ids=["plain", "dropout", "dora"])
def test_adapters_learn(fit: Any, scalars: Any, options: dict[str, Any]) -> None:
    lora = {"rank": 4, "alpha": 8, **options}
    run = fit("run", "--model.lora", json.dumps(lora), "--model.optimizer.init_args.lr", "3e-2")
    losses = [value for _, value in scalars(run)["train/loss"]]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_nothing(fit: Any, watched: Any, accumulate: int) -> None:
    waits = Waits()
    watched(waits)
    trainer = {"max_epochs": 12, "accumulate_grad_batches": accumulate, "log_every_n_steps": 10_000}
    callbacks = [{"class_path": "PreviewCallback", "init_args": {"every_n_steps": 9999}}, "StatusFile"]
    fit(
        "run",
        data={"num_workers": 0, "val_fraction": 0.0},
        checkpoint={"every_n_train_steps": 9999},
        trainer={**trainer, "callbacks": callbacks, "enable_progress_bar": False},
    )
    assert waits.batches > 50
    assert waits.places == []
    assert waits.status_reads <= waits.seconds + 2  # once a second, and at the end


@pytest.mark.parametrize(
    ("precision", "extra"),
    [
        *(pytest.param(precision, [], id=precision) for precision in ("32-true", "bf16-true", "16-true")),
        pytest.param("bf16-true", ["--model.compile", "true"], id="compiled", marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(job: Callable[..., Path], precision: str, extra: list[str]) -> None:
    config = job(trainer={"accelerator": "gpu", "devices": 1, "precision": precision, "deterministic": True})
    words = [*COMMAND, "verify-resume", "--config", str(config), "--steps", "6", *extra]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.splitlines()[-1:] == ["resume is exact over 6 steps"], done.stdout + done.stderr


@contextmanager
def worker(model: Path, precision: str) -> Iterator[str]:
    """A preview worker on the same GPU; its address."""
    dtype = {"bf16-true": "bf16", "32-true": "fp32"}[precision]
    words = [*COMMAND, "serve", "--pretrained", str(model), "--listen", "127.0.0.1:0", "--dtype", dtype]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        too_late = threading.Timer(120, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            too_late.cancel()
            assert said.startswith("listening on "), said
            yield said.split()[2]
        finally:
            too_late.cancel()
            process.terminate()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
def test_previews_change_nothing_wherever_they_are_made(
    fit: Any, lines: Any, tiny_model_dir: Path, precision: str, adapters: bool
) -> None:
    """The same weights to the last bit; the same answers from this process and from a worker on the device."""
    lora = ["--model.lora", json.dumps({"rank": 4, "alpha": 8, "dropout": 0.1})] if adapters else []
    options = {"precision": precision, "trainer": {"deterministic": True, "max_epochs": 3}}

    def run(name: str, callbacks: list[Any], *words: str) -> Path:
        return fit(name, "--trainer.callbacks", json.dumps(callbacks), *lora, *words, **options)

    runs = [run("off", []), run("local", [PREVIEW])]
    with worker(tiny_model_dir, precision) as address:
        words = ("--preview_backend", "GrpcPreviewBackend", "--preview_backend.address", address)
        runs.append(run("remote", [PREVIEW], *words))
    file = "adapter_model.safetensors" if adapters else "model.safetensors"
    ends = [(each / "checkpoints/last.ckpt" / file).read_bytes() for each in runs]
    assert ends[0] == ends[1] == ends[2]
    local, remote = (
        {(e["step"], e["prompt_id"]): e["text"] for e in lines(each / "previews.jsonl") if e["success"]}
        for each in runs[1:]
    )
    # Steps go faster here than a worker answers: of those between, some give way to newer ones.
    assert len(local) >= len(remote) >= 4
    assert remote.items() <= local.items()


def test_a_full_device_ends_a_run_in_words(job: Callable[..., Path], capsys: Any) -> None:
    config = job(trainer={"accelerator": "gpu", "devices": 1}, data={"batch_size": 64})
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        assert main(["fit", "--config", str(config)]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "the GPU has no memory left: " in capsys.readouterr().err
