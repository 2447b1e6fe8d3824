"""The command line: `lightning-trainer COMMAND …`. Each command is imported only when it is used."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType

from lightning_trainer import __version__

TRAINING = {
    "fit": "train, with previews and checkpoints",
    "validate": "loss, perplexity and token accuracy on the validation rows",
    "test": "the same on data.test_path",
    "predict": "write answers for data.predict_path",
}

USAGE = "\n".join(
    [
        "usage: lightning-trainer COMMAND [--config FILE ...] [--KEY VALUE ...]",
        "",
        "Fine-tune causal language models from one YAML.",
        "",
        "commands:",
        *(f"  {name:<10} {text}" for name, text in TRAINING.items()),
        "",
        "lightning-trainer fit --print_config   a template of all keys, with their defaults",
        "lightning-trainer fit --help           what each key means",
    ]
)


class _Signalled(BaseException):
    """A signal that came where no checkpoint can be made."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


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
    if words[0] not in TRAINING:
        return _complain(_unknown(words[0]), 2)
    return _guarded(words)


def _guarded(words: list[str]) -> int:
    from lightning_trainer.engine.config.config_file import ConfigError, check_command_line

    handlers = _catch_signals()
    try:
        check_command_line(words)
        return _train(words)
    except ConfigError as error:
        return _complain(str(error), 2)
    except (_Signalled, KeyboardInterrupt) as stop:
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except Exception:  # the outermost boundary: whatever it is, the exit status must say that the run failed
        traceback.print_exc()
        return 1
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _train(words: list[str]) -> int:
    from lightning_trainer.callbacks import Interrupted
    from lightning_trainer.engine.run import FailedRun, run_command

    try:
        text = run_command(words)
    except FailedRun as error:
        return _complain(str(error), 1)
    except Interrupted as stop:
        return 128 + stop.signum
    if text:
        print(text)
    return 0


def _catch_signals() -> dict[int, signal._HANDLER]:
    """End on SIGINT and SIGTERM with their exit codes; while training, a callback answers them with a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, _raise) for signum in (signal.SIGINT, signal.SIGTERM)}


def _raise(signum: int, frame: FrameType | None) -> None:
    raise _Signalled(signum)


def _complain(text: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr)
    return status


def _unknown(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, TRAINING, n=1)
    return f"no command {word!r}" + (f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(TRAINING)}")
