"""Kernels for rows of unequal lengths: asked for what SDPA gives row by row, and only where they can serve.

They run on CUDA alone. Here a stand-in takes their place that does what their documentation says of each argument.
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_trainer.model import attention, varlen

LENGTHS = (5, 1, 12, 7)


def by_the_book(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scale: Any,
    window: tuple[int, int],
) -> torch.Tensor:
    """(T, H, D) attention within rows; a token sees `window` tokens to its left and right, -1 is all."""
    out = []
    for first, last in pairwise(starts.tolist()):
        q, k, v = (part[first:last].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        places = torch.arange(last - first)
        distance = places[:, None] - places[None, :]
        left, right = (len(places) if side < 0 else side for side in window)
        mask = (distance <= left) & (-distance <= right)
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


class Book:
    """Stands for all of them; counts its calls."""

    calls = 0

    def torchs(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any = None,
               window_size: Any = (-1, -1), enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        assert torch.equal(cu_q, cu_k)
        assert cu_q.dtype == torch.int32
        assert (max_q, max_k) == (max(LENGTHS), max(LENGTHS))
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return by_the_book(q, k, v, cu_q, scale, window_size)

    def older(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: Any = None,
              window_size: Any = (-1, -1)) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        assert q.shape == k.shape == v.shape
        return by_the_book(q, k, v, cu_q, scale, window_size)

    def flash(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, softmax_scale: Any = None,
              causal: bool = False, window_size: Any = (-1, -1),
              deterministic: bool = False) -> torch.Tensor:  # fmt: skip
        self.calls += 1
        assert causal
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return by_the_book(q, k, v, cu_q, softmax_scale, (window_size[0], 0))


@pytest.fixture(params=["torchs", "older", "flash"])
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    book = Book()
    if request.param == "flash":
        module = ModuleType("flash_attn")
        module.flash_attn_varlen_func = book.flash  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        monkeypatch.setattr(varlen, "_torchs_arguments", frozenset)
    else:
        stand_in = getattr(book, request.param)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
        monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    for cached in (varlen._kernel, varlen._torchs_arguments):
        getattr(cached, "cache_clear", lambda: None)()
    monkeypatch.setattr(varlen, "kernel_for", lambda *_: varlen._kernel())
    yield book
    for cached in (varlen._kernel, varlen._torchs_arguments):
        getattr(cached, "cache_clear", lambda: None)()


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_asked_for_what_sdpa_gives_row_by_row(
    kernel: Any, window: int | None, scaling: Any, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, n, sum(LENGTHS), 8, generator=generator) for n in heads)
    module = torch.nn.Module()
    rows = attention.packed_arguments(LENGTHS, torch.device("cpu"))
    given: dict[str, Any] = {"scaling": scaling, "sliding_window": window}
    fast, _ = attention.packed_attention(module, q, k, v, None, **rows, **given)
    slow, _ = attention.packed_attention(module, q, k, v, None, examples=attention.Examples(LENGTHS), **given)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    assert kernel.calls == 1


@pytest.mark.parametrize("kernel", ["flash"], indirect=True)
def test_a_run_that_is_to_be_deterministic_says_so_to_flash_attn(kernel: Any) -> None:
    q, k, v = torch.randn(3, 1, 4, sum(LENGTHS), 8)
    rows = attention.packed_arguments(LENGTHS, torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    try:
        attention.packed_attention(torch.nn.Module(), q, k, v, None, **rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernel.calls == 1


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(varlen, "_capability", lambda device: (8, 6))
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    varlen._kernel.cache_clear()
    yield
    varlen._kernel.cache_clear()


class OnGpu:
    """What `kernel_for` looks at."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, numbers: int = 64, device: str = "cuda") -> None:
        self.dtype, self.shape, self.device = dtype, (1, 4, 10, numbers), torch.device(device)


@pytest.mark.parametrize(
    ("query", "value", "dropout", "serves"),
    [
        (OnGpu(), OnGpu(), 0.0, True),
        (OnGpu(torch.float16), OnGpu(torch.float16), 0.0, True),
        (OnGpu(torch.float32), OnGpu(torch.float32), 0.0, False),
        (OnGpu(device="cpu"), OnGpu(device="cpu"), 0.0, False),
        (OnGpu(numbers=512), OnGpu(numbers=512), 0.0, False),
        (OnGpu(numbers=192), OnGpu(numbers=128), 0.0, False),
        (OnGpu(), OnGpu(), 0.1, False),
        (OnGpu(numbers=12), OnGpu(numbers=12), 0.0, False),
        (OnGpu(numbers=208), OnGpu(numbers=208), 0.0, False),
    ],
)
def test_it_serves_where_it_can(ampere: None, query: Any, value: Any, dropout: float, serves: bool) -> None:
    assert (varlen.kernel_for(query, value, dropout) is not None) == serves


def test_it_does_not_serve_devices_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_capability", lambda device: (7, 5))
    assert varlen.kernel_for(OnGpu(), OnGpu(), 0.0) is None  # type: ignore[arg-type]


def test_a_build_without_flash_attention_has_none_of_torchs(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    varlen._kernel.cache_clear()
    assert varlen.kernel_for(OnGpu(), OnGpu(), 0.0) is None  # type: ignore[arg-type]
    varlen._kernel.cache_clear()


def test_without_torchs_and_without_flash_attn_there_is_none(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_torchs_arguments", frozenset)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    varlen._kernel.cache_clear()
    assert varlen.kernel_for(OnGpu(), OnGpu(), 0.0) is None  # type: ignore[arg-type]
    varlen._kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_on_a_gpu_the_kernel_gives_what_sdpa_gives_row_by_row(key_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (4, key_heads, key_heads)]
    found = []
    for one_by_one in (False, True):
        torch.manual_seed(1)
        inputs = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
        kernel = varlen.kernel_for(inputs[0], inputs[2], 0.0)
        assert kernel is not None
        if one_by_one:
            out = attention._one_by_one(*inputs, list(LENGTHS), None, 0.0, window)
        else:
            starts = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).to(torch.int32)
            out = kernel(*(part[0] for part in inputs), varlen.Rows(starts, max(LENGTHS), None, window))[None]
        out.float().square().sum().backward()
        found.append([out, *(part.grad for part in inputs)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
