"""Values as the sources write them: mappings as text, dotted keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_trainer.engine.config import schema


def loaded(value: Any) -> Any:
    """A list or mapping that is written as text, as on the command line; anything else as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith(("[", "{"))):
        return value
    try:
        return schema.load_yaml(value)
    except yaml.YAMLError:
        return value


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """`value` as a mapping, None where it is none."""
    opened = vars(value) if isinstance(value, Namespace) else loaded(value)
    return opened if isinstance(opened, Mapping) else None


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"init_args": {"lr": 3}}` for `init_args.lr` and 3."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def flat(values: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of `values`, inner ones after the key they are in."""
    for name, value in values.items():
        yield str(name)
        if isinstance(value, Mapping):
            yield from (f"{name}.{below}" for below in flat(value))
