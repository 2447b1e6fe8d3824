"""The packing probe on models that keep examples apart and on models that do not."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_trainer.model import attention, probe
from lightning_trainer.types import InputError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def build(name: str, attn: str = attention.PACKED, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    import transformers

    attention.register()
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)


CONV = {"layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn", [attention.PACKED, "sdpa", "eager"])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral"])
def test_models_that_keep_examples_apart_pass(name: str, attn: str, dtype: torch.dtype) -> None:
    probe.refuse_leaks(build(name, attn, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "attn", "changes"),
    [
        ("GptOss", "eager", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("Lfm2", attention.PACKED, CONV),
        ("Lfm2", "sdpa", CONV),
    ],
)
def test_models_that_leak_are_refused(name: str, attn: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"lets packed examples see each other.*`data\.packing: false`") as caught:
        probe.refuse_leaks(build(name, attn, dtype, **changes))
    assert caught.value.key == "data.packing"
    assert name in str(caught.value)


def test_a_mask_that_turns_the_detection_of_packed_rows_off_is_found() -> None:
    """What transformers does by itself where a mask or a cache is given: one causal row."""
    model = build("Qwen3", "sdpa")
    forward = model.forward

    def with_mask(**inputs: Any) -> Any:
        return forward(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})

    model.forward = with_mask
    assert probe.packing_leak(model).leak > 0.1
    with pytest.raises(InputError, match="data.packing: false"):
        probe.refuse_leaks(model)


def test_a_full_gpu_is_not_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "packing_leak", full)
    with pytest.raises(torch.OutOfMemoryError):
        probe.refuse_leaks(build("Qwen3"))


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_models_our_attention_refuses_are_named_with_the_way_out(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}.* cannot take packed rows: .*`data\.packing: false`"):
        probe.refuse_leaks(build(name, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weak_leak_of_fresh_weights_is_found(dtype: torch.dtype) -> None:
    """Random weights as `from_scratch` makes them mix little at first; training makes it more."""
    with pytest.raises(InputError):
        probe.refuse_leaks(build("Lfm2", dtype=dtype, initializer_range=0.02, **CONV))


def test_logits_that_are_nan_do_not_pass() -> None:
    model = build("Qwen3")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError):
        probe.refuse_leaks(model)


def test_the_probe_leaves_no_trace() -> None:
    model = build("Qwen3", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.activation_checkpointing_enable({"use_reentrant": False})
    flags = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    probe.refuse_leaks(model)
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.is_activation_checkpointing
