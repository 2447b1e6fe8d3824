"""Tokenised rows on disk: Arrow files, memory-mapped, made once per content.

The folder's name is a hash of everything the tokens depend on, so a changed template or profile is another folder;
it is made under a temporary name and renamed when whole, so two processes can make it at once.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_trainer.data.encode import Encoded
from lightning_trainer.data.packing import Ints

TOKENS, LEDGER = "tokens.arrow", "ledger.json"
ROWS_PER_CHUNK = 1000


@dataclass(frozen=True)
class Origin:
    """Where a tokenised row came from.

    Attributes:
        line: 1-based line or row number in `file`.
        turn: 0, or which of several rows made from one conversation.
    """

    file: str
    line: int
    turn: int


class TokenStore:
    """Random access to the tokenised rows of one split; nothing is read until it is asked for.

    Args:
        folder: As `write` left it.

    Attributes:
        lengths: Tokens of each row.
        trained: Trained tokens of each row.
    """

    def __init__(self, folder: Path) -> None:
        import datasets

        self.folder = folder
        self.ledger: dict[str, Any] = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        table = datasets.Dataset.from_file(str(folder / TOKENS)).data.table
        self._ids = [_lists(chunk) for chunk in table.column("input_ids").chunks]
        self._marks = [_lists(chunk) for chunk in table.column("trained").chunks]
        self._origin = {name: table.column(name) for name in ("file", "line", "turn")}
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._ids)])
        self.lengths: Ints = np.empty(self._first[-1], dtype=np.int32)
        for first, (offsets, _) in zip(self._first, self._ids, strict=False):
            np.subtract(offsets[1:], offsets[:-1], out=self.lengths[first : first + len(offsets) - 1])
        self.trained: Ints = table.column("trained_tokens").to_numpy()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and training marks of one row, as views of the mapped file."""
        chunk = int(np.searchsorted(self._first, row, side="right")) - 1
        place = row - int(self._first[chunk])
        offsets, ids = self._ids[chunk]
        first, last = int(offsets[place]), int(offsets[place + 1])
        mark_offsets, marks = self._marks[chunk]
        shift = int(mark_offsets[place]) - first
        return ids[first:last], marks[first + shift : last + shift]

    def origin(self, row: int) -> Origin:
        """File, line and turn of one row."""
        values = {name: column[row].as_py() for name, column in self._origin.items()}
        return Origin(self.ledger["files"][values["file"]], values["line"], values["turn"])


def _lists(chunk: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


class StoreWriter:
    """Writes tokenised rows, a chunk at a time."""

    def __init__(self, path: Path) -> None:
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        self._features = Features(
            input_ids=List(Value("int32")),
            trained=List(Value("uint8")),
            trained_tokens=Value("int32"),
            file=Value("int32"),
            line=Value("int64"),
            turn=Value("int32"),
        )
        self._writer = ArrowWriter(features=self._features, path=str(path))
        self._pending: list[tuple[Encoded, int, int, int]] = []

    def add(self, row: Encoded, file: int, line: int, turn: int) -> None:
        """Append one row; `file` is an index into the ledger's list of files."""
        self._pending.append((row, file, line, turn))
        if len(self._pending) == ROWS_PER_CHUNK:
            self._flush()

    def close(self) -> None:
        """Write what is left; the file is whole afterwards."""
        self._flush()
        self._writer.finalize()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        rows = self._pending
        columns = {
            "input_ids": [row.ids for row, *_ in rows],
            "trained": [row.trained for row, *_ in rows],
            "trained_tokens": [row.trained_tokens for row, *_ in rows],
            "file": [file for _, file, _, _ in rows],
            "line": [line for _, _, line, _ in rows],
            "turn": [turn for *_, turn in rows],
        }
        self._writer.write_table(pa.table(columns, schema=self._features.arrow_schema))
        self._pending = []


def is_built(folder: Path) -> bool:
    """Whether the folder holds a whole store: it is renamed into place only then."""
    return (folder / LEDGER).is_file()


class Build:
    """`with Build(folder) as tmp:` fill `tmp`; it becomes `folder` when the block ends well, else it is removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self._tmp = self.folder.with_name(f"{self.folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        self._tmp.mkdir(parents=True)
        return self._tmp

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            try:
                os.rename(self._tmp, self.folder)
            except OSError:
                if not is_built(self.folder):  # else another process was first: its content is the same
                    raise
        shutil.rmtree(self._tmp, ignore_errors=True)


def write_ledger(folder: Path, ledger: dict[str, Any]) -> None:
    """Last file of a store."""
    (folder / LEDGER).write_text(json.dumps(ledger, ensure_ascii=False), encoding="utf-8")
