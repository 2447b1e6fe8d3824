"""`convert`: a job's JSON, or a job's flags, as the YAML that `fit` runs."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_trainer.engine.job.config_loader import ConfigLoader
from lightning_trainer.engine.job.lowering import remarks
from lightning_trainer.engine.job.yaml_text import as_yaml
from lightning_trainer.types import InputError


def run(command: str, words: list[str]) -> int:
    """Write the YAML, and say what could not be carried over."""
    parser = ConfigLoader.parser(prog=f"lightning-trainer {command}")
    parser.description = "Write a job as the YAML that `fit` runs. Flags win over the JSON."
    parser.add_argument("job", nargs="?", default=None, help="JSON file of a job; the same as --config")
    parser.add_argument("-o", "--out", default=None, help="where the YAML goes; without it, to standard output")
    given = parser.parse_args(words)
    if given.job is not None and getattr(given, "config", None) is not None:
        raise InputError(f"two JSON files: {given.job} and --config {given.config}")
    config = ConfigLoader.from_args_and_json(given, base_config_path=given.job)
    source = given.job or getattr(given, "config", None) or "the command line"
    target = Path(given.out).name if given.out else "run.yaml"
    text = as_yaml(config, str(source), target)
    if given.out is None:
        print(text, end="")
        return 0
    _write_new(Path(given.out), text)
    for line in remarks(config):
        print(line, file=sys.stderr)
    print(f"{given.out}: lightning-trainer fit --config {given.out}")
    return 0


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path} is already there; remove it, or name another with -o") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
