"""Profiles: how a row becomes a conversation, and which logits rules and which check go with it.

A profile that ships with the package is one file here and one entry in `PROFILES`. One of your own needs neither:
name it in the YAML by `class_path`.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from lightning_trainer.profiles.base import DataProfile
from lightning_trainer.profiles.emoji_think import EmojiThink
from lightning_trainer.profiles.plain import Plain
from lightning_trainer.profiles.regime3 import Regime3
from lightning_trainer.types import InputError

__all__ = ["PROFILES", "DataProfile", "EmojiThink", "Plain", "Regime3", "get_profile", "profile_class"]

PROFILES: tuple[type[DataProfile], ...] = (Plain, EmojiThink, Regime3)


def get_profile(name: str, **options: Any) -> DataProfile:
    """The profile of that name.

    Args:
        name: A profile's name (`emoji_think`) or class name (`EmojiThink`).
        **options: Arguments of its constructor.

    Raises:
        InputError: No profile has that name, or it has no such option, or the option's value is not allowed.
    """
    cls = profile_class(name)
    _check_options(cls, options)
    return cls(**options)


def profile_class(name: str) -> type[DataProfile]:
    """The profile's class, by its name or class name.

    Raises:
        InputError: No profile has that name.
    """
    by_name = {known: cls for cls in PROFILES for known in (cls.name, cls.__name__)}
    if name not in by_name:
        raise InputError(
            f"unknown profile {name!r}{_nearest(name, list(by_name))}; "
            f"known profiles: {', '.join(cls.name for cls in PROFILES)}"
        )
    return by_name[name]


def _check_options(cls: type[DataProfile], options: dict[str, Any]) -> None:
    known = [] if cls.__init__ is object.__init__ else list(inspect.signature(cls).parameters)
    for option in options:
        if option not in known:
            raise InputError(
                f"profile {cls.name!r} has no option {option!r}{_nearest(option, known)}; "
                f"its options: {', '.join(known) or 'none'}"
            )


def _nearest(name: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
