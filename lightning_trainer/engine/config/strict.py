"""A walk over every configured value, against the parser's own types, before jsonargparse parses.

jsonargparse accepts unknown keys without a value, and null in the `init_args` of a class whatever its type; of a value
that fits no member of a union it reports every member. The walk reports one fault per key, with its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_trainer.engine.config import faults, messages, schema
from lightning_trainer.engine.config.classes import ClassNameFault, concrete_base, find_class, is_like_class
from lightning_trainer.engine.config.faults import SPEC_KEYS
from lightning_trainer.engine.config.places import Fault, Place, joined
from lightning_trainer.engine.config.schema import Hint, Schema
from lightning_trainer.engine.config.suggest import nearest
from lightning_trainer.engine.config.values import as_mapping, flat, loaded, nested


@dataclass(frozen=True)
class Target:
    """What takes a value.

    Attributes:
        action: The parser's action for the value, or for the list or mapping it stands in.
        hint: The type of the value itself.
    """

    action: Any
    hint: Hint

    def member(self, hint: Hint) -> Target:
        """The same option, narrowed to one member of its type."""
        return Target(self.action, hint)


@dataclass(frozen=True)
class ChosenClass:
    """The class a slot holds so far, where it was named, and which parameters some source has set."""

    keys: Schema
    given: frozenset[str]
    place: Place


class StrictWalk:
    """Checks sources in the order in which they override each other.

    Attributes:
        places: Slot -> the last place that set it.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser
        self.places: dict[str, str] = {}
        self._classes: dict[str, ChosenClass] = {}
        self._lengths: dict[str, int] = {}
        self._misnamed: set[str] = set()  # slots whose class is not known, so neither are its parameters

    def missing_parameters(self, command: str) -> Iterator[Fault]:
        """Of every class chosen for `command` ("" without commands): parameters with no default that no source set."""
        for slot, chosen in self._classes.items():
            if not command or slot.startswith(f"{command}."):
                for name in sorted(chosen.keys.required - chosen.given):
                    kind = faults.expected_of(chosen.keys, name)
                    yield chosen.place.fault(f"{chosen.keys.owner} needs the parameter {name} ({kind})")

    def keys(self, keys: Schema, values: Mapping[Any, Any], place: Place, prefix: str = "") -> Iterator[Fault]:
        """Walks the keys that stand below `prefix`."""
        for name, value in values.items():
            if not isinstance(name, str):
                yield place.child(str(name)).fault(f"YAML reads this key as {messages.found(name)}; put it in quotes")
            elif name not in ("$schema", "__path__"):
                yield from self.key(keys, joined(prefix, name), value, place.child(name, slot=name.removesuffix("+")))

    def key(self, keys: Schema, key: str, value: Any, place: Place) -> Iterator[Fault]:
        """Walks one dotted key; `place` is the key's own."""
        self.places[place.slot] = place.source.where(place.at)
        bare = key.removesuffix("+")
        leaf = keys.nearest_leaf(bare)
        if bare in keys.links:
            yield place.fault(f"this is computed from {keys.links[bare]}; set that instead")
        elif key in keys.subcommands:
            yield from self._branch(Schema(keys.subcommands[key]), "", value, place)
        elif key in keys.leaves:
            yield from self._leaf(keys, key, value, place)
        elif bare == leaf and schema.list_items(schema.hint_of(keys.leaves[leaf])):
            yield from self._appended(_target(keys, leaf), value, place)
        elif keys.is_branch(key):
            yield from self._branch(keys, key, value, place)
        elif leaf and bare != leaf and _takes_keys(schema.hint_of(keys.leaves[leaf])):
            yield from self._below_leaf(_target(keys, leaf), key[len(leaf) + 1 :], value, place)
        else:
            yield faults.unknown_key(keys, key, place)

    def _branch(self, keys: Schema, key: str, value: Any, place: Place) -> Iterator[Fault]:
        values = as_mapping(value)
        if values is None:
            if not place.names_file(value):
                below = messages.names(keys.children(key))
                yield place.fault(f"expected keys below it ({below}), found {faults.found(value, place)}")
        elif keys.is_fixed_class(key) and "class_path" in values:
            return  # the class of a dataclass spelled out; jsonargparse judges it
        else:
            yield from self.keys(keys, values, place, key)

    def _below_leaf(self, target: Target, rest: str, value: Any, place: Place) -> Iterator[Fault]:
        """`--optimizer.init_args.lr 3`, or `optimizer.lr: 3` in a file: part of a class, a mapping or the last item."""
        slot = place.slot[: -len(rest.removesuffix("+")) - 1]
        above = Place(place.source, place.at[: -len(rest) - 1], slot)
        items = schema.list_items(target.hint)
        if items and (length := self._length(target, above)):
            above = Place(above.source, above.at, f"{slot}.{length - 1}")
            target = target.member(items[0][0])
        yield from self._value(target, nested(rest, value), above)

    def _leaf(self, keys: Schema, key: str, value: Any, place: Place) -> Iterator[Fault]:
        action = keys.leaves[key]
        if schema.is_config_option(action) or schema.is_subcommand(action):
            return
        if value is None:
            self._forget(place.slot)
            good = schema.accepts_null(action, key in keys.required)
        elif schema.hint_of(action) is None:
            good = schema.accepts_untyped(self.parser, action, value)
        else:
            good = True
            if not _is_default(value, action):
                yield from self._value(_target(keys, key), value, place)
        if not good:
            yield place.fault(f"expected {faults.expected_of(keys, key)}, found {faults.found(value, place)}")

    def _appended(self, target: Target, value: Any, place: Place) -> Iterator[Fault]:
        """`callbacks+: [..]`, or one item without the list."""
        several = loaded(value)
        added = several if isinstance(several, list) else [several]
        start = self._length(target, place)
        self._lengths[place.slot] = start + len(added)
        item = target.member(schema.list_items(target.hint)[0][0])
        for index, entry in enumerate(added):
            at = joined(place.at, str(index)) if isinstance(several, list) else place.at
            yield from self._value(item, entry, Place(place.source, at, f"{place.slot}.{start + index}"))

    def _value(self, target: Target, value: Any, place: Place) -> Iterator[Fault]:
        value = vars(value) if isinstance(value, Namespace) else value
        if schema.accepts_anything(target.hint):
            return
        if _is_structured(target.hint) and str not in schema.members(target.hint):
            value = loaded(value)
        if isinstance(value, Mapping):
            yield from self._mapping(target, value, place)
        elif isinstance(value, list | tuple) and schema.list_items(target.hint):
            yield from self._list(target, list(value), place)
        else:
            yield from self._scalar(target, value, place)

    def _scalar(self, target: Target, value: Any, place: Place) -> Iterator[Fault]:
        self._forget_unless_class(target, value, place)
        if self._fits_other_than_class(target, value, place):
            return
        if isinstance(value, str) and self._means_class(target.hint, value):
            yield from self._named_class(target, value, {}, place, place)
        elif not schema.accepts(self.parser, target.hint, value):
            yield faults.mismatch(target.hint, value, place)

    def _means_class(self, hint: Hint, text: str) -> bool:
        """Whether text that is nothing else `hint` takes was meant as a class: `abc` for float or Tensor was not."""
        bases = schema.class_bases(hint)
        only_class = len(bases) > 0 and all(map(schema.class_bases, messages.without_null(hint)))
        return only_class or is_like_class(bases, text)

    def _fits_other_than_class(self, target: Target, value: Any, place: Place) -> bool:
        if schema.takes_file(target.action) and place.names_file(value):
            return True
        others = [member for member in schema.members(target.hint) if not schema.class_bases(member)]
        return any(schema.accepts(self.parser, member, value) for member in others)

    def _list(self, target: Target, values: list[Any], place: Place) -> Iterator[Fault]:
        self._forget(place.slot)
        items = schema.list_items(target.hint)[0]
        if schema.is_fixed_length(target.hint, items) and len(items) != len(values):
            yield faults.mismatch(target.hint, values, place)
            return
        self._lengths[place.slot] = len(values)
        for index, value in enumerate(values):
            item = target.member(items[index] if len(items) > 1 else items[0])
            yield from self._value(item, value, place.child(str(index)))

    def _length(self, target: Target, place: Place) -> int:
        """How many items the list at `place` has so far; before any source sets it, those it has by default."""
        if place.slot not in self._lengths:
            defaults = schema.default_items(target.action)
            self._lengths[place.slot] = len(defaults)
            for index, (path, given) in enumerate(defaults):
                item = Place(place.source, place.at, f"{place.slot}.{index}")
                chosen = self._chosen(target, (path, given), item)
                if chosen is not None:
                    self._classes[item.slot] = chosen
        return self._lengths[place.slot]

    def _mapping(self, target: Target, values: Mapping[str, Any], place: Place) -> Iterator[Fault]:
        bases, value_types = schema.class_bases(target.hint), schema.mapping_values(target.hint)
        as_entries: list[Fault] = []
        as_class: list[Fault] = []
        if value_types and "class_path" not in values:
            as_entries = list(self._mapping_values(target.member(value_types[0]), values, place))
            if not as_entries:
                return
        if bases:
            as_class = list(self._class(target, values, place))
            if not as_class:
                return
        if as_entries or as_class:
            yield from max(as_entries, as_class, key=_depth)
        elif not schema.accepts(self.parser, target.hint, dict(values)):
            yield faults.mismatch(target.hint, values, place)

    def _mapping_values(self, value_type: Target, values: Mapping[str, Any], place: Place) -> Iterator[Fault]:
        for name, value in values.items():
            yield from self._value(value_type, value, place.child(str(name)))

    def _class(self, target: Target, spec: Mapping[str, Any], place: Place) -> Iterator[Fault]:
        """`{class_path, init_args}`, or the parameters of a class that is known without being named."""
        explicit = any(key in spec for key in SPEC_KEYS)
        inner = place.child("init_args", slot="") if explicit else place
        init_args = as_mapping(spec.get("init_args", {}) if explicit else spec)
        if init_args is None:
            yield inner.fault(f"expected the parameters of the class, found {faults.found(spec['init_args'], place)}")
        elif "class_path" in spec:
            named = place.child("class_path", slot="")
            yield from self._named_class(target, spec["class_path"], init_args, inner, named)
        else:
            yield from self._known_class(target, init_args, inner)
        if explicit:
            yield from self._stray_keys(spec, place)

    def _named_class(
        self, target: Target, name: Any, init_args: Mapping[str, Any], inner: Place, named: Place
    ) -> Iterator[Fault]:
        if not isinstance(name, str):
            yield named.fault(f"expected the name of a class, found {faults.found(name, named)}")
            return
        try:
            cls = find_class(schema.class_bases(target.hint), name)
        except ClassNameFault as fault:
            self._misnamed.add(inner.slot)
            yield named.fault(str(fault))
            return
        before = self._classes.get(inner.slot)
        self._forget(inner.slot)
        if cls is not None:
            keys = schema.class_schema(self.parser, target.action, target.hint, cls)
            kept = before.given & keys.parameters() if before else frozenset()
            yield from self._parameters(ChosenClass(keys, kept, named), init_args, inner)

    def _known_class(self, target: Target, init_args: Mapping[str, Any], inner: Place) -> Iterator[Fault]:
        if inner.slot in self._misnamed:
            return
        default = schema.default_class(target.action)
        chosen = self._classes.get(inner.slot) or self._chosen(target, default or ("", {}), inner)
        if chosen is None:
            misspelt = nearest("class_path", map(str, init_args))
            ending = f"; did you mean class_path instead of {misspelt[0]}?" if misspelt else ""
            yield inner.fault(f"class_path is missing; expected {messages.expected(target.hint)}{ending}")
        else:
            yield from self._parameters(chosen, init_args, inner)

    def _chosen(self, target: Target, default: schema.ClassSpec, place: Place) -> ChosenClass | None:
        """The class that is configured where no source names one: the default, or the type itself."""
        path, given = default
        bases = schema.class_bases(target.hint) or schema.class_bases(schema.list_items(target.hint)[0][0])
        try:
            cls = find_class(bases, path) if path else concrete_base(bases)
        except ClassNameFault:
            return None  # the default is of another type, such as `auto`
        if cls is None:
            return None
        keys = schema.class_schema(self.parser, target.action, target.hint, cls)
        return ChosenClass(keys, frozenset(flat(given)), place)

    def _parameters(self, chosen: ChosenClass, init_args: Mapping[str, Any], inner: Place) -> Iterator[Fault]:
        given = chosen.given | frozenset(flat(init_args))
        self._classes[inner.slot] = ChosenClass(chosen.keys, given, chosen.place)
        yield from self.keys(chosen.keys, init_args, inner)

    def _stray_keys(self, spec: Mapping[str, Any], place: Place) -> Iterator[Fault]:
        chosen = self._classes.get(place.slot)
        for name in spec:
            if name not in (*SPEC_KEYS, "__path__"):
                yield faults.stray_key(str(name), chosen.keys if chosen else None, place)

    def _forget_unless_class(self, target: Target, value: Any, place: Place) -> None:
        if not (isinstance(value, str) and schema.class_bases(target.hint)):
            self._forget(place.slot)

    def _forget(self, slot: str) -> None:
        """Drops what earlier sources put at and below `slot`: a new value replaces it."""
        below = f"{slot}."
        self._classes = {key: kept for key, kept in self._classes.items() if key != slot and not key.startswith(below)}
        self._lengths = {key: kept for key, kept in self._lengths.items() if not key.startswith(below)}
        self._misnamed.discard(slot)
        self._lengths[slot] = 0  # known, so that the items of the default list do not count


def _target(keys: Schema, leaf: str) -> Target:
    return Target(keys.leaves[leaf], schema.hint_of(keys.leaves[leaf]))


def _is_structured(hint: Hint) -> bool:
    return _takes_keys(hint) or bool(schema.list_items(hint))


def _takes_keys(hint: Hint) -> bool:
    if hint is None:
        return False
    items = [item for types in schema.list_items(hint) for item in types]
    return bool(schema.class_bases(hint) or schema.mapping_values(hint)) or any(map(_takes_keys, items))


def _is_default(value: Any, action: Any) -> bool:
    return isinstance(value, str | int | float) and type(value) is type(action.default) and value == action.default


def _depth(found: list[Fault]) -> int:
    """How far the walk got; of two readings of a value, the deeper one is what was meant."""
    return max((fault.depth for fault in found), default=-1)
