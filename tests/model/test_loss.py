"""The loss against transformers' own, row by row."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_trainer.model import loss

ROWS, VOCAB, WIDTH = 700, 90, 16


@pytest.fixture(autouse=True)
def _several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a real vocabulary: a chunk is taken to probabilities a few rows at a time, fewer at its end."""
    monkeypatch.setattr(loss, "CPU_EXACT", VOCAB * 7 + 3)


def head(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (rows,), generator=generator)


@pytest.mark.parametrize("expected", [1.0, 1 / 300])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 256, 257, ROWS])
def test_chunked_is_full(rows: int, bias: bool, expected: float) -> None:
    hidden, weight, targets = head(rows=rows)
    b = torch.linspace(-1, 1, VOCAB).requires_grad_() if bias else None
    inputs = [t for t in (hidden, weight, b) if t is not None]
    chunked = loss.nats_chunked(hidden, weight, b, targets, expected)
    full = F.cross_entropy(F.linear(hidden, weight, b).double(), targets, reduction="sum")
    assert chunked.dtype == torch.float32
    assert chunked.shape == ()
    assert chunked.item() == pytest.approx(full.item(), rel=1e-6)
    mine, theirs = torch.autograd.grad(chunked, inputs), torch.autograd.grad(full, inputs)
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_neither_the_sum_nor_the_gradients_are_rounded_more_than_those_of_full_logits(dtype: Any) -> None:
    hidden, weight, targets = head(dtype, rows=3000)
    share = 1 / 3000
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    true = torch.autograd.grad(want, exact)
    full = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    theirs = torch.autograd.grad(full * (share * 256), (hidden, weight))
    got = loss.nats_chunked(hidden, weight, None, targets, expected=share * 256)
    mine = torch.autograd.grad(got * (share * 256), (hidden, weight))
    assert got.dtype == torch.float32
    assert abs(got.item() - full.item()) / 3000 < 1e-5  # what is left is the rounding of the logits themselves
    for a, b, t in zip(mine, theirs, true, strict=True):
        assert a.dtype == dtype
        ours, full_error = (float((g.double() / (share * 256) - t).norm() / t.norm()) for g in (a, b))
        assert ours < 1.3 * full_error + 1e-6


def test_the_gradient_of_a_bf16_bias_is_added_up_before_it_is_rounded() -> None:
    hidden, weight, targets = head(torch.bfloat16, rows=3000)
    bias = torch.linspace(-1, 1, VOCAB).bfloat16().requires_grad_()
    got = torch.autograd.grad(loss.nats_chunked(hidden, weight, bias, targets), bias)[0]
    logits = (F.linear(hidden, weight) + bias).double()  # rounded as the loss rounds them
    true = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)[0].sum(0)
    torch.testing.assert_close(got, true.bfloat16(), rtol=2**-7, atol=1e-3)


def test_fp16_gradients_do_not_overflow_on_the_way() -> None:
    hidden = torch.full((128, 4), 700.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(16, 4, dtype=torch.float16, requires_grad=True)
    nats = loss.nats_chunked(hidden, weight, None, torch.zeros(128, dtype=torch.int64), expected=1 / 128)
    grad = torch.autograd.grad(nats / 128, weight)[0]
    assert grad[0, 0].item() == pytest.approx(700 * (1 / 16 - 1), rel=1e-3)
    assert grad[1, 0].item() == pytest.approx(700 / 16, rel=1e-3)


def test_a_frozen_layer_takes_no_gradient_and_gives_one() -> None:
    hidden, weight, targets = head()
    want = torch.autograd.grad(loss.nats_chunked(hidden, weight, None, targets), hidden)[0]
    got = loss.nats_chunked(hidden, weight.detach(), None, targets)
    assert torch.equal(torch.autograd.grad(got, hidden)[0], want)


def test_it_is_differentiated_once() -> None:
    hidden, weight, targets = head()
    nats = loss.nats_chunked(hidden, weight, None, targets)
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nats.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_targets_is_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    hidden, weight, targets = head(dtype, rows=0)
    nats = loss.nats_chunked(hidden, weight, None, targets)
    assert nats.item() == 0
    grads = torch.autograd.grad(nats, (hidden, weight))
    assert torch.equal(grads[1], torch.zeros_like(weight))
    assert float(loss.nats_from_logits(torch.zeros(0, VOCAB), targets)) == 0
    assert [float(x) for x in loss.evaluate_chunked(hidden, weight, None, targets)] == [0, 0]


def test_no_targets_is_zero_where_the_sum_of_fp16_weights_overflows() -> None:
    weight = torch.ones(300, 300, dtype=torch.float16, requires_grad=True)  # adds up to 90,000; fp16 ends at 65,504
    hidden = torch.zeros(0, 300, dtype=torch.float16, requires_grad=True)
    assert loss.nats_chunked(hidden, weight, None, torch.zeros(0, dtype=torch.int64)).item() == 0


def test_evaluation_counts_right_guesses() -> None:
    hidden, weight, targets = head()
    nats, right = loss.evaluate_chunked(hidden, weight, None, targets)
    logits = F.linear(hidden, weight)
    assert nats.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-6)
    assert right.dtype == torch.int64
    assert int(right) == sum(int(row.argmax()) == int(t) for row, t in zip(logits, targets, strict=True))
    assert not nats.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_that_is_kept_changes_nothing(dtype: torch.dtype) -> None:
    buffer = loss.LogitsBuffer()
    with torch.inference_mode():  # as `trainer.validate` before `trainer.fit`
        hidden, weight, targets = head(dtype, rows=300)
        kept = [x.item() for x in loss.evaluate_chunked(hidden, weight, None, targets, buffer)]
        assert kept == [x.item() for x in loss.evaluate_chunked(hidden, weight, None, targets)]
    begins_at = buffer.rows(1, weight).data_ptr()
    for rows in (300, 20, ROWS):
        hidden, weight, targets = head(dtype, rows)
        nats = [loss.nats_chunked(hidden, weight, None, targets, buffer=each) for each in (buffer, None)]
        grads = [torch.autograd.grad(each, (hidden, weight)) for each in nats]
        assert torch.equal(*nats)
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert buffer.rows(1, weight).data_ptr() == begins_at


def test_a_buffer_is_of_the_layers_shape_dtype_and_device_and_is_not_copied() -> None:
    buffer, weight = loss.LogitsBuffer(), torch.zeros(VOCAB, WIDTH)
    begins_at = buffer.rows(8, weight).data_ptr()
    assert buffer.rows(3, weight).data_ptr() == begins_at
    assert copy.deepcopy(buffer).rows(3, weight).data_ptr() != begins_at
    for other in (torch.zeros(2 * VOCAB, WIDTH), weight.bfloat16(), weight.to("meta")):
        rows = buffer.rows(3, other)
        assert (rows.shape, rows.dtype, rows.device) == ((3, len(other)), other.dtype, other.device)
    assert buffer._kept is not None
    assert buffer._kept.device.type == "cpu"  # a GPU's is its allocator's


def test_a_target_of_probability_zero() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0], [0.5]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True), torch.tensor([1, 0, 2])
    nats = loss.nats_chunked(hidden, weight, None, targets)
    third = torch.tensor([0.5, -0.5, 0.0]).exp().sum().log()
    assert nats.item() == pytest.approx(4000 + third.item(), rel=1e-6)
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(nats, weight)[0], want)
