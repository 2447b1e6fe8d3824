"""The command line: `lightning-trainer COMMAND …`. Each command is imported only when it is used."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from lightning_trainer import __version__
from lightning_trainer.signals import Interrupted, interruptible
from lightning_trainer.types import InputError

COMMANDS = {
    "fit": ("train", "train, with previews and checkpoints"),
    "validate": ("train", "loss, perplexity and token accuracy on the validation rows"),
    "test": ("train", "the same on data.test_path"),
    "predict": ("train", "write answers for data.predict_path"),
    "check": ("check", "what fit would do with a configuration, and what looks wrong"),
    "inspect": ("inspect", "what the model will see of the first rows"),
    "status": ("status", "how a run stands"),
    "serve": ("serve", "answer previews with a second GPU's copy of the model"),
    "verify-resume": ("verify_resume", "whether a run that is stopped and resumed ends as if it had not been"),
    "convert": ("convert", "a job's JSON of earlier versions as YAML"),
}
"""Name -> module of `commands`, and what it does."""

READS_YAML = ("train", "check", "inspect", "verify_resume")
"""Modules whose --config files are looked at before anything heavy is imported."""

USAGE = "\n".join(
    [
        "usage: lightning-trainer COMMAND [--config FILE ...] [--KEY VALUE ...]",
        "",
        "Fine-tune causal language models from one YAML.",
        "",
        "commands:",
        *(f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "lightning-trainer fit --print_config   a template of all keys, with their defaults",
        "lightning-trainer COMMAND --help       what each key means",
    ]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Words after the program's name; None takes them from `sys.argv`.

    Returns:
        Exit status: 0 success, 1 a failed run, 2 wrong before training began, 130 after SIGINT, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        return _complain(_unknown(words[0]), 2)
    return _guarded(words)


def _guarded(words: list[str]) -> int:
    from lightning_trainer.engine.config.config_file import ConfigError, check_command_line

    module, _ = COMMANDS[words[0]]
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_is_news)
    try:
        with interruptible():
            if module in READS_YAML:
                check_command_line(words)
            command = import_module(f"lightning_trainer.commands.{module}")
            return int(command.run(words[0], words[1:]))
    except (ConfigError, InputError) as error:
        return _complain(str(error), 2)
    except Interrupted as stop:
        return 128 + stop.signum
    except Exception:  # the outermost boundary: whatever it is, the exit status must say that the run failed
        traceback.print_exc()
        return 1


def _is_news(record: logging.LogRecord) -> bool:
    """False for what torchao says when transformers imports it, in every run where it is installed.

    That its C++ kernels don't fit this torch (8-bit optimizers use none), and that it calls what torch is giving up.
    """
    return not record.getMessage().startswith(("Failed to load ", "<enum '"))


def _complain(text: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr)
    return status


def _unknown(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"no command {word!r}" + (f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(COMMANDS)}")
