"""What every arm measures alike, and the one line of JSON in which it says so.

CPU time is that of the whole process, threads and ended children included, from the end of the last warm-up step to the
end of the last counted one: between two equal places of the loop, so that whatever a step costs is counted once. On a
GPU the clock on the wall is read at the same places, once all that was asked of the GPU is done.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

LEARNING_RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
"""Of every arm; the rate is constant, there is no weight decay."""

FIRST_LOSSES = 3


@dataclass(frozen=True)
class Mark:
    """What had been used and done at one place of the loop."""

    cpu_seconds: float
    wall_seconds: float
    useful_tokens: int


def cpu_seconds() -> float:
    """Of this process so far."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def labelled(labels: Tensor) -> int:
    """Tokens of (B, T) labels that a model which predicts the next token is trained on."""
    return int((labels[:, 1:] != -100).sum())


class Meter:
    """Counts useful tokens and CPU seconds of the counted steps.

    Args:
        given: The arm's command line.

    Attributes:
        warmup: Optimizer steps before the counted ones.
        last: The last counted step; an arm may make more.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.arm: str = given.arm
        self.warmup: int = given.warmup
        self.last: int = given.warmup + given.steps
        self._tokens = 0
        self._open: list[tuple[int, Tensor]] = []
        self._losses: list[Tensor] = []
        self._marks: dict[int, Mark] = {}
        self._on_gpu = given.device == "cuda"

    def saw(self, tokens: int, nats: Tensor) -> None:
        """Note a micro-batch that was trained on: its labelled tokens and the sum of their loss, not read here."""
        self._tokens += tokens
        self._open.append((tokens, nats))

    def passed(self, steps: int) -> None:
        """Say that so many optimizer steps are complete, always at the same place of the loop."""
        if self._open:
            tokens, nats = zip(*self._open, strict=True)
            self._losses.append(torch.stack(nats).sum() / sum(tokens))
            self._open = []
        if steps in (self.warmup, self.last) and steps not in self._marks:
            if self._on_gpu:
                torch.cuda.synchronize()
            self._marks[steps] = Mark(cpu_seconds(), time.perf_counter(), self._tokens)

    def report(self, *packages: str) -> None:
        """Print the line.

        Args:
            packages: Whose versions belong to it, besides torch's.
        """
        first, last = self._marks[self.warmup], self._marks[self.last]
        found = {
            "arm": self.arm,
            "steps": self.last - self.warmup,
            "useful_tokens": last.useful_tokens - first.useful_tokens,
            "cpu_seconds": last.cpu_seconds - first.cpu_seconds,
            "wall_seconds": last.wall_seconds - first.wall_seconds,
            "process_cpu_seconds": cpu_seconds(),
            "peak_rss_mib": _peak_rss_mib(),
            "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else 0.0,
            "first_losses": [round(float(loss), 5) for loss in self._losses[:FIRST_LOSSES]],
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", *packages)},
        }
        print(f"\n{json.dumps(found)}", flush=True)


def _peak_rss_mib() -> float:
    # Not ru_maxrss: a process that was started by a larger one begins with that one's peak.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def arguments(description: str | None, *arms: str) -> argparse.Namespace:
    """The command line of an arm: workload, arm, warmup, steps, device, compile; and the dtype of that device.

    Args:
        description: What the arm is.
        arms: Which of them the file can be.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=arms)
    parser.add_argument("workload", type=Path, help="folder that workload.py wrote")
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the counted ones")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps counted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bf16")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    given = parser.parse_args()
    given.dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    return given
