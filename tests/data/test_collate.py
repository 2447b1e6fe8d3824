"""Batches worked out by hand, from rows that lie in a real store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_trainer.data.collate import Collator
from lightning_trainer.data.encode import Encoded
from lightning_trainer.data.store import ROWS_PER_CHUNK, TOKENS, Build, Origin, StoreWriter, TokenStore, write_ledger
from lightning_trainer.types import Batch

ROWS = [([11, 12, 13], [0, 1, 1]), ([21, 22], [0, 1]), ([31, 32, 33, 34], [0, 0, 1, 0])]


def make_store(folder: Path, rows: list[tuple[list[int], list[int]]]) -> TokenStore:
    with Build(folder) as tmp:
        writer = StoreWriter(tmp / TOKENS)
        for number, (ids, trained) in enumerate(rows):
            writer.add(Encoded(ids, trained, ()), file=number % 2, line=number + 1, turn=0)
        writer.close()
        write_ledger(tmp, {"files": ["a.jsonl", "b.jsonl"]})
    return TokenStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("stores") / "three", ROWS)


def collate(store: TokenStore, examples: list[int], packed: bool, step_tokens: int = 5) -> Batch:
    return Collator(store, packed, pad_id=9)(np.array(examples, dtype=np.int64), step_tokens)


def lists(batch: Batch) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}


def test_a_packed_batch_by_hand(store: TokenStore) -> None:
    assert lists(collate(store, [2, 0, 1], packed=True)) == {
        "input_ids": [[31, 32, 33, 34, 11, 12, 13, 21, 22]],
        "labels": [[-100, -100, 33, -100, -100, 12, 13, -100, 22]],
        "predict_at": [1, 4, 5, 7],
        "targets": [33, 12, 13, 22],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1]],
        "attention_mask": None,
        "example_lengths": (4, 3, 2),
        "step_tokens": 5,
        "row_ids": (2, 0, 1),
    }


def test_a_padded_batch_by_hand(store: TokenStore) -> None:
    assert lists(collate(store, [1, 2, 0], packed=False)) == {
        "input_ids": [[21, 22, 9, 9], [31, 32, 33, 34], [11, 12, 13, 9]],
        "labels": [[-100, 22, -100, -100], [-100, -100, 33, -100], [-100, 12, 13, -100]],
        "predict_at": [0, 5, 8, 9],
        "targets": [22, 33, 12, 13],
        "position_ids": [[0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 2, 0]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]],
        "example_lengths": (2, 4, 3),
        "step_tokens": 5,
        "row_ids": (1, 2, 0),
    }


@pytest.mark.parametrize("packed", [True, False])
def test_a_rank_without_rows_gets_one_with_nothing_to_learn(store: TokenStore, packed: bool) -> None:
    batch = collate(store, [], packed)
    assert batch.input_ids.tolist() == [[11, 12, 13]]
    assert batch.labels.tolist() == [[-100, -100, -100]]
    assert (batch.predict_at.tolist(), batch.targets.tolist()) == ([], [])
    assert (batch.example_lengths, batch.row_ids, batch.step_tokens) == ((3,), (), 5)
    assert store[0][1].tolist() == [0, 1, 1]  # the store's own marks are as they were


@pytest.mark.parametrize("packed", [True, False])
def test_tensors_are_int64_and_the_batchs_own(store: TokenStore, packed: bool) -> None:
    batch = collate(store, [0], packed)
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    for tensor in tensors:
        tensor += 1  # a view of the mapped file would not be writable
    assert store[0][0].tolist() == [11, 12, 13]


@st.composite
def row_lists(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 999), min_size=1, max_size=8))
        rows.append((ids, [0, *(draw(st.integers(0, 1)) for _ in ids[1:])]))
    return rows


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=row_lists(), packed=st.booleans())
def test_what_is_predicted_is_what_is_labelled(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[int], list[int]]], packed: bool
) -> None:
    store = make_store(tmp_path_factory.mktemp("drawn") / "store", rows)
    batch = collate(store, list(range(len(rows))), packed)
    labels, ids = batch.labels.reshape(-1), batch.input_ids.reshape(-1)
    assert batch.targets.tolist() == labels[labels != -100].tolist()
    assert torch.equal(labels[batch.predict_at + 1], batch.targets)
    assert torch.equal(ids[batch.predict_at + 1], batch.targets)
    # The place that predicts stands just before its target in the same example.
    positions = batch.position_ids.reshape(-1)
    assert torch.equal(positions[batch.predict_at] + 1, positions[batch.predict_at + 1])
    assert len(batch.targets) == sum(sum(marks) for _, marks in rows)
    assert batch.example_lengths == tuple(len(ids) for ids, _ in rows)


@pytest.mark.parametrize("count", [0, 1, ROWS_PER_CHUNK, 2 * ROWS_PER_CHUNK + 3])
def test_a_store_gives_back_what_was_written(tmp_path: Path, count: int) -> None:
    rows = [([n, n + 1, *range(n % 5)], [0, 1, *[n % 2] * (n % 5)]) for n in range(count)]
    store = make_store(tmp_path / "store", rows)
    assert len(store) == count
    assert [(ids.tolist(), marks.tolist()) for ids, marks in map(store.__getitem__, range(count))] == rows
    assert store.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert store.trained.tolist() == [sum(marks) for _, marks in rows]
    if count:
        assert store.origin(count - 1) == Origin(["a.jsonl", "b.jsonl"][(count - 1) % 2], count, 0)
