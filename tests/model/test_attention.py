"""Packed attention against separate rows."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.model import attention

LENGTHS = (5, 1, 12, 7)
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


def build(name: str, **changes: Any) -> Any:
    import transformers

    attention.register()
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.PACKED
        )


def plain_copy(model: Any, name: str = "sdpa") -> Any:
    plain = copy.deepcopy(model)
    plain.set_attn_implementation(name)
    return plain


def examples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (n,), generator=generator) for n in LENGTHS]


def packed_logits(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    return model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(r)) for r in rows])[None],
        attention_mask=None,
        use_cache=False,
        examples=attention.Examples([len(r) for r in rows]),
    ).logits[0]


def separate_logits(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def pull(logits: torch.Tensor) -> torch.Tensor:
    """A scalar that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (logits * weights).sum()


MODELS = [
    ("Qwen3", {}),
    ("Llama", {"num_key_value_heads": 4}),
    ("Mistral", {"sliding_window": 4}),
    ("Mistral", {"sliding_window": 12}),
    ("Gemma3Text", {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("name", "changes"), MODELS)
def test_packed_equals_separate_rows(name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes)
    plain, rows = plain_copy(model), examples()
    mine, theirs = packed_logits(model, rows), separate_logits(plain, rows)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    pull(mine).backward()
    pull(theirs).backward()
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_qwen3_packed_is_the_lone_row() -> None:
    model, rows = build("Qwen3"), examples()
    with torch.no_grad():
        together = packed_logits(model, rows).split(LENGTHS)
        alone = [separate_logits(plain_copy(model), [row]) for row in rows]
    assert max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)) < 1e-5


@pytest.mark.parametrize(("name", "changes"), [MODELS[0], MODELS[2]])
def test_gradient_checkpointing_changes_nothing(name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes).train()
    again = copy.deepcopy(model)
    again.activation_checkpointing_enable({"use_reentrant": False})
    for m in (model, again):
        pull(packed_logits(m, examples())).backward()
    for (key, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("Gemma2", {}, "Gemma2Attention uses a score soft-cap"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "GptOssAttention uses attention sinks"),
    ],
)
def test_what_sdpa_cannot_do_is_refused_by_name(name: str, changes: dict[str, Any], match: str) -> None:
    model = build(name, **changes)
    with pytest.raises(ValueError, match=match):
        packed_logits(model, examples())


def test_the_positions_are_not_read_for_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks into them on the host, where it makes a mask: a wait for the device in every forward."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: pytest.fail("read"))
    packed_logits(build("Qwen3"), examples())


def test_calls_that_are_not_packed_rows_are_refused() -> None:
    q = torch.zeros(1, 2, 4, 8)
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="does not hand `examples` on"):
        attention.packed_attention(torch.nn.Identity(), q, q, q, None)
    for query, m, lengths in ((q.expand(2, -1, -1, -1), None, (4,)), (q, mask, (4,))):
        with pytest.raises(ValueError, match="one row and no mask"):
            attention.packed_attention(torch.nn.Identity(), query, q, q, m, examples=attention.Examples(lengths))
    with pytest.raises(RuntimeError):  # lengths that do not add up to the row
        attention.packed_attention(torch.nn.Identity(), q, q, q, None, examples=attention.Examples((1, 2)))


@pytest.mark.parametrize("name", ["position_bias", "indices"])
def test_arguments_that_would_change_the_scores_are_not_swallowed(name: str) -> None:
    """Models of transformers hand these to their attention; leaving them out is another model."""
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=name):
        attention.packed_attention(
            torch.nn.Identity(), q, q, q, None, examples=attention.Examples((4,)), **{name: torch.zeros(1)}
        )


def test_chunked_attention_is_right_or_refused() -> None:
    """Llama 4: local layers attend within chunks of `attention_chunk_size` tokens, told by the mask alone."""
    model = build("Llama4Text", num_local_experts=2, intermediate_size_mlp=16, attention_chunk_size=4)
    rows = examples()
    with torch.no_grad():
        want = separate_logits(plain_copy(model), rows)
        with contextlib.suppress(ValueError):  # a refusal is as good
            torch.testing.assert_close(packed_logits(model, rows), want, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 10),
    groups=st.sampled_from([1, 2, 4]),
    scaling=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 99),
)
def test_against_a_loop_over_tokens(
    lengths: list[int], window: int | None, groups: int, scaling: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, heads, depth = sum(lengths), 4, 6
    q = torch.randn(1, heads, size, depth, generator=generator)
    k, v = (torch.randn(1, heads // groups, size, depth, generator=generator) for _ in range(2))
    got, weights = attention.packed_attention(
        torch.nn.Identity(), q, k, v, None, examples=attention.Examples(lengths), sliding_window=window, scaling=scaling
    )
    assert weights is None
    starts = [start for i, n in enumerate(lengths) for start in [sum(lengths[:i])] * n]
    for token in range(size):
        first = max(starts[token], token + 1 - window if window else 0)
        for h in range(heads):
            keys, values = (x[0, h // groups, first : token + 1] for x in (k, v))
            scores = keys @ q[0, h, token] * (depth**-0.5 if scaling is None else scaling)
            torch.testing.assert_close(got[0, token, h], scores.softmax(0) @ values, rtol=1e-4, atol=1e-5)
