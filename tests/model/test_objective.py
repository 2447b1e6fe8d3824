"""Which loss a model takes, and that its batches cost what transformers says."""

import copy
from typing import Any

import pytest
import torch

from lightning_trainer.data.collate import Collator
from lightning_trainer.model import attention, objective


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["chunked", "full"])
def test_batch_loss_is_the_sum_of_transformers_own(tiny_config: Any, name: Any, packed: bool, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    from lightning_trainer.model import CausalLMModule

    attention.register()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(tie_word_embeddings=tied, initializer_range=0.2)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa")
    plain = copy.deepcopy(model)
    if packed:
        model.set_attn_implementation(attention.PACKED)
    rows = make_rows()
    module = CausalLMModule("unused", loss=name)
    module.model = model
    nats = module.nats(Collator(rows, packed, pad_id=0)(range(len(rows)), step_tokens=1))
    nats.backward()

    total = torch.zeros(())
    for ids, marks in rows:
        labels = torch.tensor([i if m else -100 for i, m in zip(ids.tolist(), marks.tolist(), strict=True)])[None]
        if marks.any():
            mean = plain(input_ids=torch.from_numpy(ids).long()[None], labels=labels, use_cache=False).loss
            total = total + mean * int(marks.sum())
    total.backward()
    assert float(nats.detach()) == pytest.approx(float(total.detach()), rel=1e-6, abs=1e-5)
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def make_rows() -> Any:
    """Unequal lengths and trained parts; one row with nothing trained."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for length, trained_from in ((9, 4), (3, 1), (17, 16), (6, 6), (12, 1)):
        marks = (np.arange(length) >= trained_from).astype(np.uint8)
        rows.append((rng.integers(0, 384, length).astype(np.int32), marks))
    return rows


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def small(name: str, **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Gemma2", {}, "final_logit_softcapping=30.0"),
        ("Cohere", {}, "logit_scale=0.0625"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        pytest.param("RecurrentGemma", {"lru_width": 16, "num_hidden_layers": 3}, "logits_soft_cap=30.0"),
    ],
)
def test_models_that_change_their_logits_are_named(name: str, changes: dict[str, Any], reason: str) -> None:
    why = objective.why_not_chunked(small(name, **changes))
    assert why is not None
    assert reason in why


def test_models_without_a_backbone_of_their_own_are_named() -> None:
    """`base_model` of Llama 4's text model is the model itself: it gives logits, no hidden states."""
    model = small("Llama4Text", num_local_experts=2, intermediate_size_mlp=16)
    assert model.base_model is model
    assert objective.why_not_chunked(model) is not None


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Gemma", "Mistral", "Granite", "Gemma3Text"])
def test_models_that_take_chunked_give_the_logits_it_assumes(name: str) -> None:
    model = small(name)
    ids = torch.arange(8)[None]
    assert objective.why_not_chunked(model) is None
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(logits, model.get_output_embeddings()(hidden))


def test_the_buffer_goes_from_batch_to_batch(tiny_config: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
    batch = Collator(make_rows(), False, pad_id=0)(range(5), step_tokens=1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    nats = objective.Objective("chunked")
    nats.nats(model, inputs, batch, 1.0).backward()
    kept = nats._buffer._kept
    assert kept is not None
    kept.fill_(torch.nan)
    found = nats.evaluate(model, inputs, batch)[0]
    assert not kept.isnan().any()
    assert nats._buffer._kept is kept
    torch.testing.assert_close(found, objective.Objective("full").evaluate(model, inputs, batch)[0])
