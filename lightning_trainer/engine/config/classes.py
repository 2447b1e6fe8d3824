"""From the name of a class in a config to the class, or to a message with the nearest name."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from lightning_trainer.engine.config import messages, schema
from lightning_trainer.engine.config.suggest import did_you_mean, nearest


class ClassNameFault(Exception):
    """The name leads to no class that fits; `str()` says why."""


def find_class(bases: tuple[type, ...], name: str) -> type | None:
    """The class that a short or dotted name stands for.

    Returns:
        None for a function or an object, which jsonargparse judges itself.

    Raises:
        ClassNameFault: No such class, several of that name, or one of another kind.
    """
    try:
        named = schema.import_class(bases, name)
    except ValueError as error:
        raise ClassNameFault(_unknown_short_name(bases, name, str(error))) from error
    except (ImportError, AttributeError) as error:
        raise ClassNameFault(_unknown_dotted_name(bases, name, error)) from error
    if not inspect.isclass(named) or any(getattr(base, "_is_protocol", False) for base in bases):
        return None
    if not issubclass(named, bases):
        raise ClassNameFault(f"{name} is not {_article(bases)}{did_you_mean(_near_short_names(bases, name))}")
    if inspect.isabstract(named):
        concrete = messages.names(_short(path) for path in schema.class_names((named,)))
        raise ClassNameFault(f"{name} is abstract; name one of its subclasses: {concrete}")
    return named


def concrete_base(bases: tuple[type, ...]) -> type | None:
    """The base that jsonargparse assumes where no class is named."""
    return next((base for base in bases if not inspect.isabstract(base)), None)


def is_like_class(bases: tuple[type, ...], name: str) -> bool:
    """Whether `name` is, or nearly is, the name of a class that `bases` take."""
    return bool(_near_short_names(bases, name)) or ("." in name and name.replace(".", "").isidentifier())


def _unknown_short_name(bases: tuple[type, ...], name: str, reason: str) -> str:
    same = [path for path in schema.class_names(bases) if _short(path) == name]
    if len(same) > 1:
        return f"several classes are called {name}; give one of {', '.join(same)}"
    if "denied" in reason or "not allowed" in reason:
        return reason
    near = _near_short_names(bases, name)
    known = "" if near else f"; known: {messages.names(map(_short, schema.class_names(bases)))}"
    outside = "" if near else "; a class of your own is named with its module: my_module.MyClass"
    return f"no class {name!r}, expected {_article(bases)}{did_you_mean(near)}{known}{outside}"


def _unknown_dotted_name(bases: tuple[type, ...], name: str, error: Exception) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if isinstance(error, ImportError) and not (missing and f"{name}.".startswith(f"{missing}.")):
        return f"cannot import {name}: {error}"
    module_name, _, short = name.rpartition(".")
    in_module = _classes_in(sys.modules.get(module_name), bases)
    near = [f"{module_name}.{found}" for found in nearest(short, in_module)]
    near = near or nearest(name, schema.class_names(bases)) or _near_short_names(bases, short)
    lacking = f"{module_name} has no {short!r}" if module_name in sys.modules else f"no module {missing or module_name}"
    return f"no class {name!r} ({lacking}), expected {_article(bases)}{did_you_mean(near)}"


def _near_short_names(bases: tuple[type, ...], name: str) -> list[str]:
    return nearest(_short(name), (_short(path) for path in schema.class_names(bases)))


def _classes_in(module: Any, bases: tuple[type, ...]) -> list[str]:
    found = vars(module).items() if module is not None else ()
    return [name for name, value in found if inspect.isclass(value) and issubclass(value, bases)]


def _article(bases: tuple[type, ...]) -> str:
    return messages.with_article(" or ".join(base.__name__ for base in bases))


def _short(path: str) -> str:
    return path.rpartition(".")[2]
