"""Run one of LightningCLI's commands and map what can go wrong to exit codes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_trainer.callbacks import NonFiniteError
from lightning_trainer.checkpoints import CheckpointWriteError
from lightning_trainer.engine.launcher import RankFailed
from lightning_trainer.engine.trainer_cli import TrainerCLI
from lightning_trainer.precision.single_dtype import DtypeError

NOISE = (
    "GPU available",
    "TPU available",
    "HPU available",
    "LOCAL_RANK",
    "💡 Tip",
    "Restor",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped",
    "`weights_only` was not set",
    "Seed set to",
    "You are using a CUDA device",  # and how to make fp32 products less exact
)
"""How lines begin that the stack says about itself."""

SPEAKERS = (
    "pytorch.utilities.rank_zero",
    "pytorch.accelerators.cuda",
    "pytorch.trainer.connectors.checkpoint_connector",
    "fabric.utilities.rank_zero",
    "fabric.utilities.seed",
)
"""Loggers that say them."""


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
    with quiet_stack():
        cli = TrainerCLI(args)
        with known_failures():
            cli.run()
        return cli.summary()


@contextmanager
def known_failures() -> Iterator[None]:
    """What can go wrong while training and says all there is to say becomes a FailedRun."""
    try:
        yield
    except (NonFiniteError, CheckpointWriteError, DtypeError, RankFailed) as error:
        raise FailedRun(str(error)) from error
    except torch.OutOfMemoryError as error:
        said, *_ = str(error).splitlines() or [type(error).__name__]
        raise FailedRun(
            f"the GPU has no memory left: {said}\n"
            "lightning-trainer check says what takes how much; less take a smaller data.batch_size or data.max_length, "
            "model.gradient_checkpointing: true and model.lora"
        ) from error


@contextmanager
def quiet_stack() -> Iterator[None]:
    """Silence what torch and Lightning say about themselves."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in SPEAKERS]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")
        # LightningCLI 2.6 calls names that jsonargparse has given up; `-W error` would end the run.
        warnings.filterwarnings("ignore", message=r"(?s).*(JsonargparseDeprecationWarning|deprecated in v4\.)")
        # The first and the last step are logged in any case, and callbacks may be swapped on resume.
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # our batches cost next to nothing
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        for logger in loggers:
            logger.addFilter(_is_news)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(NOISE)
