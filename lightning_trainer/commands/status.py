"""`status RUN_DIR`: how a run stands, from its status.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lightning_trainer.status import TrainingStatusReader, describe


def run(command: str, words: list[str]) -> int:
    """Print it; the exit status is 0 whenever there is something to say."""
    parser = argparse.ArgumentParser(prog=f"lightning-trainer {command}", description="How a run stands.")
    parser.add_argument("run_dir", type=Path, help="run directory, or a status file")
    parser.add_argument("--json", action="store_true", help="the whole state as JSON")
    given = parser.parse_args(words)
    path = given.run_dir / "status.json" if given.run_dir.is_dir() else given.run_dir
    state = TrainingStatusReader(path).read()
    print(json.dumps(state, ensure_ascii=False, indent=2) if given.json else describe(state))
    return 0
