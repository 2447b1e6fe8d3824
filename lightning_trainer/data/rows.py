"""Read rows from the user's files: JSONL, JSON arrays, parquet, Hub data sets.

Our own reader stands before `datasets` because its JSON loader dies at the first bad line without saying which.
A row that cannot be read is a `BadRow` with file, line and reason; only a file that cannot be read at all raises.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from lightning_trainer.types import InputError

JSON_LINES = (".jsonl", ".ndjson")

_FILE_SUFFIXES = (*JSON_LINES, ".json", ".parquet", ".txt", ".csv", ".gz", ".zst")

AT_ONCE = 1 << 20
"""Bytes of a JSON array that are read at once, at least."""

LONGEST_WORD = 16
"""Characters: nothing in JSON that a cut makes invalid, strings aside, is longer."""

_DECODER = json.JSONDecoder()

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)

_SPACE = re.compile(r"[ \t\r\n]*")

_HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(/(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class RawRow:
    """One row as it was read.

    Attributes:
        file: The path as the user gave it, or the Hub id.
        line: 1-based line of the file; the row number for parquet and Hub data sets.
        data: The row's columns.
    """

    file: str
    line: int
    data: dict[str, Any]

    @cached_property
    def identity(self) -> int:
        """64 bits of the row's content: the same wherever the row stands, in whatever file."""
        text = _ENCODER.encode(self.data)
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Source:
    """One file, or one Hub data set (`owner/name[:config][/split]`).

    Attributes:
        name: As the user gave it.
        path: None for a Hub data set.
    """

    name: str
    path: Path | None

    def digest(self) -> str:
        """sha256 of the file; for a Hub data set, of what `datasets` calls its fingerprint."""
        if self.path is None:
            return str(_load_hub(self.name)._fingerprint)
        stat = self.path.stat()
        return _file_digest(self.path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, changed: int) -> str:
    """sha256 of a file, read once per state of it: several splits and the run's fingerprint ask for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources(spec: str | Sequence[str], key: str) -> list[Source]:
    """The files or data sets that `spec` names.

    Raises:
        InputError: A file is not there.
    """
    names = [spec] if isinstance(spec, str) else list(spec)
    if not names:
        raise InputError("an empty list of files", key=key)
    return [_source(name, key) for name in names]


def _source(name: str, key: str) -> Source:
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name, path)
    if path.is_dir():
        raise InputError(f"{name!r} is a directory; name its files, as a list", key=key)
    if _HUB_ID.fullmatch(name) and path.suffix not in _FILE_SUFFIXES and not path.parent.is_dir():
        return Source(name, None)
    raise InputError(f"there is no data file {name!r}{_nearest_file(path)}", key=key)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a directory {str(path.parent)!r})"
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_file()], n=1)
    return f"; did you mean {str(path.parent / names[0])!r}?" if names else ""


def read(source: Source) -> Iterator[RawRow | BadRow]:
    """Every row of one source, in its order.

    Raises:
        InputError: The file as a whole is no JSON, JSONL or parquet.
    """
    if source.path is None:
        yield from _read_hub(source.name)
    elif source.path.suffix == ".parquet":
        yield from _read_parquet(source.name, source.path)
    elif source.path.suffix in JSON_LINES or not _starts_an_array(source.path):
        yield from _read_json_lines(source.name, source.path)
    else:
        yield from _read_json_array(source.name, source.path)


def _starts_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _read_json_lines(name: str, path: Path) -> Iterator[RawRow | BadRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_line(name, number, line)


def _parse_line(name: str, number: int, line: bytes) -> RawRow | BadRow:
    line = line.rstrip(b"\r\n")
    try:
        data = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(name, number, f"not UTF-8: byte {error.object[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRow(name, number, f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(name, number, "not usable: JSON nested too deeply")
    except ValueError as error:  # a number of more digits than Python converts
        return BadRow(name, number, f"not usable: {error}")
    return _row_or_bad(name, number, data)


def _row_or_bad(name: str, number: int, data: object) -> RawRow | BadRow:
    if not isinstance(data, dict):
        return BadRow(name, number, f"a row must be a JSON object, not {type(data).__name__}")
    return RawRow(name, number, data)


def _read_json_array(name: str, path: Path) -> Iterator[RawRow | BadRow]:
    with path.open("rb") as file:
        text = _Window(name, file)
        text.next_character()  # "["
        closing: str | None = "]"  # only an empty array may end here: behind a comma there must be a row
        while text.next_character(peek=True) != closing:
            line, data = text.next_value()
            yield _row_or_bad(name, line, data)
            if text.next_character(peek=True) == "]":
                break
            text.next_character()  # ","
            closing = None
        text.next_character()
        if text.next_character():
            raise InputError(f"{name}: there is more behind the end of the JSON array")


class _Window:
    """The stretch of a JSON file that is being read: a row at a time, so that a file may be larger than the memory.

    Args:
        name: Of the file, for messages.
        file: Its bytes.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._file = name, file
        self._decode, self._read = codecs.getincrementaldecoder("utf-8-sig")(), 0
        self._text, self._place, self._ended = "", 0, False
        self._line, self._counted = 1, 0

    def next_character(self, peek: bool = False) -> str:
        """The next that is no white space, or "" at the end of the file."""
        while True:
            self._place = _behind_space(self._text, self._place)
            if self._place < len(self._text) or not self._more():
                break
        found = self._text[self._place : self._place + 1]
        self._place += 0 if peek else len(found)
        return found

    def next_value(self) -> tuple[int, Any]:
        """A row and the line it starts on; a comma or the array's end follows it.

        Raises:
            InputError: It is no JSON. What follows a break in an array cannot be told apart into rows.
        """
        while True:
            self._line += self._text.count("\n", self._counted, self._place)
            self._counted = self._place
            try:
                data, end = _DECODER.raw_decode(self._text, self._place)
                behind = _behind_space(self._text, end)
                if behind < len(self._text) or self._ended:
                    if self._text[behind : behind + 1] not in (",", "]"):
                        raise json.JSONDecodeError("Expecting ',' or ']'", self._text, end)
                    self._place = end
                    return self._line, data
            except (ValueError, RecursionError) as error:
                if self._ended or not _may_be_cut(error):
                    raise self._broken(error) from error
            self._more()

    def _broken(self, error: Exception) -> InputError:
        """What is wrong with the row at hand; the error counts lines and columns from where the window begins."""
        said = str(error)
        if isinstance(error, json.JSONDecodeError):
            said = f"{error.msg}, in line {self._line + self._text.count(chr(10), self._place, error.pos)}"
        return InputError(f"{self._name}:{self._line}: this JSON array breaks in the row that starts here: {said}")

    def _more(self) -> bool:
        """Read on, as much again as there is; whether there was anything."""
        if self._ended:
            return False
        data = self._file.read(max(AT_ONCE, len(self._text) - self._place))
        self._ended = not data
        self._read += len(data)
        try:
            added = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            start = self._read - len(error.object) + error.start
            raise InputError(f"{self._name}: not UTF-8 at byte {start}") from error
        self._line += self._text.count("\n", self._counted, self._place)
        self._text = self._text[self._place :] + added
        self._place = self._counted = 0
        return not self._ended or bool(added)


def _behind_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _may_be_cut(error: Exception) -> bool:
    """Whether a value that does not parse might, were there more of the text."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - LONGEST_WORD


def _read_parquet(name: str, path: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{name}: not a parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for data in batch.to_pylist():
            number += 1
            yield RawRow(name, number, {key: value for key, value in data.items() if value is not None})


def _load_hub(name: str) -> Any:
    import datasets

    parts = _HUB_ID.fullmatch(name)
    assert parts is not None
    try:
        return datasets.load_dataset(parts["repository"], parts["config"], split=parts["split"] or "train")
    except (OSError, ValueError) as error:
        raise InputError(f"there is no file {name!r}, and no such data set on the Hub: {error}") from error


def _read_hub(name: str) -> Iterator[RawRow | BadRow]:
    for number, data in enumerate(_load_hub(name), start=1):
        yield RawRow(name, number, {key: value for key, value in dict(data).items() if value is not None})
