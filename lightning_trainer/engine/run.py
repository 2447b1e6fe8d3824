"""Run one of LightningCLI's commands and map what can go wrong to exit codes."""

from __future__ import annotations

import logging
import warnings

from lightning_trainer.callbacks import NonFiniteError
from lightning_trainer.engine.config_file import ConfigError
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.types import InputError

NOISE = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "Restor",
    "`Trainer.fit` stopped",
    "LOCAL_RANK",
    "`weights_only` was not set",
    "Loading `train_dataloader` to estimate",
)
"""How lines begin that say nothing of the run."""


class FailedRun(Exception):
    """A run that failed for a known reason: exit status 1, no traceback."""


def run_command(args: list[str]) -> str:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        args: The command and its options.

    Returns:
        What to print at the end.

    Raises:
        ConfigError: Wrong before training began.
        FailedRun: Wrong while training.
    """
    _silence()
    cli = None
    try:
        cli = _Cli(args)
    except InputError as error:
        raise ConfigError(_located(error, args)) from error
    except (NonFiniteError, OSError) as error:
        raise FailedRun(str(error)) from error
    return cli.summary()


class _Cli(TrainerCLI):
    """Remembers the parser of a construction that failed, so that its error can be located."""

    latest: TrainerCLI | None = None

    def __init__(self, args: list[str]) -> None:
        _Cli.latest = self
        super().__init__(args)


def _located(error: InputError, args: list[str]) -> str:
    if error.key is None:
        return str(error)
    parser = getattr(_Cli.latest, "parser", None)
    place = parser.place_of(f"{args[0]}.{error.key}") if parser is not None else ""
    return f"{place}: {error.key}: {error}" if place else f"{error.key}: {error}"


def _silence() -> None:
    """Turn off what the stack says about itself; what is wrong with a run is still said."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`weights_only` was not set.*")
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    noise = (
        "GPU available",
        "TPU available",
        "HPU available",
        "💡 Tip",
        "Restor",
        "`Trainer.fit` stopped",
        "LOCAL_RANK",
    )
    return not text.lstrip().startswith(noise)
