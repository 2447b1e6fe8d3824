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
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
NEVER, LOG_EVERY, STRETCH = 10**9, 10, 20


class Turns:
    """Has arms run in turn, each in its own thread, a stretch of steps at a time: all meet the machine as it is then.

    Args:
        arms: By name, in their order.
    """

    def __init__(self, arms: Sequence[str]) -> None:
        self._left = list(arms)
        self._whose = self._left[0]
        self._changed = threading.Condition()

    def wait(self, arm: str) -> None:
        """Until it is this arm's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._whose == arm)

    def next(self, arm: str, ends: bool = False) -> None:
        """The turn is over; whoever has ended gets none any more."""
        with self._changed:
            if self._whose == arm:
                self._whose = self._left[(self._left.index(arm) + 1) % len(self._left)]
            if ends and arm in self._left:
                self._left.remove(arm)
            self._changed.notify_all()


class StepClock(Callback):
    """Notes the processor's seconds of a run's stretches of steps, and hooks where the run has a profiler.

    Args:
        arm: Name of the run.

    Attributes:
        turns: Between the arms that run now; None where there is but one.
        stretches: Seconds of each stretch, by arm.
        hooks: Microseconds per step of each hook of the last run that had a profiler.
    """

    turns: ClassVar[Turns | None] = None
    stretches: ClassVar[dict[str, list[float]]] = {}
    hooks: ClassVar[dict[str, float]] = {}

    def __init__(self, arm: str) -> None:
        self.arm, self._steps, self._started = arm, 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two stretches, let the others have theirs."""
        if self._steps >= SKIPPED and (self._steps - SKIPPED) % STRETCH == 0:
            if self._steps > SKIPPED:
                self.stretches.setdefault(self.arm, []).append(time.process_time() - self._started)
            if self.turns is not None:
                self.turns.next(self.arm)
                self.turns.wait(self.arm)
            self._started = time.process_time()
        self._steps += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the hooks."""
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
        self.folder, self.steps = folder, steps
        tokenizer = material.make_tokenizer(1024)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.model = str(material.write_model(folder / "model", tokenizer, **sizes))
        self.data: dict[str, Any] = {
            "train_path": str(material.write_rows(folder / "rows.jsonl", material.chat_rows(3 * steps, 20))),
            **{"max_length": 64, "batch_size": 1, "val_fraction": 0.0, "seed": 0, "cache_dir": str(folder / "cache")},
        }

    def fit(self, arm: str, **trainer: Any) -> None:
        """Run `fit`; keyword arguments go to its Trainer's section."""
        folder = self.folder / arm.replace(" ", "-")
        package = "lightning_trainer.callbacks"
        callbacks = [
            {"class_path": f"{package}.PreviewCallback", "init_args": {"every_n_steps": NEVER, "max_new_tokens": 1}},
            *({"class_path": f"{package}.{name}"} for name in ("StatusFile", "HuggingFaceExport")),
            {"class_path": "overhead.StepClock", "init_args": {"arm": arm}},
        ]
        config = {
            "model": {"pretrained": self.model},
            "data": {**self.data, "profile": "Plain"},
            "checkpoint": {"every_n_train_steps": NEVER},
            "trainer": {
                **{"default_root_dir": str(folder), "precision": "32-true"},
                **{"accelerator": "cpu", "max_steps": self.steps, "log_every_n_steps": LOG_EVERY},
                **{"callbacks": callbacks, **trainer},
            },
        }
        path = self.folder / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        if status := main(["fit", "--config", str(path)]):
            raise RuntimeError(f"fit ended with {status}; run it by hand: lightning-trainer fit --config {path}")

    def lightning(self) -> None:
        """Run Lightning's own loop."""
        quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=self.steps,
            gradient_clip_val=1.0,
            callbacks=[StepClock("lightning")],
            default_root_dir=str(self.folder / "lightning"),
            use_distributed_sampler=False,
            **dict.fromkeys(quiet, False),
        )
        trainer.fit(OfLightning(self.model), ChatDataModule(**self.data, profile=Plain()))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing on the screen."""
    said = io.StringIO()
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def side_by_side(arms: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Milliseconds of a step of each arm, stretch by stretch: those of one number ran one after the other."""
    StepClock.stretches, StepClock.turns = {}, Turns(list(arms))
    faults: list[BaseException] = []

    def run(name: str, act: Callable[[], None], turns: Turns) -> None:
        turns.wait(name)
        try:
            act()
        except BaseException as fault:
            faults.append(fault)
        finally:
            turns.next(name, ends=True)

    threads = [threading.Thread(target=run, args=(name, act, StepClock.turns)) for name, act in arms.items()]
    with silence():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    StepClock.turns = None
    if faults:
        raise faults[0]
    return {name: [1e3 * seconds / STRETCH for seconds in StepClock.stretches[name]] for name in arms}


def step_rows(job: Job) -> Iterator[Row]:
    """Milliseconds of a step, and of ours above Lightning's."""
    found = side_by_side(
        {
            "lightning": job.lightning,
            "fit": lambda: job.fit("fit"),
            "fit without a bar": lambda: job.fit("fit without a bar", enable_progress_bar=False),
        }
    )
    base = found.pop("lightning")
    yield Row("a step of Lightning's own loop", quartiles(base), "ms")
    note = f"median and quartiles of {len(base)} stretches of {STRETCH} steps"
    for name, mine in found.items():
        above = [a - b for a, b in zip(mine, base, strict=True)]
        yield Row(f"{name}, above it", quartiles(above), "ms", at_most=MOST, note=note)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of many values, which other work on the machine now and then reaches."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def hook_rows(job: Job, least: float = 1.0) -> Iterator[Row]:
    """Microseconds a step that each callback's hooks take, from a run with Lightning's profiler."""
    with silence():
        job.fit("profiled", profiler="simple", enable_progress_bar=False)
    for name, spent in sorted(StepClock.hooks.items(), key=lambda item: -item[1]):
        if spent >= least:
            yield Row(f"  {name}", (spent,), "us/step", note="with the profiler's own microsecond or two")


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        job = Job(Path(name), 3_000 if quick else 8_000)
        return [*step_rows(job), *hook_rows(job)]
