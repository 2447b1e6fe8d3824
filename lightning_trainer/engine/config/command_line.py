"""The command line as a sequence of sources: config files and options, in the order in which they override."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_trainer.engine.config import messages, schema
from lightning_trainer.engine.config.config_file import COMMAND_LINE, is_config_path, read_config_argument
from lightning_trainer.engine.config.places import Fault, Place, Source
from lightning_trainer.engine.config.schema import Schema
from lightning_trainer.engine.config.strict import StrictWalk
from lightning_trainer.engine.config.suggest import did_you_mean, nearest

HERE = Source(COMMAND_LINE)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether help will be printed instead of anything being parsed: `-h`, `--help`, `--trainer.callbacks.help`."""
    return any(word in ("-h", "--help") or (word[:2] == "--" and word.split("=")[0].endswith(".help")) for word in argv)


class CommandLineWalk:
    """Reads the words of a command line one by one and walks what each sets.

    Attributes:
        command: The command named, "" before that.
        prints_config: `--print_config` was among the words.
    """

    def __init__(self, parser: ArgumentParser, walk: StrictWalk, argv: Sequence[str]) -> None:
        self.command = ""
        self.prints_config = False
        self._keys = Schema(parser)
        self._walk = walk
        self._words = list(argv)

    def faults(self) -> Iterator[Fault]:
        """Walks everything.

        Raises:
            ConfigError: A config file cannot be read at all.
        """
        while self._words:
            word = self._words.pop(0)
            if word.startswith("--") and " " not in word.partition("=")[0]:
                name, given, value = word.partition("=")
                yield from self._option(name, value if given else None)
            elif _is_short_option(word):
                yield from self._option(word[:2], word[2:].removeprefix("=") or None)
            else:
                yield from self._plain_word(word)

    def _option(self, name: str, value: str | None) -> Iterator[Fault]:
        action = self._keys.option(name)
        if schema.is_print_config_option(action):
            self.prints_config = True
            return
        if action is None and not name.startswith("--"):
            yield Fault(f"{COMMAND_LINE}: {name}: no such option", 0)
            return
        if action is not None and action.nargs == "+":
            self._walk.places[f"{self.command}.{action.dest}"] = HERE.where(action.dest)
            while self._words and not _is_option(self._words[0]):
                self._words.pop(0)  # plain words, which jsonargparse takes as they are
            return
        place = Place(HERE, name[2:], "")
        if value is None and (action is None or action.nargs != 0):
            if not self._words or _is_option(self._words[0]):
                # an unknown name is the greater fault
                yield from self._set(place, "") if action is None else [place.fault("expected a value after it")]
                return
            value = self._words.pop(0)
        if schema.is_config_option(action):
            yield from self._config(value or "")
        elif value is not None:
            yield from self._set(place, value)

    def _set(self, place: Place, value: str) -> Iterator[Fault]:
        key = place.at
        slot = f"{self.command}.{key}" if self.command else key
        yield from self._walk.key(self._keys, key, value, Place(HERE, key, slot.removesuffix("+")))

    def _config(self, value: str) -> Iterator[Fault]:
        if is_config_path(value):
            source = Source(value, read_config_argument(value), Path(value).parent)
            text = Path(value).read_text(encoding="utf-8")
        elif value.lstrip().startswith("{") or "\n" in value:
            source, text = Source(f"{COMMAND_LINE}: --config"), value
        else:
            return  # standard input or a URL: jsonargparse reads and judges it
        try:
            loaded: Any = schema.load_yaml(text)
        except yaml.YAMLError as error:
            yield Fault(f"{source.name}: not valid YAML: {' '.join(str(error).split())}", 0)
            return
        if isinstance(loaded, dict):
            yield from self._walk.keys(self._keys, loaded, Place(source, "", self.command))
        else:
            yield Fault(f"{source.name}: expected keys with values, found {messages.found(loaded)}", 0)

    def _plain_word(self, word: str) -> Iterator[Fault]:
        if word in self._keys.subcommands:
            self._keys, self.command = Schema(self._keys.subcommands[word]), word
        elif self._keys.subcommands:
            near = did_you_mean(nearest(word, self._keys.subcommands))
            yield Fault(f"{COMMAND_LINE}: no command {word!r}{near or _one_of(self._keys.subcommands)}", 0)
            self._words.clear()  # what follows belongs to a command that is not known
        else:
            near = did_you_mean(f"--{key}" for key in self._keys.near("", word.partition("=")[0], ""))
            yield Fault(f"{COMMAND_LINE}: unexpected {word!r}; options begin with --{near}", 0)


def _is_short_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and word[1].isalpha()


def _is_option(word: str) -> bool:
    return _is_short_option(word) or (word.startswith("--") and " " not in word.partition("=")[0])


def _one_of(commands: Sequence[str] | dict[str, Any]) -> str:
    return f"; expected one of {', '.join(commands)}"
