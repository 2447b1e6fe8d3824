"""The lock against a model, a length, and the lock of the run that is resumed."""

from dataclasses import replace
from typing import Any

import pytest

from lightning_trainer.lock import (
    Lock,
    check_length,
    check_model,
    check_resumed,
    facts_of_config,
    facts_of_model,
)
from lightning_trainer.types import InputError

LOCK = Lock("base", "Qwen3ForCausalLM", max_context_length=2048, vocab_size=384)


def test_configuration_and_model_say_the_same(tiny_config: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    assert facts_of_config(config) == facts_of_model(AutoModelForCausalLM.from_config(config))


def test_a_lock_that_fits(tiny_config: Any) -> None:
    facts = facts_of_config(tiny_config())
    check_model(LOCK, facts)
    check_model(replace(LOCK, model_architecture="qwen3"), facts)
    check_model(replace(LOCK, max_context_length=512), facts)  # a context may shrink
    check_model(LOCK, replace(facts, model_architecture=None, max_context_length=None))


def test_every_field_that_differs_is_named_with_both_values(tiny_config: Any) -> None:
    lock = Lock("base", "LlamaForCausalLM", max_context_length=4096, vocab_size=400)
    with pytest.raises(InputError) as caught:
        check_model(lock, facts_of_config(tiny_config()))
    assert str(caught.value).splitlines() == [
        "the model is not what the lock says:",
        "  model_architecture: the lock says 'LlamaForCausalLM', the model has 'Qwen3ForCausalLM'",
        "  vocab_size: the lock says 400, the model has 384",
        "  max_context_length: the lock says 4096, the model has 2048",
        "this is another model, or the lock is another model's",
    ]


def test_rows_lie_within_the_context() -> None:
    check_length(LOCK, 2048)
    with pytest.raises(InputError, match=r"max_length is 2049, the lock's max_context_length 2048"):
        check_length(LOCK, 2049)


def test_on_resume_a_context_may_shrink_and_nothing_else_change() -> None:
    check_resumed(LOCK.as_dict(), LOCK)
    check_resumed(LOCK.as_dict(), replace(LOCK, max_context_length=1024, created_at="today"))
    changed = replace(LOCK, base_model="other", max_context_length=4096, model_version="v2")
    with pytest.raises(InputError) as caught:
        check_resumed(LOCK.as_dict(), changed)
    assert str(caught.value).splitlines()[1:4] == [
        "  base_model: was 'base', is 'other'",
        "  model_version: was 'v1', is 'v2'",
        "  max_context_length: was 2048, is 4096",
    ]
