"""What tells a resumed run from one that was never stopped: rows, losses, weights, optimizer, random generators."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_trainer.checkpoints import STATE

SHOWN = 3
"""Differing tensors that are described of each kind; the others are counted."""


class Difference(NamedTuple):
    """One thing that is not the same to the last bit; `size` is the largest difference of its values."""

    text: str
    size: float = math.inf


@dataclass(frozen=True)
class Step:
    """One optimizer step: the rows of every rank's micro-batches, and every rank's share of the loss."""

    rows: tuple[Any, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Nats per trained token."""
        return sum(self.losses)


@dataclass(frozen=True)
class Record:
    """What one attempt noted.

    Attributes:
        steps: By number.
        parameters: Names, in the optimizer's order.
        device: cpu or cuda.
    """

    steps: dict[int, Step]
    parameters: tuple[str, ...]
    device: str


def read_record(folder: Path, name: str) -> Record:
    """Put the ranks' notes together."""
    if not _files(folder, name):
        return Record({}, (), "")
    ranks = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in _files(folder, name)]
    steps = {
        entries[0]["step"]: Step(tuple(e["rows"] for e in entries), tuple(e["loss"] for e in entries))
        for entries in zip(*(rank[1:] for rank in ranks), strict=True)
    }
    return Record(steps, tuple(ranks[0][0]["parameters"]), ranks[0][0]["device"])


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.jsonl"), key=lambda path: int(path.stem.rpartition("-")[2]))


@dataclass(frozen=True)
class Comparison:
    """A run that was stopped and resumed, against one that was not.

    Attributes:
        straight: The one that was not.
        broken: The other; steps after `stop` are of the resumed process.
        stop: Optimizer step after which it was stopped.
        differences: What kind of thing differs -> lines that say how, the largest difference first; kinds that agree
            have none.
        device: cpu or cuda.
    """

    straight: dict[int, Step]
    broken: dict[int, Step]
    stop: int
    differences: dict[str, list[str]]
    device: str

    @property
    def first(self) -> str | None:
        """What differs first, or None."""
        for number in sorted(self.straight.keys() | self.broken.keys()):
            line = self._at(number)
            if line is not None:
                return line
        return next((lines[0] for lines in self.differences.values() if lines), None)

    def _at(self, number: int) -> str | None:
        one, two = self.straight.get(number), self.broken.get(number)
        if one is None or two is None:
            return f"step {number} was made by one of them only"
        if one.rows != two.rows:
            return f"step {number}, rows: {_rows(one)} without a stop, {_rows(two)} with one"
        if repr(one.losses) != repr(two.losses):
            size = abs(one.loss - two.loss)
            return (
                f"step {number}, loss: {one.loss!r} without a stop, {two.loss!r} with one (they differ by {size:.2g})"
            )
        return None

    def as_text(self) -> str:
        """A table of the steps, what of the end agrees, and the verdict."""
        lines = [f"{'step':>6}  {'rows':<9}  {'loss':<12}  {'resumed':<12}", *map(self._row, sorted(self.straight))]
        lines += [f"{kind:<18} {'differ' if found else 'identical'}" for kind, found in self.differences.items()]
        return "\n".join([*lines, "", *self._verdict()])

    def _row(self, number: int) -> str:
        one, two = self.straight[number], self.broken.get(number)
        rows = "missing" if two is None else "same" if one.rows == two.rows else "DIFFERENT"
        loss = "" if two is None else "same" if repr(one.losses) == repr(two.losses) else f"{two.loss:.8g}"
        resumed = "  <- stopped here" if number == self.stop else ""
        return f"{number:>6}  {rows:<9}  {one.loss:<12.8g}  {loss:<12}{resumed}".rstrip()

    def _verdict(self) -> Iterator[str]:
        if self.first is None:
            yield f"resume is exact over {len(self.straight)} steps"
            return
        yield f"resume is not exact; what differs first: {self.first}"
        for kind, lines in self.differences.items():
            yield from (f"  {kind}: {line}" for line in lines[:SHOWN])
            if len(lines) > SHOWN:
                yield f"  {kind}: and {len(lines) - SHOWN} more"
        before = [number for number in self.straight if number <= self.stop and self._at(number) is not None]
        if before:
            yield (
                f"step {before[0]} came before the stop: two runs from the start differ, so training itself does not "
                "repeat, and no resume can be exact"
            )
        if self.device == "cuda":
            yield "on a GPU some kernels add in no fixed order: --trainer.deterministic true shows whether these did"


def compare(straight: Record, stopped: Record, resumed: Record, checkpoints: tuple[Path, Path]) -> Comparison:
    """Compare everything.

    Args:
        straight: Of the attempt without a stop.
        stopped: Of the attempt up to its stop.
        resumed: Of the one that went on.
        checkpoints: The last of `straight` and of `resumed`.
    """
    one, two = (torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True) for path in checkpoints)
    named = [_named_optimizer(state, straight.parameters) for state in (one, two)]
    position = [state.get("loops", {}).get("fit_loop", {}).get("state_dict", {}) for state in (one, two)]
    found = {
        "weights": _weights_that_differ(*checkpoints),
        "optimizer": _differences("", *named),
        "schedule": _differences("", one.get("lr_schedulers"), two.get("lr_schedulers")),
        "random generators": _differences("", one.get("rng"), two.get("rng")),
        "place in the data": _differences("", *(state.get("combined_loader") for state in position)),
    }
    differences = {
        kind: [difference.text for difference in sorted(every, key=lambda difference: -difference.size)]
        for kind, every in found.items()
    }
    return Comparison(
        straight.steps, {**stopped.steps, **resumed.steps}, max(stopped.steps), differences, straight.device
    )


def _named_optimizer(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`{name of a parameter: its moments}`, and the groups' settings."""
    moments: dict[str, Any] = {}
    for optimizer in state["optimizer_states"]:
        for number, entry in optimizer["state"].items():
            moments[names[number] if number < len(names) else str(number)] = entry
    return {**moments, "param_groups": [optimizer["param_groups"] for optimizer in state["optimizer_states"]]}


def _weights_that_differ(first: Path, second: Path) -> Iterator[Difference]:
    """One tensor at a time: models may be larger than the memory."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    if files != sorted(path.name for path in second.glob("*.safetensors")):
        yield Difference("they are in files of other names")
        return
    for name in files:
        with safe_open(first / name, framework="pt") as one, safe_open(second / name, framework="pt") as two:
            if set(one.keys()) != set(two.keys()):
                yield Difference(f"{name} holds other tensors")
                continue
            for key in one.keys():  # noqa: SIM118  # no mapping
                yield from _differences(key, one.get_tensor(key), two.get_tensor(key))


def _differences(name: str, first: Any, second: Any) -> Iterator[Difference]:
    """One for each leaf of two nested values that is not the same to the last bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if not _same_bits(first, second):
            yield _tensor_difference(name, first, second)
    elif isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        for key in first:
            yield from _differences(f"{name}.{key}".lstrip("."), first[key], second[key])
    elif _is_short_list(first) and _is_short_list(second) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from _differences(f"{name}.{number}".lstrip("."), *pair)
    elif repr(first) != repr(second):  # which tells -0 from 0, and lets NaN be NaN
        yield Difference(f"{name}: {_shortened(first)} without a stop, {_shortened(second)} with one")


def _is_short_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) < 100  # a generator's state is one thing


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, two = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, two)


def _tensor_difference(name: str, first: Tensor, second: Tensor) -> Difference:
    if first.dtype != second.dtype or first.shape != second.shape:
        kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (first, second)]
        return Difference(f"{name}: {kinds[0]} without a stop, {kinds[1]} with one")
    one, two = first.double().flatten(), second.double().flatten()
    places = (one != two).nonzero().flatten()
    if not len(places):
        return Difference(f"{name}: 0 in one, -0 in the other", 0.0)
    place, size = int(places[0]), float((one - two).abs().nan_to_num(nan=math.inf).max())
    where = [int(index) for index in torch.unravel_index(places[0], first.shape)]
    return Difference(
        f"{name}: {len(places)} of {first.numel()} values differ, by at most {size:.2g}; the first, {where}, is "
        f"{float(one[place])!r} without a stop, {float(two[place])!r} with one",
        size,
    )


def _rows(step: Step) -> str:
    return _shortened([row for rank in step.rows for batch in rank for row in batch])


def _shortened(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"
