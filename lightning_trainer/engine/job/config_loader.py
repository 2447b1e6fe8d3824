"""ConfigLoader: a TrainerConfig from command line, JSON file and defaults, the first of them winning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_trainer.engine.config.suggest import did_you_mean, nearest
from lightning_trainer.engine.job.job_file import read_job
from lightning_trainer.engine.job.lowering import max_length
from lightning_trainer.engine.job.trainer_config import TrainerConfig
from lightning_trainer.types import InputError

FLAGS: dict[str, tuple[str, Any, str]] = {
    "dataset": ("data.dataset_path", str, "file or Hub id of the rows"),
    "model": ("model.model_path", str, "directory or Hub id of the model"),
    "output_dir": ("output.output_dir", str, "the run directory"),
    "batch_size": ("hyperparams.batch_size", int, "rows per device and micro-batch"),
    "learning_rate": ("hyperparams.learning_rate", float, "its peak"),
    "warmup_steps": ("hyperparams.warmup_steps", int, "optimizer steps up to the peak"),
    "epochs": ("hyperparams.num_epochs", int, "times the data is gone through"),
    "max_steps": ("hyperparams.max_steps", int, "optimizer steps; overrides --epochs"),
    "save_steps": ("hyperparams.save_steps", int, "optimizer steps between checkpoints"),
    "eval_steps": ("hyperparams.eval_steps", int, "optimizer steps between validations; switches them on"),
    "max_length": ("hyperparams.max_length", int, "most tokens of a row"),
    "profile": ("profile.name", str, "emoji_think, regime3, plain or a class of your own"),
    "num_eval_samples": ("monitoring.num_eval_samples", int, "prompts previewed"),
    "resume_from_checkpoint": ("output.resume_from_checkpoint", str, "last, auto or the path of a checkpoint"),
}
"""Flag -> field, type, help."""

DEFAULT_OUTPUT = "outputs/run"

NO_LIMIT = 2**31
"""Context of an architecture that has no limit; a lock needs a number."""

PRECISIONS = ("fp16", "bf16")


class ConfigLoader:
    """Makes configs, and compares locks."""

    @staticmethod
    def parser(prog: str | None = None) -> argparse.ArgumentParser:
        """The command line that `from_args_and_json` reads."""
        parser = _Parser(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        parser.add_argument("--config", help="JSON file of a job, nested or flat; the flags win over it")
        for flag, (_, kind, text) in FLAGS.items():
            parser.add_argument(f"--{flag.replace('_', '-')}", type=kind, help=text)
        precision = parser.add_mutually_exclusive_group()
        for name in PRECISIONS:
            precision.add_argument(f"--{name}", action="store_true", help=f"train in {name}")
        return parser

    @classmethod
    def from_args_and_json(
        cls, args: argparse.Namespace | Sequence[str] | None = None, base_config_path: str | Path | None = None
    ) -> TrainerConfig:
        """Command line before JSON before defaults.

        What a job's lock does not say is taken from the model as it is found at its path.

        Args:
            args: Parsed by `parser`, or the words themselves; None takes them from `sys.argv`. Attributes that are
                none of its flags are not looked at.
            base_config_path: JSON file; `--config` wins over it.

        Raises:
            InputError: Something is unknown, missing or invalid.
        """
        given = vars(args if isinstance(args, argparse.Namespace) else cls.parser().parse_args(args))
        path = given.get("config") or base_config_path
        values = read_job(path) if path is not None else {}
        for dotted, value in _overrides(given):
            section, _, field = dotted.partition(".")
            values.setdefault(section, {})[field] = value
        _refuse_missing(values)
        values.setdefault("output", {}).setdefault("output_dir", DEFAULT_OUTPUT)
        said = values.get("locked", {})
        if any(name not in said for name in ("base_model", "model_architecture", "max_context_length", "vocab_size")):
            values["locked"] = {**_lock_of(values["model"]["model_path"]), **said}
        return TrainerConfig.from_dict(values)

    @staticmethod
    def validate_locked_config(config: TrainerConfig, base_config: TrainerConfig | None = None) -> None:
        """Compare a job's lock with its model, and with the lock of the job it follows.

        Args:
            config: The job.
            base_config: The job that made the model it goes on from, where there is one.

        Raises:
            InputError: They differ; each field is named with both values.
        """
        from lightning_trainer import lock
        from lightning_trainer.pretrained import load_config

        mine = lock.Lock(**config.locked.model_dump())
        lock.check_model(mine, lock.facts_of_config(load_config(config.model.model_path)))
        lock.check_length(mine, max_length(config))
        if base_config is not None:
            lock.check_resumed(base_config.locked.model_dump(), mine)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = nearest(unknown[0], self._option_string_actions) if "unrecognized" in message and unknown else []
        raise InputError(message + did_you_mean(near))


def _overrides(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """(dotted field, value) of each flag that was given."""
    found = [(field, given[flag]) for flag, (field, _, _) in FLAGS.items() if given.get(flag) is not None]
    if given.get("eval_steps") is not None:
        found.append(("hyperparams.eval_strategy", "steps"))
    asked = [name for name in PRECISIONS if given.get(name)]
    if len(asked) > 1:
        raise InputError("--fp16 and --bf16 cannot both be given", key="hyperparams.fp_precision")
    return found + [("hyperparams.fp_precision", name) for name in asked]


def _refuse_missing(values: dict[str, Any]) -> None:
    needed = {"model.model_path": "--model", "data.dataset_path": "--dataset"}
    missing = []
    for dotted, flag in needed.items():
        section, _, name = dotted.partition(".")
        if name not in (values.get(section) or {}):
            missing.append(f"{dotted}: is required; give it in the JSON, or as {flag}")
    if missing:
        raise InputError("\n".join(missing), key=missing[0].partition(":")[0])


def _lock_of(model_path: str) -> dict[str, Any]:
    """A lock that says what the model is."""
    from lightning_trainer.lock import facts_of_config
    from lightning_trainer.pretrained import load_config

    facts = facts_of_config(load_config(model_path))
    return {
        "base_model": str(model_path),
        "model_architecture": facts.model_architecture or facts.model_type,
        "max_context_length": facts.max_context_length or NO_LIMIT,
        "vocab_size": facts.vocab_size,
    }
