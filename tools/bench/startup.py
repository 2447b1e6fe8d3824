"""What the command line costs before it does anything.

python tools/bench startup [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import child
import data_path
import material
import yaml
from measure import Row

MOST_HELP, MOST_IMPORTS = 0.5, 5.7


def help_seconds() -> float:
    """Wall seconds of `lightning-trainer --help`."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "lightning_trainer", "--help"]
    subprocess.run(words, env=child.environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def write_job(folder: Path) -> None:
    """A run of two steps, as often as asked for."""
    tokenizer = material.make_tokenizer(1024)
    config = {
        "overwrite": True,
        "model": {"pretrained": str(material.write_model(folder / "model", tokenizer))},
        "data": {
            "train_path": str(material.write_rows(folder / "rows.jsonl", material.chat_rows(200, 20))),
            **{"profile": "Plain", "max_length": 64, "cache_dir": str(folder / "cache")},
        },
        "trainer": {
            **{"default_root_dir": str(folder / "run"), "precision": "32-true", "accelerator": "cpu", "max_steps": 2},
            "callbacks": [
                {"class_path": "PreviewCallback", "init_args": {"max_new_tokens": 2}},
                *({"class_path": name} for name in ("StatusFile", "HuggingFaceExport")),
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def run(quick: bool) -> list[Row]:
    """The table."""
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as name:
        write_job(Path(name))
        child.call("imports", "seconds_of_fit", name)  # the files are read once before it counts
        whole = tuple(child.call("imports", "seconds_of_fit", name) for _ in range(rounds))
        first = tuple(child.call("imports", "seconds_before_fit") for _ in range(rounds))
    return [
        Row("lightning-trainer --help", tuple(help_seconds() for _ in range(rounds)), "s", at_most=MOST_HELP),
        Row("imports of fit, processor", whole, "s", at_most=MOST_IMPORTS, note="of a whole run, lazy ones included"),
        Row("  before it reads its YAML", first, "s"),
        data_path.warm_row(5_000 if quick else 50_000, rounds),
    ]
