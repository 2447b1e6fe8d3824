"""Tensors as both sides name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_trainer import adapters
from lightning_trainer.adapters import LoraSettings
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.errors import Refusal
from lightning_trainer.rpc.layout import (
    check_manifest,
    content_digest,
    differing,
    identity_of,
    layout_of,
    model_tensors,
    raw_bytes,
)

Make = Callable[..., Any]


@pytest.fixture
def model(tiny_config: Make) -> Make:
    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        return AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=dtype)

    return make


def test_tied_weights_come_once(model: Make) -> None:
    tied, untied = (set(model_tensors(model(tie_word_embeddings=tie))) for tie in (True, False))
    assert untied - tied == {"lm_head.weight"}
    assert list(model_tensors(model())) == sorted(model_tensors(model()))


def test_adapters_leave_the_identity_of_what_is_beneath(model: Make) -> None:
    plain = identity_of(model())
    for settings in (LoraSettings(rank=4), LoraSettings(rank=4, use_dora=True, modules_to_save=["embed_tokens"])):
        adapted = model()
        adapters.put_in(adapted, settings, "base")
        assert identity_of(adapted) == plain


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"dtype": torch.bfloat16}, ["dtype", "layout_sha256", "total_bytes"]),
        ({"vocab_size": 500}, ["vocab_size", "config_sha256", "layout_sha256", "total_bytes"]),
        ({"rope_theta": 5.0}, ["config_sha256"]),
        ({"use_cache": False, "eos_token_id": 7}, []),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], fields: list[str], model: Make) -> None:
    assert differing(identity_of(model()), identity_of(model(**changes))) == fields


def test_a_frozen_base_is_compared_where_both_name_one(model: Make) -> None:
    found = model()
    one, two, none = (identity_of(found, digest) for digest in (b"1", b"2", b""))
    assert differing(one, two) == ["frozen_base_sha256"]
    assert differing(one, none) == []


def test_raw_bytes_are_the_values() -> None:
    values = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert bytes(raw_bytes(values)) == bytes.fromhex("803f00c0")
    assert bytes(raw_bytes(torch.tensor(1.0))) == bytes.fromhex("0000803f")
    assert (
        bytes(raw_bytes(torch.arange(6.0).reshape(2, 3).t())) == torch.arange(6.0).reshape(2, 3).t().numpy().tobytes()
    )


def test_packed_weights_cannot_be_sent() -> None:
    with pytest.raises(Refusal, match="only bfloat16, float16 and float32"):
        layout_of({"w": torch.zeros(2, dtype=torch.uint8)})


def test_content_by_hand() -> None:
    one, two = hashlib.sha256(b"1").digest(), hashlib.sha256(b"2").digest()
    assert content_digest([one, two]) == hashlib.sha256(one + two).digest()


def manifest(model: Any) -> list[pb.TensorEntry]:
    return [entry.to_wire(bytes(32)) for entry in layout_of(model_tensors(model))]


def test_a_manifest_is_the_layout(model: Make) -> None:
    found = model()
    check_manifest(manifest(found), layout_of(model_tensors(found)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../etc/passwd"),
        ("dtype", pb.DTYPE_F16),
        ("dtype", 0),
        ("shape", [4194305, 4194305, 211106198978564]),
        ("shape", [1] * 9),
        ("nbytes", 2**64 - 1),
        ("encoded_nbytes", 0),
        ("encoding", 0),
        ("sha256", b"short"),
    ],
)
def test_a_manifest_defines_nothing(field: str, value: Any, model: Make) -> None:
    found = model()
    entries = manifest(found)
    if isinstance(value, list):
        entries[3].shape[:] = value
    else:
        setattr(entries[3], field, value)
    with pytest.raises(Refusal) as refused:
        check_manifest(entries, layout_of(model_tensors(found)))
    assert refused.value.fields == (field,)


@pytest.mark.parametrize(
    "change", [lambda e: e[1:], lambda e: [*e, e[-1]], lambda e: [e[1], e[0], *e[2:]], lambda e: []]
)
def test_no_tensor_more_or_less_or_elsewhere(change: Any, model: Make) -> None:
    found = model()
    with pytest.raises(Refusal):
        check_manifest(change(manifest(found)), layout_of(model_tensors(found)))
