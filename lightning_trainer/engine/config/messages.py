"""Types, values and jsonargparse's messages in words a person can act on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, get_args

from lightning_trainer.engine.config import schema
from lightning_trainer.engine.config.config_file import COMMAND_LINE

LONGEST_VALUE = 60
MOST_NAMES = 12

Where = Callable[[str], str]
"""Place that set a dotted key: `run.yaml:3:5`, or the command line."""


def expected(hint: schema.Hint) -> str:
    """A type hint in words: `int`, `float or null`, `one of: drop, truncate, raise`, `list of str`."""
    allowed = [str(choice) for choice in choices(hint)]
    others = [member for member in without_null(hint) if not choices(member)]
    words = [f"one of: {', '.join(dict.fromkeys(allowed))}"] if allowed else []
    ending = ["null"] if schema.hint_accepts_null(hint) else []
    return " or ".join(dict.fromkeys([*words, *map(_word, others), *ending]))


def found(value: Any) -> str:
    """A value with its type: `'abc' (str)`, `null`, `a list of 3`."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {names(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{_shortened(text)} ({type(value).__name__})"


def names(listed: Iterable[str]) -> str:
    """The first dozen names, with commas."""
    every = list(listed)
    return ", ".join(every[:MOST_NAMES]) + (", …" if len(every) > MOST_NAMES else "")


def without_null(hint: schema.Hint) -> list[schema.Hint]:
    """The members of a union but None."""
    return [member for member in schema.members(hint) if member is not type(None)]


def quoting_advice(hint: schema.Hint, value: Any) -> str:
    """What to do about text that YAML read as something else."""
    takes_text = str in schema.members(hint) or any(isinstance(choice, str) for choice in choices(hint))
    if isinstance(value, bool) and takes_text:
        return "; YAML reads on, off, yes and no as true and false: put the text in quotes"
    if isinstance(value, int | float) and takes_text:
        return f"; put text in quotes: '{value}'"
    return ""


def choices(hint: schema.Hint) -> list[Any]:
    """The values a Literal or an Enum allows."""
    found_choices: list[Any] = []
    for member in schema.members(hint):
        if schema.is_literal(member):
            found_choices += get_args(member)
        elif isinstance(member, type) and issubclass(member, Enum):
            found_choices += list(member.__members__)
    return found_choices


def with_article(name: str) -> str:
    """`name` behind "a" or "an"."""
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _word(member: schema.Hint) -> str:
    if items := schema.list_items(member):
        return _list_word(member, items[0])
    if values := schema.mapping_values(member):
        return "mapping" if schema.accepts_anything(values[0]) else f"mapping to {expected(values[0])}"
    if bases := schema.class_bases(member):
        return with_article(" or ".join(base.__name__ for base in bases))
    return str(getattr(member, "__name__", member))


def _list_word(member: schema.Hint, items: tuple[schema.Hint, ...]) -> str:
    if schema.is_fixed_length(member, items):
        return f"list of {len(items)} ({', '.join(expected(item) for item in items)})"
    return "list" if schema.accepts_anything(items[0]) else f"list of {expected(items[0])}"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def reworded(message: str, where: Where, commands: Iterable[str]) -> list[str]:
    """jsonargparse's message as lines with a place: what the strict walk lets through for jsonargparse to judge.

    Args:
        message: As `ArgumentParser.error` receives it.
        where: Finds the place that set a key.
        commands: `fit`, `validate`, …; keys carry them as prefix.
    """
    without_command = re.compile(rf"\b(?:{'|'.join(map(re.escape, commands)) or '(?!)'})\.(?=\w)")
    if match := re.match(r"the following arguments are required: (.*)", message):
        return [_missing(without_command.sub("", key)) for key in match[1].split(", ")]
    if match := re.match(r'expected "\w+" to be one of \{(.*)\}, but it was not provided', message):
        return [f"{COMMAND_LINE}: no command given; expected one of {match[1].replace(',', ', ')}"]
    if match := re.search(r"Unexpected config: (\S+):\s*$", message):
        return [f"{where(match[1])}: {match[1]}: expected a value, found nothing; write '{match[1]}: null' for none"]
    if match := re.match(r"argument (--\S+?): expected one argument", message):
        return [f"{COMMAND_LINE}: {match[1]}: expected a value; write one that begins with '-' as {match[1]}=-VALUE"]
    if match := re.match(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)', message, re.DOTALL):
        return [f"{where(match[1])}: {without_command.sub('', match[1])}: {_cause(match[2])}"]
    return [f"{COMMAND_LINE}: {_cause(message)}"]


def _missing(key: str) -> str:
    return f"{COMMAND_LINE}: {key}: required, and nothing sets it; give it in a config file or as --{key} VALUE"


def _cause(text: str) -> str:
    """The deepest reason of a nested message: the others only repeat that no other type fitted either."""
    lines = [line for line in text.splitlines() if line.strip() and not _is_frame(line.strip())]
    if not lines:
        return text.strip()
    deepest = max(lines, key=lambda line: len(line) - len(line.lstrip(" -")))
    return re.sub(r"^(- )+", "", deepest.strip()).replace("<class '", "").replace("'>", "")


def _is_frame(line: str) -> bool:
    """Whether jsonargparse only says here what it was doing."""
    line = re.sub(r"^(- )+", "", line)
    frames = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Subclass types expect", "Problem with given")
    return line.startswith(frames) or re.fullmatch(r'Parser key "[^"]+"( element \d+)?:', line) is not None
