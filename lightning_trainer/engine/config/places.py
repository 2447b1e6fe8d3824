"""Where a value was set, and the line that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_trainer.engine.config.config_file import COMMAND_LINE, Position

LONGEST_PATH = 255


@dataclass(frozen=True)
class Source:
    """One file, the command line, or one Python mapping.

    Attributes:
        name: Said where no position is known.
        positions: Dotted key -> place; empty for what is no file.
        folder: Relative paths in the source start here.
    """

    name: str
    positions: Mapping[str, Position] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def is_command_line(self) -> bool:
        """Whether it is the command line rather than a file."""
        return self.name == COMMAND_LINE

    def where(self, key: str) -> str:
        """Place of `key`, or of the nearest key above it that has one."""
        while key and key not in self.positions:
            key = key.rpartition(".")[0]
        return str(self.positions[key]) if key else self.name


@dataclass(frozen=True)
class Fault:
    """A line for the user; `depth` tells how many keys deep it stands."""

    text: str
    depth: int


@dataclass(frozen=True)
class Place:
    """Where the walk stands.

    Attributes:
        at: The key as the source writes it.
        slot: The key it sets, over all sources and without `init_args`: `fit.trainer.callbacks.1` for the item that
            `callbacks+` appends to a list of one.
    """

    source: Source
    at: str = ""
    slot: str = ""

    def child(self, name: str, slot: str | None = None) -> Place:
        """The place of `name` below this one; `slot` where it is not `name`, empty where it stays the same."""
        return Place(self.source, joined(self.at, name), joined(self.slot, name if slot is None else slot))

    def spelled(self, key: str) -> str:
        """`key` as the user writes it in this source."""
        return f"--{key}" if self.source.is_command_line else key

    def fault(self, problem: str) -> Fault:
        """A fault found here."""
        return Fault(f"{self.source.where(self.at)}: {self.spelled(self.at)}: {problem}", self.at.count("."))

    def names_file(self, value: object) -> bool:
        """Whether `value` is the path of a file, as seen from the source."""
        looks_like_path = isinstance(value, str) and "\n" not in value and len(value) < LONGEST_PATH
        return looks_like_path and (self.source.folder / str(value)).is_file()


def joined(key: str, name: str) -> str:
    """The dotted key of `name` below `key`; either may be empty."""
    return f"{key}.{name}" if key and name else key or name
