"""Throughput: useful tokens per CPU second of `fit`, of a bare loop that does the least work, and of other trainers.

A useful token is one that is trained on. Each arm is a process of its own (arms/), on one thread, with the same model,
chats, labels, optimizer and clipping and about as many tokens an optimizer step; steps before the counted ones warm it
up. The arms take turns. `tools/bench/make_peers` installs the other trainers; without them their rows are absent. The
whole table takes about 40 minutes, a quick run two and a half.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Row, ratios

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

RATE, MEMORY = "useful tokens per CPU second", "peak memory"
"""How the rows that a chart is made of begin."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TTY_COMPATIBLE": "1",  # progress bars are drawn as on a terminal
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}


COMPILED = "_compiled"
"""How the name of an arm ends that differs from another by torch.compile."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: Of its rows; its script knows it without COMPILED.
        script: In arms/.
        steps: Optimizer steps counted.
        quick_steps: The same of a quick run; 0 leaves the arm out.
        note: Whatever a reader must know of it.
        peer: Whether it runs in the peers' environment.
        words: Of its script's command line, besides.
    """

    name: str
    script: str
    steps: int
    quick_steps: int = 0
    note: str = ""
    peer: bool = True
    words: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What its script calls it."""
        return self.name.removesuffix(COMPILED)


ARMS = (
    Arm("floor", "floor.py", 20, 6, peer=False),
    Arm("fit", "fit.py", 20, 6, peer=False),
    Arm(f"fit{COMPILED}", "fit.py", 20, note="model.compile: true", peer=False, words=("--compile",)),
    # One of its previews, which come every 50 steps.
    Arm("fit_previews", "fit.py", 50, note="previews every 50 steps", peer=False),
    Arm("trl_packed", "trl_sft.py", 20, 3, note="bfd, sdpa"),
    # It sorts 50 batches at a time by length: fewer would show the long ones alone.
    Arm("hf_grouped", "hf_trainer.py", 50, note="10 chats a step"),
    Arm("hf_single", "hf_trainer.py", 20, note="micro-batches of 1 chat, 10 a step"),
    Arm("trl_single", "trl_sft.py", 20, note="micro-batches of 1 chat, 10 a step"),
    Arm("litgpt_single", "litgpt_full.py", 20, note="micro-batches of 1 chat, 10 a step; weighs chats, clips nothing"),
    Arm("hf_padded", "hf_trainer.py", 10, note="10 chats a step"),
    Arm("trl_padded", "trl_sft.py", 10, note="10 chats a step"),
    Arm("litgpt_padded", "litgpt_full.py", 10, note="10 chats a step; clips nothing"),
)

ROUNDS, QUICK_ROUNDS = 3, 2

Found = dict[str, list[dict[str, Any]]]


def run(quick: bool) -> list[Row]:
    """The table's rows."""
    arms = at_hand(ARMS, quick)
    with tempfile.TemporaryDirectory() as name:
        call(sys.executable, "workload.py", name, "--chats", "2000" if quick else "10000")
        found = measure(arms, Path(name), quick, 1 if quick else 3)
    return list(_rows(arms, found))


def at_hand(arms: Iterable[Arm], quick: bool) -> list[Arm]:
    """Those of a quick or a long run; without the peers', where they are not installed."""
    arms = [arm for arm in arms if arm.quick_steps or not quick]
    if PEERS.exists():
        return arms
    print("  without other trainers: tools/bench/make_peers installs them into .venv-peers", flush=True)
    return [arm for arm in arms if not arm.peer]


def measure(arms: list[Arm], workload: Path, quick: bool, warmup: int, *words: str) -> Found:
    """What each arm reported in each round.

    Args:
        arms: To run in turn.
        workload: Folder that workload.py wrote.
        quick: Fewer rounds and steps.
        warmup: Steps before those that count.
        words: Of every arm's command line, besides its own.
    """
    found: Found = {arm.name: [] for arm in arms}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for number in range(1, rounds + 1):
        for arm in arms:
            print(f"  round {number} of {rounds}: {arm.name}", file=sys.stderr, flush=True)
            python = str(PEERS) if arm.peer else sys.executable
            steps = ["--warmup", str(warmup), "--steps", str(arm.quick_steps if quick else arm.steps)]
            said = call(python, arm.script, arm.kind, str(workload), *steps, *arm.words, *words)
            found[arm.name].append(json.loads(said.splitlines()[-1]))
    return found


def call(python: str, script: str, *words: str) -> str:
    """What a script of arms/ printed; on one thread, without a network.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    command = [python, str(HERE / "arms" / script), *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _rows(arms: list[Arm], found: Found) -> Iterable[Row]:
    rates = {name: [run["useful_tokens"] / run["cpu_seconds"] for run in runs] for name, runs in found.items()}
    yield Row("fit / floor", ratios(rates["fit"], rates["floor"]), at_least=0.93)
    yield Row("fit and floor: loss of step 1, apart by", _apart(found["fit"], found["floor"]), "nats", at_most=1e-3)
    for arm in arms:
        if arm.name in ("floor", "fit"):
            continue
        base = "fit" if arm.peer else "floor"
        bound = 0.45 if arm.name == "trl_packed" else None
        yield Row(f"{arm.name} / {base}", ratios(rates[arm.name], rates[base]), at_most=bound, note=arm.note)
    for name, values in rates.items():
        yield Row(f"{RATE}: {name}", tuple(values), "tokens/s", note=_losses(found[name]))
    for name, runs in found.items():
        yield Row(f"{MEMORY}: {name}", _values(runs, "peak_rss_mib"), "MiB")
    for name in ("floor", "fit"):
        yield Row(f"CPU of the whole process: {name}", _values(found[name], "process_cpu_seconds"), "s")


def _apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, ...]:
    pairs = zip(ours, theirs, strict=True)
    return tuple(abs(a["first_losses"][0] - b["first_losses"][0]) for a, b in pairs)


def _losses(runs: list[dict[str, Any]]) -> str:
    """The first losses, from which one sees that arms do the same work."""
    versions = runs[0]["versions"]
    package = next((f", {name} {versions[name]}" for name in ("trl", "litgpt", "transformers") if name in versions), "")
    return f"loss {' '.join(f'{loss:.3f}' for loss in runs[0]['first_losses'])}{package}"


def _values(runs: list[dict[str, Any]], key: str) -> tuple[float, ...]:
    return tuple(run[key] for run in runs)
