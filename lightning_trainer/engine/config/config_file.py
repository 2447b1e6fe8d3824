"""Configuration files as text: where each key stands, and the faults YAML readers do not report.

Imports neither torch nor jsonargparse, so that a missing or broken file is answered before they load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_trainer.engine.config.suggest import did_you_mean, nearest

COMMAND_LINE = "command line"
MERGE_TAG = "tag:yaml.org,2002:merge"


class ConfigError(Exception):
    """The configuration is wrong; `str()` is what the user reads. `main` exits with status 2.

    Args:
        lines: One line per fault.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Position:
    """A place in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


def read_positions(path: str | Path) -> dict[str, Position]:
    """Where each key of the YAML file stands, by dotted key.

    List items are numbered: `trainer.callbacks.0.init_args.every`. A key that comes in through an alias or a merge
    key (`<<`) stands where its anchor was written.

    Raises:
        ConfigError: The file is missing, unreadable, empty, no UTF-8, no YAML, or no mapping, or holds a key twice.
    """
    reason = _why_unreadable(Path(path))
    if reason:
        raise ConfigError(f"{path}: {reason}")
    return _Positions(str(path), _compose(str(path), _read_text(Path(path)))).found


def check_command_line(argv: Sequence[str]) -> None:
    """Reads every config file that `argv` names.

    Raises:
        ConfigError: What `read_positions` found; a file that cannot be read is blamed on the command line.
    """
    for value in config_arguments(argv):
        if is_config_path(value):
            read_config_argument(value)


def read_config_argument(path: str) -> dict[str, Position]:
    """As `read_positions`, for a file that the command line names.

    Raises:
        ConfigError: What `read_positions` found; a file that is not there is blamed on the command line.
    """
    reason = _why_unreadable(Path(path))
    if reason:
        raise ConfigError(f"{COMMAND_LINE}: --config {path}: {reason}")
    return read_positions(path)


def config_arguments(argv: Sequence[str]) -> Iterator[str]:
    """The values of `--config X`, `--config=X`, `-c X` and `-cX`, in order."""
    following = False
    for argument in argv:
        if following:
            yield argument
            following = False
        elif argument in ("--config", "-c"):
            following = True
        elif argument.startswith("--config="):
            yield argument.removeprefix("--config=")
        elif argument.startswith("-c") and not argument.startswith("--"):
            yield argument.removeprefix("-c").removeprefix("=")


def is_config_path(value: str) -> bool:
    """False for what jsonargparse reads without a local file: YAML text, standard input, a URL."""
    return not (value.lstrip().startswith("{") or "\n" in value or value == "-" or "://" in value)


def _why_unreadable(path: Path) -> str | None:
    if path.is_dir():
        return "is a directory; name a YAML file in it"
    if not path.exists():
        return f"no such file{did_you_mean(_files_like(path))}"
    return None


def _files_like(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    files = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    return [str(path.with_name(name)) for name in nearest(path.name, files)]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        good = data[: error.start].decode("utf-8")
        where = _position_at(str(path), good, len(good))
        raise ConfigError(f"{where}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from error


def _compose(file: str, text: str) -> yaml.MappingNode:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_fault(file, text, error)) from error
    except yaml.reader.ReaderError as error:
        where = _position_at(file, text, error.position)
        raise ConfigError(f"{where}: not valid YAML: {error.reason}") from error
    if node is None:
        raise ConfigError(f"{file}:1:1: the file is empty; expected keys with values, such as 'model:'")
    if not isinstance(node, yaml.MappingNode):
        where = _position_of(file, node)
        raise ConfigError(f"{where}: expected keys with values at the top of the file, found {_shape(node)}")
    return node


def _syntax_fault(file: str, text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file, 1, 1)
    context = error.context
    if context and error.context_mark and error.context_mark.line + 1 != where.line:
        context += f" that began on line {error.context_mark.line + 1}"
    problem = ", ".join(part for part in (context, error.problem) if part)
    advice = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
    return f"{where}: not valid YAML: {problem}{advice}"


def _position_at(file: str, text: str, offset: int) -> Position:
    before = text[:offset]
    return Position(file, before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)


def _position_of(file: str, node: yaml.Node) -> Position:
    return Position(file, node.start_mark.line + 1, node.start_mark.column + 1)


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"{node.value!r}; a key needs a colon and a space after it" if node.value else "nothing"


class _Positions:
    """Collects the position of every key below a node."""

    def __init__(self, file: str, root: yaml.MappingNode) -> None:
        self.file = file
        self.found: dict[str, Position] = {}
        self._open: list[yaml.Node] = []  # the nodes above the current one, to notice an alias to one of them
        self._visit(root, "")

    def _visit(self, node: yaml.Node, key: str) -> None:
        if any(node is above for above in self._open):
            raise ConfigError(f"{_position_of(self.file, node)}: {key}: the alias stands inside its own anchor")
        if node.tag not in yaml.SafeLoader.yaml_constructors:
            raise ConfigError(f"{_position_of(self.file, node)}: {key or 'the file'}: unknown YAML tag {node.tag}")
        self._open.append(node)
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, key)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._record(_join(key, str(index)), item)
                self._visit(item, _join(key, str(index)))
        self._open.pop()

    def _visit_mapping(self, node: yaml.MappingNode, key: str) -> None:
        own: dict[str, yaml.Node] = {}
        for name_node, value_node in node.value:
            if name_node.tag == MERGE_TAG:
                self._visit_merged(value_node, key)
                continue
            name = self._name(name_node, key)
            if name in own:
                raise ConfigError(self._duplicate(_join(key, name), own[name], name_node))
            own[name] = name_node
        for name_node, value_node in node.value:  # after the merged keys: a key of the mapping itself wins
            if name_node.tag != MERGE_TAG:
                self._record(_join(key, name_node.value), name_node)
                self._visit(value_node, _join(key, name_node.value))

    def _visit_merged(self, node: yaml.Node, key: str) -> None:
        merged = reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]  # the first one wins
        for mapping in merged:
            if not isinstance(mapping, yaml.MappingNode):
                where = _position_of(self.file, mapping)
                raise ConfigError(f"{where}: {_join(key, '<<')}: expected a mapping to merge")
            self._visit(mapping, key)

    def _name(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"{_position_of(self.file, node)}: {key or 'the file'}: a key must be plain text")
        return str(node.value)

    def _duplicate(self, key: str, first: yaml.Node, second: yaml.Node) -> str:
        here, there = _position_of(self.file, second), _position_of(self.file, first)
        return f"{here}: {key}: the key is set twice; it already stands at {there}"

    def _record(self, key: str, node: yaml.Node) -> None:
        self.found[key] = _position_of(self.file, node)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
