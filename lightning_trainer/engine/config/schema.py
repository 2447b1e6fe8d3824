"""What a jsonargparse parser accepts, read from the parser itself. All use of jsonargparse's private API is here.

A `Schema` answers for the keys of one parser: a command's, or the one jsonargparse makes from the constructor of a
class named by `class_path`. The functions answer for one type hint. Verified against jsonargparse 4.53.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import (
    ActionConfigFile,
    _ActionConfigLoad,
    _ActionHelpClassPath,
    _ActionPrintConfig,
    filter_non_parsing_actions,
)
from jsonargparse._common import get_unaliased_type, is_subclasses_disabled, parser_context
from jsonargparse._link_arguments import ActionLink
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._paths import Path as CheckedPath
from jsonargparse._required import iter_required_keys
from jsonargparse._subcommands import ActionSubCommands
from jsonargparse._typehints import (
    ActionTypeHint,
    accepts_any_value,
    adapt_partial_callable_class,
    adapt_typehints,
    get_all_subclass_paths,
    get_callable_return_type,
    get_subclass_or_closed_types,
    is_typed_dict,
    mapping_origin_types,
    resolve_class_path_by_name,
    sequence_origin_types,
    tuple_set_origin_types,
)
from jsonargparse._util import get_typehint_origin, import_object

from lightning_trainer.engine.config.suggest import nearest

Hint = Any
"""A type hint: a class, a union, a generic alias, …"""

ClassSpec = tuple[str, Mapping[str, Any]]
"""Name and init_args of a class."""

LEAST_LIKENESS_ELSEWHERE = 0.8
"""Stricter than for names at the same level: among hundreds of keys something is always a little alike."""

_REFUSALS = (TypeError, ValueError, KeyError, AttributeError, ImportError, ArgumentError)
"""What jsonargparse raises on a value it does not take."""


class Schema:
    """The keys of one parser.

    Attributes:
        owner: Name of the class whose constructor the keys are parameters of; empty for a command.
        leaves: Keys that hold a value.
        subcommands: Keys that hold the configuration of a command.
        links: Keys that are computed from other keys, with those.
    """

    def __init__(self, parser: ArgumentParser, owner: str = "") -> None:
        self.parser = parser
        self.owner = owner
        self.leaves: dict[str, Action] = {}
        self.subcommands: dict[str, ArgumentParser] = {}
        self.links: dict[str, str] = {}
        self._groups: dict[str, Action] = {}  # keys that also take the path of a file with the keys below them
        for action in filter_non_parsing_actions(parser._actions):
            self._add(action)
        for group_action in getattr(getattr(parser, "_links_group", None), "_group_actions", ()):
            self._add(group_action)
        self.required = frozenset(iter_required_keys(parser))

    def _add(self, action: Action) -> None:
        if isinstance(action, ActionLink):
            self.links[action.target[0]] = ", ".join(source for source, _ in action.source)
        elif isinstance(action, ActionSubCommands):
            self.subcommands.update(action._name_parser_map)
            self.leaves[action.dest] = action
        elif isinstance(action, _ActionConfigLoad):
            self._groups[action.dest] = action
        else:
            self.leaves[action.dest] = action

    @property
    def command(self) -> str | None:
        """Key of the command's name, None where there are no commands."""
        action = self.parser._subcommands_action
        return None if action is None else str(action.dest)

    def children(self, prefix: str) -> list[str]:
        """Names one level below `prefix` ("" for the top), in the order of the constructor."""
        start = f"{prefix}." if prefix else ""
        keys = [*self.leaves, *self._groups, *self.subcommands]
        names = dict.fromkeys(key[len(start) :].split(".")[0] for key in keys if key.startswith(start))
        hidden = {key for key, action in self.leaves.items() if isinstance(action, ActionConfigFile)}
        return [name for name in names if name and start + name not in hidden]

    def is_branch(self, key: str) -> bool:
        """Whether keys, not a value, stand below `key`."""
        return key in self._groups or any(leaf.startswith(f"{key}.") for leaf in self.leaves)

    def nearest_leaf(self, key: str) -> str | None:
        """The longest beginning of `key` that holds a value: `optimizer` for `optimizer.init_args.lr`."""
        parts = key.split(".")
        beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((beginning for beginning in beginnings if beginning in self.leaves), None)

    def parameters(self) -> frozenset[str]:
        """Every key that holds a value."""
        return frozenset(self.leaves)

    def is_fixed_class(self, key: str) -> bool:
        """Whether the keys below `key` are those of a dataclass, which may also be written with a class_path."""
        return is_subclasses_disabled(getattr(self._groups.get(key), "basetype", None))

    def near(self, head: str, name: str, below: str, others: Iterable[str] = ()) -> list[str]:
        """Valid keys for an unknown `name` below `head`: the like-named there, then the same name elsewhere.

        Args:
            head: A key above that does exist, or "".
            name: The unknown name.
            below: What follows the name: ".lr" for `optmizer.lr`.
            others: Further names that are valid at this level.
        """
        siblings = [_dotted(head, near) for near in nearest(name, [*self.children(head), *others])]
        found = [key + below if key + below in self.leaves else key for key in siblings]
        elsewhere = self._ending_in([(name + below).rpartition(".")[2]])
        if not found and not elsewhere:
            ends = [leaf.rpartition(".")[2] for leaf in self.leaves]
            elsewhere = self._ending_in(nearest(name, ends, least=LEAST_LIKENESS_ELSEWHERE))
        return list(dict.fromkeys([*found, *elsewhere]))[:2]

    def _ending_in(self, names: list[str]) -> list[str]:
        return [leaf for leaf in self.leaves if leaf.rpartition(".")[2] in names]

    def option(self, name: str) -> Action | None:
        """The action of a command-line option, `--config` or `-c`."""
        return self.parser._option_string_actions.get(name)


def is_config_option(action: Action | None) -> bool:
    """Whether the option takes a config file."""
    return isinstance(action, ActionConfigFile)


def is_help_option(action: Action | None) -> bool:
    """Whether the option prints help."""
    return isinstance(action, _ActionHelpClassPath) or (action is not None and action.dest == "help")


def is_print_config_option(action: Action | None) -> bool:
    """Whether the option prints the configuration."""
    return isinstance(action, _ActionPrintConfig)


def is_subcommand(action: Action) -> bool:
    """Whether the action holds the commands."""
    return isinstance(action, ActionSubCommands)


def load_yaml(text: str) -> Any:
    """What jsonargparse reads: 1e-4 is a number, dates stay text.

    Raises:
        yaml.YAMLError: `text` is no YAML.
    """
    return yaml.load(text, Loader=get_yaml_default_loader())


def hint_of(action: Action) -> Hint | None:
    """The type hint of an action; None for the few that have none."""
    return action._typehint if isinstance(action, ActionTypeHint) else None


def members(hint: Hint) -> list[Hint]:
    """The members of a union; anything else is its own only member."""
    hint = get_unaliased_type(hint)
    if str(get_typehint_origin(hint)) == "typing.Union":
        return [inner for member in get_args(hint) for inner in members(member)]
    return [hint]


def is_literal(hint: Hint) -> bool:
    """Whether the type is a choice of values."""
    return get_typehint_origin(hint) is Literal


def accepts_anything(hint: Hint) -> bool:
    """Whether any value will do."""
    return any(accepts_any_value(member) for member in members(hint))


def accepts_null(action: Action, required: bool) -> bool:
    """Whether null may be given for the option."""
    hint = hint_of(action)
    if hint is None or (action.default is None and not required):
        return True
    return accepts_anything(hint) or NoneType in members(hint)


def hint_accepts_null(hint: Hint) -> bool:
    """Whether null is of this type."""
    return accepts_anything(hint) or NoneType in members(hint)


def class_bases(hint: Hint) -> tuple[type, ...]:
    """The classes of which `hint` takes an instance or, for a callable that makes one, a constructor."""
    found = (get_subclass_or_closed_types(member, callable_return=True) or () for member in members(hint))
    return tuple(dict.fromkeys(base for bases in found for base in bases))


def list_items(hint: Hint) -> list[tuple[Hint, ...]]:
    """For each list type in `hint`: (item type,) for any length, or one type for each item of a tuple."""
    found: list[tuple[Hint, ...]] = []
    for member in members(hint):
        origin = get_typehint_origin(member) or member
        args = get_args(member)
        if origin in sequence_origin_types or (origin in tuple_set_origin_types and origin is not tuple):
            found.append((args[0] if args else Any,))
        elif origin is tuple:
            found.append((args[0] if args else Any,) if not args or args[-1] is Ellipsis else args)
    return found


def is_fixed_length(hint: Hint, items: tuple[Hint, ...]) -> bool:
    """Whether the type is a tuple of just these items."""
    return any(get_typehint_origin(member) is tuple and get_args(member) == items for member in members(hint))


def mapping_values(hint: Hint) -> list[Hint]:
    """For each mapping type in `hint`, the type of its values."""
    found = []
    for member in members(hint):
        origin = get_typehint_origin(member) or member
        if origin in mapping_origin_types and not is_typed_dict(member):
            args = get_args(member)
            found.append(args[1] if len(args) == 2 else Any)
    return found


def accepts(parser: ArgumentParser, hint: Hint, value: Any) -> bool:
    """Whether jsonargparse takes `value` for `hint`."""
    if any(inspect.isclass(member) and issubclass(member, CheckedPath) for member in members(hint)):
        return True  # such a path is relative to the file it stands in; jsonargparse looks there
    with parser_context(parent_parser=parser, load_value_mode="yaml", lenient_check=True):
        try:
            adapt_typehints(value, hint)
        except _REFUSALS:
            return False
    return True


def accepts_untyped(parser: ArgumentParser, action: Action, value: Any) -> bool:
    """As `accepts`, for an action without a type hint."""
    try:
        parser._check_value_key(action, value, action.dest, Namespace())
    except _REFUSALS:
        return False
    return True


def class_names(bases: tuple[type, ...]) -> list[str]:
    """Dotted paths of the imported, concrete classes that `bases` take."""
    return [path for base in bases for path in get_all_subclass_paths(base)]


def import_class(bases: tuple[type, ...], name: str) -> Any:
    """What a short or dotted name stands for.

    Raises:
        ValueError: Several classes have that short name, or no class has it, or the name is no dotted path.
        ImportError, AttributeError: The dotted path leads nowhere.
    """
    return import_object(resolve_class_path_by_name(bases, name))  # type: ignore[arg-type]  # takes any length


def default_class(action: Action | None) -> ClassSpec | None:
    """The class an action has by default."""
    return _class_spec(getattr(action, "default", None))


def default_items(action: Action | None) -> list[ClassSpec]:
    """The classes in the list an action has by default; ("", {}) for what is no class."""
    default = getattr(action, "default", None)
    return [_class_spec(item) or ("", {}) for item in default] if isinstance(default, list) else []


def _class_spec(spec: Any) -> ClassSpec | None:
    spec = vars(spec) if isinstance(spec, Namespace) else spec
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("class_path"), str):
        init_args = spec.get("init_args") or {}
        return spec["class_path"], vars(init_args) if isinstance(init_args, Namespace) else init_args
    return None


def class_schema(parser: ArgumentParser, action: Action | None, hint: Hint, cls: type) -> Schema:
    """The parameters of a class, **kwargs that go to a parent resolved, those that the caller passes left out."""
    with parser_context(parent_parser=parser, load_value_mode="yaml"):
        skip = next((skip for member in members(hint) if (skip := _passed_by_caller(member, cls)) is not None), None)
        inner = ActionTypeHint.get_class_parser(cls, getattr(action, "sub_add_kwargs", None), skip)
    return Schema(inner, owner=cls.__name__)


def _passed_by_caller(member: Hint, cls: type) -> set[int | str] | None:
    """How many positional arguments, or which, a factory's caller passes; None where `member` is no factory of cls."""
    made = get_callable_return_type(member)
    if made is None or not issubclass(cls, class_bases(made) or ()):
        return None
    _, skip = adapt_partial_callable_class(member, Namespace(class_path=f"{cls.__module__}.{cls.__qualname__}"))
    return skip  # type: ignore[no-any-return]


def takes_file(action: Action | None) -> bool:
    """Whether the value may be the path of a file that holds it."""
    return bool(getattr(action, "_enable_path", False))


def _dotted(head: str, name: str) -> str:
    return f"{head}.{name}" if head else name
