"""How a few examples are laid out in micro-batches: the real plan and the real collator, on examples held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lightning_trainer.data.collate import Collator
from lightning_trainer.data.encode import Encoded
from lightning_trainer.data.sampler import EpochPlan, Layout, plan_epoch
from lightning_trainer.data.store import Origin, TokenStore
from lightning_trainer.types import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Placed:
    """Where one example lies.

    Attributes:
        example: Which one.
        pack: Which row of the plan it is in, counted over all micro-batches; unpacked, each is a row of its own.
        line: Row of the micro-batch's tensors: 0 when packed.
        first: Column of its first token.
        position_ids: Of its tokens.
        input_ids: As the batch holds them.
        labels: The same; -100 where not trained.
        padding: Padding behind it.
    """

    example: int
    pack: int
    line: int
    first: int
    position_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    padding: int

    @property
    def length(self) -> int:
        """Tokens, without padding."""
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Tokens with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as the collator made it.

    Attributes:
        shape: Of `input_ids`: (1, T) packed, (B, T) otherwise.
        example_lengths: As the batch says them.
        labels: Labels that are not -100.
        targets: Length of `predict_at` and `targets`.
        faults: What does not agree with the examples; empty unless the program is broken.
    """

    packed: bool
    shape: tuple[int, int]
    placed: tuple[Placed, ...]
    example_lengths: tuple[int, ...]
    labels: int
    targets: int
    faults: tuple[str, ...]

    @property
    def padding(self) -> int:
        """Padding tokens."""
        return sum(placed.padding for placed in self.placed)


class ShownStore(TokenStore):
    """A store of the examples that are shown, in memory."""

    def __init__(self, examples: Sequence[Encoded], origins: Sequence[Origin]) -> None:  # no file: nothing to open
        self._examples, self._origins = examples, origins
        self.lengths = np.array([len(row.ids) for row in examples], dtype=np.int64)
        self.trained = np.array([row.trained_tokens for row in examples], dtype=np.int64)

    def __getitem__(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and training marks of one example."""
        example = self._examples[row]
        return np.array(example.ids, dtype=np.int32), np.array(example.trained, dtype=np.uint8)

    def origin(self, row: int) -> Origin:
        """File, line and turn of one example."""
        return self._origins[row]


def micro_batches(store: TokenStore, packed: bool, batch_size: int, max_length: int, pad_id: int) -> list[MicroBatch]:
    """All micro-batches of one rank that trains on the store alone, unshuffled."""
    layout = Layout(batch_size, pack_to=max_length if packed else None, shuffle=False)
    plan = plan_epoch(store.lengths, store.trained, layout, 0)
    collate = Collator(store, packed, pad_id)
    return [_micro_batch(store, plan, number, collate) for number in range(len(plan))]


def _micro_batch(store: TokenStore, plan: EpochPlan, number: int, collate: Collator) -> MicroBatch:
    batch = collate(plan.examples(number, 0), plan.step_tokens(number))
    size = plan.layout.batch_size
    rows = range(number * size, min((number + 1) * size, len(plan.rows)))
    packs = [row for row in rows for _ in plan.rows[row]]
    placed = tuple(_place(batch, pack, place) for place, pack in enumerate(packs))
    return MicroBatch(
        packed=batch.attention_mask is None,
        shape=(batch.input_ids.shape[0], batch.input_ids.shape[1]),
        placed=placed,
        example_lengths=batch.example_lengths,
        labels=int((batch.labels != IGNORE_INDEX).sum()),
        targets=len(batch.targets),
        faults=tuple(_faults(store, batch, placed)),
    )


def _place(batch: Batch, pack: int, place: int) -> Placed:
    length = batch.example_lengths[place]
    packed = batch.attention_mask is None
    line, first = (0, sum(batch.example_lengths[:place])) if packed else (place, 0)
    here = slice(first, first + length)
    return Placed(
        example=batch.row_ids[place],
        pack=pack,
        line=line,
        first=first,
        position_ids=tuple(batch.position_ids[line, here].tolist()),
        input_ids=tuple(batch.input_ids[line, here].tolist()),
        labels=tuple(batch.labels[line, here].tolist()),
        padding=0 if packed else batch.input_ids.shape[1] - length,
    )


def _faults(store: TokenStore, batch: Batch, placed: Sequence[Placed]) -> list[str]:
    """What in a batch does not agree with the examples it was made of."""
    found = [fault for place in placed for fault in _example_faults(store, place)]
    inside = sum(len(place.input_ids) for place in placed)
    beyond = sum(place.padding for place in placed)
    if inside + beyond != batch.input_ids.numel():
        found.append(f"{batch.input_ids.numel()} tokens hold examples of {inside} and padding of {beyond}")
    if batch.attention_mask is not None and int(batch.attention_mask.sum()) != inside:
        found.append("attention_mask does not mark the examples' tokens")
    where = torch.nonzero(batch.labels.reshape(-1) != IGNORE_INDEX).reshape(-1)
    if not torch.equal(batch.predict_at, where - 1):
        found.append("predict_at is not the place before each label")
    elif not torch.equal(batch.targets, batch.labels.reshape(-1)[where]):
        found.append("targets are not the labels")
    elif bool((batch.position_ids.reshape(-1)[where] == 0).any()):
        found.append("the first token of an example is predicted from the end of the one before it")
    return found


def _example_faults(store: TokenStore, place: Placed) -> list[str]:
    ids, marks = store[place.example]
    name = f"example {place.example + 1}"
    wanted = tuple(np.where(marks == 1, ids, IGNORE_INDEX).tolist())
    found = []
    if place.input_ids != tuple(ids.tolist()):
        found.append(f"{name}: its input_ids are not its tokens")
    if place.labels != wanted:
        found.append(f"{name}: its labels are not its trained tokens")
    if place.position_ids != tuple(range(len(ids))):
        found.append(f"{name}: its position_ids do not count from 0")
    return found
