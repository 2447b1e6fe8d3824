"""The faults the walk finds, in words."""

from __future__ import annotations

from typing import Any

import yaml

from lightning_trainer.engine.config import messages, schema
from lightning_trainer.engine.config.places import Fault, Place, joined
from lightning_trainer.engine.config.schema import Hint, Schema
from lightning_trainer.engine.config.suggest import did_you_mean, nearest

SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
"""The keys that name a class and its parameters."""


def unknown_key(keys: Schema, key: str, place: Place) -> Fault:
    """`key`, which stands at `place`, is none of `keys`."""
    head, _, name = key.rpartition(".")
    while head and not keys.is_branch(head):  # the outermost unknown name is the misspelt one
        head, _, name = head.rpartition(".")
    above = place.at[: len(place.at) - len(key)]  # what stands above the schema's own keys
    below = key[len(joined(head, name)) :]
    near = keys.near(head, name, below, SPEC_KEYS if keys.owner and not above.endswith("init_args.") else ())
    kind = "no such option" if place.source.is_command_line else "no such key"
    kind = f"{keys.owner} has no parameter {name!r}" if keys.owner else kind
    ending = did_you_mean(place.spelled(above + found) for found in near)
    return place.fault(kind + (ending or f"; valid here: {messages.names(keys.children(head)) or 'none'}"))


def stray_key(name: str, parameters: Schema | None, place: Place) -> Fault:
    """`name` stands beside class_path; `parameters` are those of the class, where it is known."""
    inside = parameters is not None and name in parameters.children("")
    proposals = [f"init_args.{name}"] if inside else nearest(name, SPEC_KEYS)
    ending = did_you_mean(proposals) or f"; valid here: {', '.join(SPEC_KEYS)}"
    return place.child(name).fault(f"no such key{ending}")


def mismatch(hint: Hint, value: Any, place: Place) -> Fault:
    """`value` is of another type than `hint`."""
    advice = messages.quoting_advice(hint, value)
    if isinstance(value, str):
        advice = did_you_mean(nearest(value, map(str, messages.choices(hint))))
    return place.fault(f"expected {messages.expected(hint)}, found {found(value, place)}{advice}")


def expected_of(keys: Schema, key: str) -> str:
    """What `key` takes, in words."""
    action = keys.leaves.get(key)
    hint = schema.hint_of(action) if action is not None else None
    if hint is not None:
        return messages.expected(hint)
    return messages.names(map(str, action.choices)) if action is not None and action.choices else "a value"


def found(value: Any, place: Place) -> str:
    """`value` in words; on the command line all is text, so there it is what the text reads as."""
    if place.source.is_command_line and isinstance(value, str):
        try:
            return messages.found(schema.load_yaml(value))
        except yaml.YAMLError:
            pass  # text that is no YAML is text
    return messages.found(value)
