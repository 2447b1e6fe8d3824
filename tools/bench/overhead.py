"""What a step of `fit` costs above a step of Lightning's own loop around the same module, optimizer and batches.

python tools/bench overhead [--quick]

`fit` runs through the command line with its default callbacks, its logger and clipping; Lightning with clipping and
nothing else. Previews, checkpoints and validations are left out: they cost what they are asked for. Processor seconds:
what a step waits for a disk or another process is not among them; nor is the status file's write, one a second.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import material
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import Row

from lightning_trainer import ChatDataModule
from lightning_trainer.cli import main
from lightning_trainer.model import CausalLMModule
from lightning_trainer.profiles import Plain

MOST = 0.25
SKIPPED = 100
"""Steps before the clock starts: the first ones allocate, import and log."""

STEP_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)
NEVER, LOG_EVERY = 10**9, 10


class StepClock(Callback):
    """Notes the processor's seconds of the steps of a run.

    Attributes:
        seconds: Of a step, of each run so far: the median over stretches of as many steps as lie between two log
            steps, which other work on the machine does not reach.
        hooks: Microseconds per step of each hook of the last run that had a profiler.
    """

    seconds: ClassVar[list[float]] = []
    hooks: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the clock."""
        self._times.append(time.process_time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up."""
        stretches = self._times[SKIPPED::LOG_EVERY]
        self.seconds.append(statistics.median(b - a for a, b in pairwise(stretches)) / LOG_EVERY)
        found: Counter[str] = Counter()
        for action, durations in getattr(trainer.profiler, "recorded_durations", {}).items():  # type: ignore[attr-defined]
            owner, _, hook = action.partition("]")[2].rpartition(".")
            if hook in STEP_HOOKS and not owner.startswith(type(self).__name__):
                counted = durations[SKIPPED:-1]
                found[f"{owner.partition('{')[0]}.{hook}"] += 1e6 * sum(counted) / len(counted)
        type(self).hooks = dict(found)


class OfLightning(CausalLMModule):
    """Our module where the Trainer has no plugin of ours."""

    def _run_dtype(self) -> torch.dtype:
        return torch.float32


class Job:
    """A model and rows to train on, and the two ways to do it.

    Args:
        folder: Where everything goes.
        steps: Optimizer steps of a run.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.runs = folder, steps, 0
        tokenizer = material.make_tokenizer(1024)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.model = str(material.write_model(folder / "model", tokenizer, **sizes))
        self.data: dict[str, Any] = {
            "train_path": str(material.write_rows(folder / "rows.jsonl", material.chat_rows(3 * steps, 20))),
            **{"max_length": 64, "batch_size": 1, "val_fraction": 0.0, "seed": 0, "cache_dir": str(folder / "cache")},
        }

    def fit(self, **trainer: Any) -> float:
        """Seconds of a step of `fit`; keyword arguments go to its Trainer's section."""
        self.runs += 1
        package = "lightning_trainer.callbacks"
        callbacks = [
            {"class_path": f"{package}.PreviewCallback", "init_args": {"every_n_steps": NEVER, "max_new_tokens": 1}},
            *({"class_path": f"{package}.{name}"} for name in ("StatusFile", "HuggingFaceExport")),
            {"class_path": "overhead.StepClock"},
        ]
        config = {
            "model": {"pretrained": self.model},
            "data": {**self.data, "profile": "Plain"},
            "checkpoint": {"every_n_train_steps": NEVER},
            "trainer": {
                **{"default_root_dir": str(self.folder / f"run{self.runs}"), "precision": "32-true"},
                **{"accelerator": "cpu", "max_steps": self.steps, "log_every_n_steps": LOG_EVERY},
                **{"callbacks": callbacks, **trainer},
            },
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        with silence() as said:
            status = main(["fit", "--config", str(path)])
        if status:
            raise RuntimeError(f"fit ended with {status}: {said.getvalue()[-2000:]}")
        return StepClock.seconds[-1]

    def lightning(self) -> float:
        """Seconds of a step of Lightning's own loop."""
        quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=self.steps,
            gradient_clip_val=1.0,
            callbacks=[StepClock()],
            default_root_dir=str(self.folder / "lightning"),
            use_distributed_sampler=False,
            **dict.fromkeys(quiet, False),
        )
        with silence():
            trainer.fit(OfLightning(self.model), ChatDataModule(**self.data, profile=Plain()))
        return StepClock.seconds[-1]


@contextlib.contextmanager
def silence() -> Iterator[io.StringIO]:
    """Nothing on the screen; yields where it goes."""
    said = io.StringIO()
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(logging.NOTSET)


def step_rows(job: Job, rounds: int) -> Iterator[Row]:
    """Milliseconds of a step, and of ours above Lightning's."""
    arms = {
        "lightning": job.lightning,
        "fit": job.fit,
        "fit without a bar": lambda: job.fit(enable_progress_bar=False),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, act in arms.items():
            found[name].append(1e3 * act())
    yield Row("a step of Lightning's own loop", tuple(found["lightning"]), "ms")
    for name in ("fit", "fit without a bar"):
        above = tuple(a - b for a, b in zip(found[name], found["lightning"], strict=True))
        yield Row(f"{name}, above it", above, "ms", at_most=MOST, note=f"{job.steps:,} steps a round")


def hook_rows(job: Job, least: float = 1.0) -> Iterator[Row]:
    """Microseconds a step that each callback's hooks take, from a run with Lightning's profiler."""
    job.fit(profiler="simple", enable_progress_bar=False)
    for name, spent in sorted(StepClock.hooks.items(), key=lambda item: -item[1]):
        if spent >= least:
            yield Row(f"  {name}", (spent,), "us/step", note="with the profiler's own microsecond or two")


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        job = Job(Path(name), 600 if quick else 2_000)
        return [*step_rows(job, 3 if quick else 7), *hook_rows(job)]
