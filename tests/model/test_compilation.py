"""model.compile: layers compiled once, for all rows; the same numbers; nothing else compiled.

torch.compile is given a backend that makes no machine code; `tests/engine/test_compile.py` has it made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import varlen_on_cpu
from transformers import PretrainedConfig

from lightning_trainer.adapters import LoraSettings, put_in
from lightning_trainer.generation import generate, uncompiled
from lightning_trainer.model import attention, compilation, varlen
from lightning_trainer.model.compilation import compile_layers
from lightning_trainer.model.probe import evaluating
from lightning_trainer.types import InputError, PreviewRequest, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's own, of torch

ROWS = [(5, 9, 3), (6, 2), (4, 4, 4, 4, 4, 4), (30,)]
"""Lengths of the examples of rows: no two have as many examples, or as many tokens."""


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without machine code; forgotten afterwards."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **settings: original(self, backend="eager", **settings)
    )
    torch.compiler.reset()
    attention.register(compiled=True)
    yield
    torch.compiler.reset()
    attention.register()


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation=attention.PACKED
    ).train()


@pytest.fixture
def frames() -> Callable[[], int]:
    """How many stretches of code were compiled so far."""
    from torch._dynamo.utils import counters

    counters.clear()
    return lambda: int(counters["frames"]["ok"])


def gradients(model: Any, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    tokens = sum(lengths)
    ids = (torch.arange(tokens) * 7 % model.config.vocab_size)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    told = attention.packed_arguments(lengths, torch.device("cpu"))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **told).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((logits * weights).sum(), trained))


def equal(model: Any, other: Any, lengths: tuple[int, ...]) -> None:
    for one, two in zip(gradients(model, lengths), gradients(other, lengths), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def lora(model: Any) -> Any:
    torch.manual_seed(0)
    put_in(model, LoraSettings(rank=4, alpha=8), "base")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def checkpointing(model: Any) -> Any:
    model.activation_checkpointing_enable()
    return model


@pytest.mark.parametrize("change", [lambda model: model, checkpointing, lora, lambda model: checkpointing(lora(model))])
def test_rows_of_any_layout_are_one_compilation(model: Any, frames: Any, change: Callable[[Any], Any]) -> None:
    model = change(model)
    plain = copy.deepcopy(model)
    assert compile_layers(model) == 2
    equal(model, plain, ROWS[0])
    made = frames()
    assert made >= 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ROWS[1:]:
            equal(model, plain, lengths)
    assert frames() == made


def windows(model: Any) -> Any:
    """One of two layers sees six tokens: fewer than some rows' examples have, more than others'."""
    model.model.layers[0].self_attn.sliding_window = 6
    return model


@pytest.fixture(params=[varlen._torchs, varlen._older_torchs])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's attention for rows of unequal lengths, for a CPU and any dtype."""
    if request.param is varlen._torchs and "enable_gqa" not in varlen._torchs_arguments():
        pytest.skip("a newer torch's")
    varlen_on_cpu.install()
    monkeypatch.setattr(varlen, "takes", lambda query, value: True)
    return request.param


@pytest.mark.parametrize(
    "change", [lambda model: model, windows, checkpointing, lora, lambda model: checkpointing(lora(model))]
)
def test_torchs_kernel_is_taken_into_a_layers_code(
    model: Any, frames: Any, change: Callable[[Any], Any], kernel: Any
) -> None:
    from torch._dynamo.utils import counters

    model = change(model)
    attention.register()
    expected = [gradients(model, lengths) for lengths in ROWS]
    attention.register(compiled=True, kernel=kernel)
    compile_layers(model)
    found = [gradients(model, ROWS[0])]
    assert frames() >= 1
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [gradients(model, lengths) for lengths in ROWS[1:]]
    for ours, theirs in zip(found, expected, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_torchs_kernel_does_not_take_is_called_as_it_is(
    dropout: float, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*_: Any) -> torch.Tensor:
        raise AssertionError("it was asked")

    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    monkeypatch.setattr(varlen, "is_traceable", lambda kernel: True)
    if dropout:
        monkeypatch.setattr(varlen, "takes", lambda query, value: True)
    attention.register()
    torch.manual_seed(0)
    expected = gradients(model, ROWS[0])
    attention.register(compiled=True, kernel=kernel)
    compile_layers(model)
    torch.manual_seed(0)
    for one, two in zip(gradients(model, ROWS[0]), expected, strict=True):  # fp32
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "asked"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_devices_kernel_is_asked_for_in_16_bits(
    model: Any, dtype: torch.dtype, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(varlen, "kernel_on", lambda device: f"of {device}")
    monkeypatch.setattr(attention, "register", lambda compiled=False, kernel=None: found.append((compiled, kernel)))
    model = model.to(dtype)
    compilation.start(model, nats(model), list(model.parameters()), None, validates=False)
    assert found == [(True, "of cpu" if asked else None)]


def test_a_model_is_saved_as_it_was(model: Any) -> None:
    names = list(model.state_dict())
    compile_layers(model)
    gradients(model, ROWS[0])
    assert list(model.state_dict()) == names
    equal(copy.deepcopy(model), model, ROWS[1])


def test_generation_compiles_nothing(model: Any, frames: Any) -> None:
    plain = copy.deepcopy(model)
    compile_layers(model)
    asked = [PreviewRequest((5, 6, 7)), PreviewRequest((8, 9))]
    texts = [
        [answer.token_ids for answer in generate(m, asked, SamplingParams(max_new_tokens=6))] for m in (model, plain)
    ]
    assert texts[0] == texts[1]
    with uncompiled():
        gradients(model, ROWS[0])
    assert frames() == 0
    gradients(model, ROWS[0])
    assert frames() >= 2


def nats(model: Any) -> Callable[[Any], torch.Tensor]:
    """As a loss of a batch; batches are lengths of examples here."""

    def of(lengths: Any) -> torch.Tensor:
        ids = (torch.arange(sum(lengths)) % model.config.vocab_size)[None]
        told = attention.packed_arguments(lengths, torch.device("cpu"))
        return model(input_ids=ids, attention_mask=None, use_cache=False, **told).logits.sum() + torch.rand(())

    return of


def test_trying_is_all_the_compiling_there_is(model: Any, frames: Any) -> None:
    """In training and in validation."""
    attention.register()
    compilation.start(model, nats(model), list(model.parameters()), ROWS[0], validates=True)  # type: ignore[arg-type]
    made = frames()
    assert made >= 4
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ROWS:
            nats(model)(lengths).backward()
            with evaluating(model), torch.no_grad():  # as Lightning validates in a fit
                nats(model)(lengths)
    assert frames() == made


def test_trying_leaves_nothing_behind(model: Any) -> None:
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compilation.start(model, nats(model), list(model.parameters()), ROWS[0], validates=True)  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_a_run_begins_with_nothing_compiled(model: Any, frames: Any) -> None:
    """torch makes eight versions of a function at most: not eight for all runs of a process."""
    made = []
    for _ in range(2):
        again = copy.deepcopy(model)
        compilation.start(again, nats(again), list(again.parameters()), ROWS[0], validates=False)  # type: ignore[arg-type]
        made.append(frames())
    assert made[1] == 2 * made[0] > 0


def test_a_compiler_that_fails_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **_: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, backend=broken)),
    )
    with pytest.raises(InputError, match="torch.compile fails here: .*no compiler here.*false") as caught:
        compilation.start(model, nats(model), list(model.parameters()), (12,), validates=True)  # type: ignore[arg-type]
    assert caught.value.key == "model.compile"


def test_a_model_without_layers_is_refused() -> None:
    model: Any = torch.nn.Linear(2, 2)
    model.config, model.dtype, model.device = PretrainedConfig(), torch.float32, torch.device("cpu")
    with pytest.raises(InputError, match="Linear does not say which of its modules are layers") as caught:
        compilation.start(model, lambda batch: torch.zeros(()), [], None, validates=False)
    assert caught.value.key == "model.compile"
