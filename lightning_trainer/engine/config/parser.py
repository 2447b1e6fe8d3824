"""The parser class of the command line: faults become a `ConfigError` that says where, what and the nearest name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_trainer.engine.config import messages
from lightning_trainer.engine.config.command_line import CommandLineWalk, asks_for_help
from lightning_trainer.engine.config.config_file import COMMAND_LINE, ConfigError
from lightning_trainer.engine.config.construction import Construction
from lightning_trainer.engine.config.places import Fault, Place, Source
from lightning_trainer.engine.config.schema import Schema
from lightning_trainer.engine.config.strict import StrictWalk
from lightning_trainer.types import InputError

MOST_FAULTS = 5
IN_PYTHON = "configuration"


class ConfigParser(LightningArgumentParser):
    """For `LightningCLI(parser_class=ConfigParser)`.

    The parser that takes the whole command line walks it strictly before it parses. The same class serves commands
    (`parent_parser` is set) and the parameters of classes (`exit_on_error` is off); these leave the walk to it.

    Raises:
        ConfigError: From `parse_args` and `parse_object`, for every fault in files or on the command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --model.max_len is a misspelling, not --model.max_length
        super().__init__(*args, **kwargs)
        self._walk: StrictWalk | None = None

    def parse_args(  # type: ignore[override]  # argparse's overloads; jsonargparse itself has this signature
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        """As LightningCLI's, after the strict walk; `args` defaults to `sys.argv[1:]`."""
        argv = list(sys.argv[1:] if args is None else args)
        if self._takes_everything() and not asks_for_help(argv):
            self._check_strictly(argv)
        parsed: Namespace = super().parse_args(args, *rest, **kwargs)
        return parsed

    def parse_object(self, obj: Any, *rest: Any, **kwargs: Any) -> Namespace:
        """As LightningCLI's, after the strict walk. `obj` stays as it is; jsonargparse alone would write into it."""
        if self._takes_everything():
            walk = self._walk = StrictWalk(self)
            values = vars(obj) if isinstance(obj, Namespace) else obj
            _raise_if_any(walk.keys(Schema(self), values, Place(Source(IN_PYTHON))))
            if not rest and kwargs.get("namespace") is None:  # else `obj` is only a part
                _raise_if_any(walk.missing_parameters(str(values.get("subcommand") or "")))
            obj = _copied(obj)
        parsed: Namespace = super().parse_object(obj, *rest, **kwargs)
        return parsed

    def instantiate(
        self, namespace: Namespace, instantiate_groups: bool = True, *, instantiators: Any = None
    ) -> Namespace:
        """As jsonargparse's; a class that refuses its arguments is named, with the key it stands under.

        Raises:
            InputError: See above.
        """
        if not self._takes_everything():  # a part of the whole, which will tell
            part: Namespace = super().instantiate(namespace, instantiate_groups, instantiators=instantiators)
            return part
        construction = Construction()
        try:
            builder = [*(instantiators or ()), (construction.build, object, True)]
            whole: Namespace = super().instantiate(namespace, instantiate_groups, instantiators=builder)
            return whole
        except InputError:
            raise
        except ValueError as error:
            refusal = construction.refusal(error, namespace, str(namespace.get("subcommand") or ""))
            if refusal is None:
                raise
            raise refusal from error

    def place_of(self, key: str) -> str:
        """Where `key` was set last: `run.yaml:3:5`, `command line`, or "" for a default.

        For faults that only show when an object is built: `data.train_path`, or `fit.data.train_path` where the
        parser has commands.
        """
        places = self._walk.places if self._walk else {}
        while key and key not in places:
            key = key.rpartition(".")[0]
        return places.get(key, "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises what jsonargparse found and the walk did not; jsonargparse alone prints the usage and exits."""
        if not self.exit_on_error:
            super().error(message, ex)
        top = getattr(self, "parent_parser", None) or self
        prefix = f"{getattr(self, 'subcommand', '')}." if top is not self else ""
        lines = messages.reworded(message, lambda key: top.place_of(prefix + key) or COMMAND_LINE, _commands(top))
        raise ConfigError(*lines) from ex

    def _takes_everything(self) -> bool:
        inner = getattr(self, "_inner_parser", False) or getattr(self, "parent_parser", None) is not None
        return self.exit_on_error and not inner

    def _check_strictly(self, argv: Sequence[str]) -> None:
        walk = self._walk = StrictWalk(self)
        words = CommandLineWalk(self, walk, argv)
        _raise_if_any(words.faults())
        if not words.prints_config:  # which also shows what is still missing
            _raise_if_any(walk.missing_parameters(words.command))


def _raise_if_any(faults: Iterator[Fault]) -> None:
    lines = list(dict.fromkeys(fault.text for fault in faults))
    if len(lines) > MOST_FAULTS:
        lines = [f"{len(lines)} faults; the first {MOST_FAULTS}:", *lines[:MOST_FAULTS]]
    if lines:
        raise ConfigError(*lines)


def _commands(parser: Any) -> list[str]:
    return list(Schema(parser).subcommands)


def _copied(value: Any) -> Any:
    """Mappings and lists copied, the objects in them not: a callback may be given as an instance."""
    if isinstance(value, Namespace):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
