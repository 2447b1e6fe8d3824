"""The formulas, held against what autograd, the allocator and the optimizers really take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lightning_trainer.adapters import LoraSettings, put_in
from lightning_trainer.diagnose import memory
from lightning_trainer.model import CompensatedAdamW, CompensatedMuon, attention
from lightning_trainer.model import loss as loss_module
from lightning_trainer.model.loss import CPU_CHUNK, nats_chunked, nats_from_logits

TOKENS = 256
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def build(tiny_config: Any) -> Callable[..., PreTrainedModel]:
    def make(dtype: torch.dtype, packed: bool, layers: int = 3) -> PreTrainedModel:
        attention.register()
        config = tiny_config(**SHAPE, head_dim=16, num_hidden_layers=layers)
        name = attention.PACKED if packed else "sdpa"
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name).train()

    return make


def saved_bytes(model: PreTrainedModel, packed: bool) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(**(_packed() if packed else _padded()), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


def _packed() -> dict[str, Any]:
    lengths = (100, 60, TOKENS - 160)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.arange(TOKENS)[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": None,
        "examples": attention.Examples(lengths),
    }


def _padded() -> dict[str, Any]:
    mask = torch.ones(4, TOKENS // 4, dtype=torch.int64)
    mask[1:, 50:] = 0
    ids = torch.arange(TOKENS).view_as(mask)
    return {"input_ids": ids, "position_ids": torch.arange(TOKENS // 4).expand_as(mask), "attention_mask": mask}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_what_autograd_saves(build: Any, dtype: torch.dtype, packed: bool) -> None:
    model = build(dtype, packed)
    shape = memory.shape_of(model)
    assert shape is not None
    estimated = memory.activations(shape, TOKENS, dtype.itemsize, packed, checkpointing=False)
    assert estimated.recomputed == 0
    assert estimated.kept == pytest.approx(saved_bytes(model, packed), rel=0.07)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_under_checkpointing_are_what_autograd_saves(build: Any, dtype: torch.dtype, packed: bool) -> None:
    model = build(dtype, packed)
    one_layer = saved_bytes(build(dtype, packed, layers=4), packed) - saved_bytes(model, packed)
    model.activation_checkpointing_enable()
    shape = memory.shape_of(model)
    assert shape is not None
    estimated = memory.activations(shape, TOKENS, dtype.itemsize, packed, checkpointing=True)
    assert estimated.kept == pytest.approx(saved_bytes(model, packed), rel=0.25)
    assert estimated.recomputed == pytest.approx(one_layer, rel=0.07)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {"target_modules": ["q_proj", "v_proj"]}),
        (torch.bfloat16, {"dropout": 0.1}),
        (torch.bfloat16, {"dtype": "fp32"}),
        (torch.bfloat16, {"dtype": "fp32", "dropout": 0.1}),
        (torch.float32, {"use_dora": True}),
    ],
)
def test_activations_beside_adapters_are_what_autograd_saves(
    build: Any, dtype: torch.dtype, settings: dict[str, Any], packed: bool
) -> None:
    model = build(dtype, packed)
    put_in(model, LoraSettings(**settings), "base")
    model.train()
    shape, adapters = memory.shape_of(model), memory.adapter_activations(model, dtype.itemsize, packed)
    assert shape is not None
    assert adapters is not None
    estimated = memory.activations(shape, TOKENS, dtype.itemsize, packed, checkpointing=False, adapters=adapters)
    saved = saved_bytes(model, packed)
    if settings.get("use_dora"):  # x_eye and its product, which live while one layer computes
        inner = 5 * 64 + 128 + 192
        saved -= 3 * 4 * (5 * 64**2 + 128**2 + 192**2 + 16 * inner)
    assert estimated.kept == pytest.approx(saved, rel=0.07)


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), (None, 2)])
def test_a_frozen_model_has_no_gradients_and_no_moments(build: Any, name: Any, size: int) -> None:
    with torch.device("meta"):
        model = build(torch.bfloat16, packed=True)
        base = sum(p.numel() for p in model.parameters())
        put_in(model, LoraSettings(rank=8, dtype=name), "base")
    # q, o: 64 + 128; k, v: 64 + 64; gate, up: 64 + 192; down: 192 + 64
    trained = 3 * 8 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 192))
    adam = memory.OptimizerBytes(8.0, 0, "")
    arguments: Any = ("chunked", torch.bfloat16, TOKENS, 100)
    found = memory.estimate(model, adam, *arguments, packed=True, checkpointing=False)
    buffers = sum(b.nbytes for b in model.buffers())
    assert (found.weights, found.gradients) == (2 * base + size * trained + buffers, size * trained)
    assert found.moments == 8 * trained
    assert found.loss == 100 * 384 * (2 + 8) + 100 * 64 * 2
    packed = memory.estimate(model, adam, *arguments, packed=True, checkpointing=False, packed_weight=0.5)
    linear = 3 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 192)
    assert packed.weights == found.weights - 1.5 * linear


def _peak(step: Callable[[], None]) -> int:
    """Most bytes held at once, above what was held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        step()
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("exact", [1 << 20, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_the_loss_takes_what_the_allocator_sees(
    loss: Any, dtype: torch.dtype, exact: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, hidden, trained = 8192, 128, 2 * CPU_CHUNK
    monkeypatch.setattr(loss_module, "CPU_EXACT", exact)
    monkeypatch.setattr(loss_module, "STRETCH", 1 << 16)  # a copy that a GPU does not make
    weight = torch.zeros(rows, hidden, dtype=dtype, requires_grad=not frozen)
    states = torch.zeros(trained, hidden, dtype=dtype, requires_grad=True)
    targets = torch.zeros(trained, dtype=torch.int64)

    def step() -> None:
        if loss == "full":
            nats_from_logits(states @ weight.T, targets).backward()
        else:
            nats_chunked(states, weight, None, targets).backward()

    step()  # gradients are there from here on, and counted elsewhere
    estimated = memory.loss_bytes(
        loss, hidden, rows, trained, trained, dtype.itemsize, frozen, chunk=CPU_CHUNK, exact=exact
    )
    assert estimated == pytest.approx(_peak(step), rel=0.1)


def test_muons_state_is_that_of_its_own_matrices_and_adamws_of_the_rest() -> None:
    optimizer = CompensatedMuon([memory.asked_weight(torch.bfloat16)])
    found = memory.optimizer_bytes(optimizer, 1000, torch.bfloat16, [150, 100])
    assert found.state == 0.25 * (2 + 2) + 0.75 * (2 + 2 + 2)


@pytest.mark.parametrize(
    ("make", "dtype", "state", "update"),
    [
        (CompensatedAdamW, torch.bfloat16, 2 + 2 + 2, 16 * 1000),
        (CompensatedAdamW, torch.float32, 4 + 4, 0),
        (CompensatedAdamW, torch.float16, 4 + 4, 8 * 1000),
        (torch.optim.AdamW, torch.bfloat16, 2 + 2, 2 * 1000),
        (torch.optim.Adam, torch.float32, 4 + 4, 4 * 1000),
        (lambda p: torch.optim.SGD(p, lr=0.1), torch.bfloat16, 0, 2 * 1000),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), torch.bfloat16, 2, 0),
        (torch.optim.Adafactor, torch.float32, 2 * 64 * 4 / 64**2, 4 * 1000),
    ],
)
def test_an_optimizer_says_itself_what_it_keeps(make: Any, dtype: torch.dtype, state: float, update: int) -> None:
    found = memory.optimizer_bytes(make([memory.asked_weight(dtype)]), 1000, dtype)
    assert found == memory.OptimizerBytes(state, update, "")


def test_the_update_works_on_a_bucket_at_a_time() -> None:
    optimizer = CompensatedAdamW([memory.asked_weight(torch.bfloat16)])
    assert memory.optimizer_bytes(optimizer, 10**9, torch.bfloat16).update == 16 * 2**24


def test_an_optimizer_that_cannot_be_asked_is_said_to_be_unknown() -> None:
    optimizer = torch.optim.LBFGS([memory.asked_weight(torch.float32)])  # wants a closure
    found = memory.optimizer_bytes(optimizer, 1000, torch.float32)
    assert found == memory.OptimizerBytes(8.0, 0, "unknown optimizer, assumed 2 moments")


def test_parts_of_a_model_by_hand(build: Any) -> None:
    with torch.device("meta"):
        model = build(torch.bfloat16, packed=True)
    count = sum(p.numel() for p in model.parameters())
    optimizer = memory.OptimizerBytes(6.0, 16 * count, "")
    found = memory.estimate(model, optimizer, "chunked", torch.bfloat16, TOKENS, 100, packed=True, checkpointing=False)
    buffers = sum(b.nbytes for b in model.buffers())
    assert (found.weights, found.gradients, found.moments) == (2 * count + buffers, 2 * count, 6 * count)
    assert found.activations is not None
    assert found.total == 10 * count + buffers + max(found.activations + found.loss, 16 * count)
    assert (found.card, found.card_name) == memory.CARD or torch.cuda.is_available()
    assert found.fits


def test_checkpointing_counts_one_layer_or_the_loss(build: Any) -> None:
    with torch.device("meta"):
        model = build(torch.float32, packed=True)
    shape = memory.shape_of(model)
    assert shape is not None
    held = memory.activations(shape, TOKENS, 4, packed=True, checkpointing=True)
    nothing = memory.OptimizerBytes(0.0, 0, "")
    found = memory.estimate(model, nothing, "full", torch.float32, TOKENS, TOKENS, packed=True, checkpointing=True)
    assert found.loss == TOKENS * 384 * 12
    assert found.total == found.weights + found.gradients + held.kept + max(held.recomputed, found.loss)


def test_an_architecture_that_does_not_say_is_not_estimated() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    nothing = memory.OptimizerBytes(0.0, 0, "")
    found = memory.estimate(model, nothing, "full", torch.float32, TOKENS, 10, packed=False, checkpointing=False)
    assert found.activations is None
    assert found.total is None
    assert found.fits is None


def test_stored_scores_are_not_estimated(tiny_config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    assert memory.shape_of(model) is None
