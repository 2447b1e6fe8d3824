"""What the audit finds, and what it lets stand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_trainer.model.optim import CompensatedAdamW
from lightning_trainer.precision.audit import exceptions, wrong_gradients, wrong_moments, wrong_weights

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def build(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Mistral", "Gemma2", "Mixtral", "GPT2"])
def test_models_as_transformers_builds_them_pass(name: str, dtype: torch.dtype) -> None:
    assert wrong_weights(build(name, dtype), dtype) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Gemma3Text", "Olmo3"])
def test_models_with_frequencies_for_each_layer_type_pass(name: str, dtype: torch.dtype) -> None:
    assert wrong_weights(build(name, dtype), dtype) == []


def test_rotary_frequencies_are_fp32_in_a_bf16_model() -> None:
    model = build("Qwen3", torch.bfloat16)
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("inv_freq")} == {torch.float32}


def test_parameters_and_buffers_are_named() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Linear(2, 2, dtype=torch.bfloat16)
            self.bad = nn.Linear(2, 2, bias=False)
            self.register_buffer("table", torch.zeros(2, dtype=torch.float64))
            self.register_buffer("places", torch.arange(3))  # integers are no matter of precision
            self.register_buffer("inv_freq", torch.zeros(2))

    assert wrong_weights(Wrong(), torch.bfloat16) == ["param bad.weight: torch.float32", "buffer table: torch.float64"]


def test_modules_declared_to_stay_in_fp32_may_but_in_no_third_dtype() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules_strict = ("router",)

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.router = nn.Linear(2, 2, bias=False, dtype=dtype)

    whole = nn.Sequential(Model(torch.float32), Model(torch.bfloat16), Model(torch.float16))
    assert wrong_weights(whole, torch.bfloat16) == ["param 2.router.weight: torch.float16"]


def test_gradients_of_another_dtype_are_named() -> None:
    model = build("Qwen3", torch.bfloat16)
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None], use_cache=False).loss.backward()
    assert wrong_gradients(model) == []
    weight = model.model.norm.weight
    # torch itself refuses a gradient of another dtype, unless it is told
    weight.grad = None
    weight.grad_dtype = None
    weight.grad = torch.zeros(16)
    assert wrong_gradients(model) == ["gradient of model.norm.weight: torch.float32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_the_compensated_optimizer_pass(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2, dtype=dtype)
    optimizer = CompensatedAdamW(layer.parameters())
    _step(layer, optimizer)
    assert wrong_moments(optimizer, layer) == []


def test_moments_of_another_dtype_are_named() -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    _step(layer, optimizer)
    assert wrong_moments(optimizer, layer) == []
    optimizer.state[layer.weight]["exp_avg"] = torch.zeros(2, 3)
    assert wrong_moments(optimizer, layer) == ["exp_avg of weight: torch.float32"]


def test_fp16_moments_are_refused() -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float16)
    optimizer = torch.optim.AdamW(layer.parameters())
    _step(layer, optimizer)
    assert wrong_moments(optimizer, layer) == [
        "exp_avg of weight: torch.float16",
        "exp_avg_sq of weight: torch.float16",
    ]


def test_the_audit_changes_nothing() -> None:
    model = build("Qwen3", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    wrong_weights(model, torch.float32)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_exceptions_are_in_words() -> None:
    assert exceptions(torch.float32) == {}
    assert exceptions(torch.bfloat16)["rotary frequencies"] == "fp32"
    assert exceptions(torch.bfloat16)["low_bits of compensated optimizers"] == "int16"
    assert exceptions(torch.float16)["moments"] == "fp32"


def _step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
