"""Objects that the configuration names: which of them refused its arguments, and under which key it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from lightning_trainer.types import InputError


class Construction:
    """Builds objects, and remembers the last that refused its arguments.

    jsonargparse builds an object while it tries the types a key may have, and words a refusal as a fault of them all.
    """

    def __init__(self) -> None:
        self._refused: tuple[type, ValueError] | None = None

    def build(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        """An instantiator, as jsonargparse takes them."""
        try:
            return class_type(*args, **kwargs)
        except ValueError as error:
            self._refused = class_type, error
            raise

    def refusal(self, error: ValueError, config: Namespace, command: str) -> InputError | None:
        """What the class itself said, where `error` comes of that.

        Args:
            error: What jsonargparse says.
            config: All of it.
            command: Under which the keys stand.
        """
        if self._refused is None:
            return None
        class_type, reason = self._refused
        first, *_ = str(reason).splitlines() or [""]
        if not first or first not in str(error):
            return None
        key = getattr(reason, "key", None) or _key_of(class_type, config.get(command))
        name = class_type.__name__
        return InputError(str(reason) if name in str(reason) else f"{name}: {reason}", key=key)


def _key_of(class_type: type, config: Any) -> str | None:
    named = (key for key, name in _class_paths(config) if name.rpartition(".")[2] == class_type.__name__)
    return next(named, None)


def _class_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key of the object, its class path); objects in a list stand under the list's key."""
    if isinstance(value, Namespace | dict):
        for name, item in vars(value).items() if isinstance(value, Namespace) else value.items():
            if name == "class_path":
                yield key, str(item)
            else:
                yield from _class_paths(item, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item, key)
