"""Batched answers against transformers' own generate, and that the model is left as it was found."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_trainer import generation, pretrained
from lightning_trainer.generation import first_difference, generate, quiet
from lightning_trainer.model import attention
from lightning_trainer.types import (
    AfterSequence,
    ForbidTokens,
    PreviewRequest,
    RepetitionPenalty,
    SamplingParams,
    TokenPenalty,
)

PROMPTS = ((5, 6, 7), (11, 12, 13, 14, 15, 16, 17, 18, 19), (301,), (9, 8, 7, 6, 5, 4))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """Weights wide enough apart that greedy answers wander; no ties that rounding could decide."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wander") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tiny_config(initializer_range=0.4, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_dir: Path) -> Any:
    """As in packed training: our attention, in train mode, gradient checkpointing on."""
    attention.register()
    loaded = pretrained.load_model(str(model_dir), torch.float32, attn_implementation=attention.PACKED)
    loaded.train()
    loaded.activation_checkpointing_enable({"use_reentrant": False})
    return loaded


def ask(prompts: Any = PROMPTS, rules: Any = ()) -> list[PreviewRequest]:
    return [PreviewRequest(prompt_ids=p, rules=tuple(rules)) for p in prompts]


def greedy(tokens: int = 16, stop: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, temperature=0, stop_token_ids=stop)


def tokens_of(answers: Any) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def by_hand(model_dir: Path, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Greedy, without a cache: the whole prefix again for every token."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_batched_answers_are_those_of_a_loop_without_cache(model: Any, model_dir: Path) -> None:
    answers = generate(model, ask(), greedy())
    assert tokens_of(answers) == [by_hand(model_dir, prompt, 16) for prompt in PROMPTS]
    assert {a.finish_reason for a in answers} == {"length"}
    assert len({a.token_ids for a in answers}) == len(PROMPTS)


def test_batched_answers_are_single_ones(model: Any) -> None:
    alone = [generate(model, [request], greedy())[0].token_ids for request in ask()]
    assert tokens_of(generate(model, ask(), greedy())) == alone
    assert tokens_of(generate(model, ask()[::-1], greedy()))[::-1] == alone


def test_more_prompts_than_a_batch_holds_keep_their_order(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens_of(generate(model, ask(), greedy()))
    monkeypatch.setattr(generation, "PROMPTS_PER_BATCH", 3)
    assert tokens_of(generate(model, ask(), greedy())) == whole
    hot = SamplingParams(max_new_tokens=16, temperature=1.5, seed=40)
    apart = [generate(model, ask()[3 * n : 3 * n + 3], replace(hot, seed=40 + n)) for n in range(2)]
    assert tokens_of(generate(model, ask()[:6], hot)) == [row for batch in apart for row in tokens_of(batch)]
    assert generate(model, [], greedy()) == []


def test_generate_of_an_sdpa_copy_says_the_same(model: Any, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    for prompt, answer in zip(PROMPTS, generate(model, ask(), greedy()), strict=True):
        want = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                              max_new_tokens=16, do_sample=False, pad_token_id=0)  # fmt: skip
        assert answer.token_ids == tuple(want[0, len(prompt) :].tolist())


def state_of(model: Any) -> dict[str, Any]:
    return {
        "flags": [m.training for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "generation_config": model.generation_config.to_dict(),
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "weights": [p.detach().clone().tolist() for p in model.parameters()],
        "buffers": [b.tolist() for b in model.buffers()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_is_left_as_it_was(model: Any, temperature: float) -> None:
    model.model.layers[1].eval()  # on purpose: a blanket train() would undo it
    before = state_of(model)
    generate(model, ask(), SamplingParams(max_new_tokens=4, temperature=temperature))
    assert state_of(model) == before
    assert model.is_activation_checkpointing


def test_the_model_is_left_as_it_was_when_generation_raises(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].eval()
    before = state_of(model)

    def broken(*_: Any, **__: Any) -> None:
        torch.rand(1)
        random.random()
        np.random.rand()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, ask(), greedy())
    assert state_of(model) == before


def test_the_model_is_left_as_it_was_when_its_attention_cannot_be_set(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(model)

    def broken(name: str) -> None:
        raise ValueError(f"does not support {name}")

    monkeypatch.setattr(model, "set_attn_implementation", broken)
    with pytest.raises(ValueError, match="does not support sdpa"):
        generate(model, ask(), greedy())
    assert state_of(model) == before


def test_within_quiet_everything_is_still(model: Any) -> None:
    with quiet(model):
        assert not any(m.training for m in model.modules())
        assert not model.is_activation_checkpointing
        assert model.config._attn_implementation == "sdpa"
        assert model.config.use_cache is True


def test_an_attention_the_user_chose_stays(model: Any) -> None:
    model.set_attn_implementation("eager")
    with quiet(model):
        assert model.config._attn_implementation == "eager"


def test_training_goes_on_as_if_nothing_had_been_asked(model: Any) -> None:
    """A dropout model: previews in between neither draw from the generator nor change the gradient."""
    ids = torch.arange(1, 9)[None]
    grads = []
    for asked in (False, True):
        model.zero_grad()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.3
        torch.manual_seed(5)
        torch.rand(3)
        if asked:
            generate(model, ask(), SamplingParams(max_new_tokens=5, temperature=1.0))
        model(
            input_ids=ids,
            labels=ids,
            use_cache=False,
            examples=attention.Examples((8,)),
            position_ids=torch.arange(8)[None],
        ).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_sampling_is_a_function_of_the_seed(model: Any) -> None:
    def sample(seed: int) -> list[tuple[int, ...]]:
        torch.rand(7)
        return tokens_of(generate(model, ask(), SamplingParams(max_new_tokens=12, temperature=1.5, seed=seed)))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_one_token_kept_is_greedy(model: Any) -> None:
    want = tokens_of(generate(model, ask(), greedy(8)))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampling = SamplingParams(**{"max_new_tokens": 8, "temperature": 1.0, **narrow})
        assert tokens_of(generate(model, ask(), sampling)) == want


def test_a_stop_token_ends_an_answer_and_is_part_of_it(model: Any) -> None:
    free = tokens_of(generate(model, ask(), greedy()))
    stop = free[0][3]
    answers = generate(model, ask(), greedy(stop=(383, stop)))
    for before, answer in zip(free, answers, strict=True):
        end = before.index(stop) + 1 if stop in before else len(before)
        assert answer.token_ids == before[:end]
        assert answer.finish_reason == ("eos" if stop in before else "length")
    assert answers[0].finish_reason == "eos"


def test_nan_weights_are_said_to_be_non_finite(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        answers = generate(model, ask(), SamplingParams(max_new_tokens=3, temperature=temperature))
        assert [(a.token_ids, a.finish_reason) for a in answers] == [((), "non_finite")] * len(PROMPTS)


def loaded_with(model_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> Any:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return pretrained.load_model(str(folder), torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.6, "repetition_penalty": 1.5},  # Qwen's kind
        {"no_repeat_ngram_size": 1},
        {"max_length": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        pytest.param({"suppress_tokens": list(range(300))}),
        pytest.param({"bad_words_ids": [[token] for token in range(300)]}),
        pytest.param({"sequence_bias": [[[7], 1e4]]}),
        pytest.param({"min_new_tokens": 5, "eos_token_id": 7}),
        pytest.param({"num_beams": 3}),
        pytest.param({"return_dict_in_generate": True}),
        pytest.param({"stop_strings": "a"}),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_generation_config_does_not_change_greedy_answers(
    model: Any, model_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    want = generate(model, ask(), greedy(stop=(383,)))
    got = generate(loaded_with(model_dir, tmp_path, settings), ask(), greedy(stop=(383,)))
    assert [(a.token_ids, a.finish_reason) for a in got] == [(a.token_ids, a.finish_reason) for a in want]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1, "top_p": 0.01, "temperature": 0.01, "do_sample": True},
        pytest.param({"min_p": 0.9, "do_sample": True}),
        pytest.param({"typical_p": 0.01, "do_sample": True}),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_nor_sampled_ones(model: Any, model_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.5, stop_token_ids=(383,))
    got = generate(loaded_with(model_dir, tmp_path, settings), ask(), sampling)
    assert tokens_of(got) == tokens_of(generate(model, ask(), sampling))


def test_without_stop_tokens_the_models_own_do_not_stop_it(model: Any, model_dir: Path, tmp_path: Path) -> None:
    want = tokens_of(generate(model, ask(), greedy()))
    got = generate(loaded_with(model_dir, tmp_path, {"eos_token_id": want[0][2]}), ask(), greedy())
    assert tokens_of(got) == want


def test_rules_act_on_their_own_row(model: Any) -> None:
    free = tokens_of(generate(model, ask(), greedy()))
    forbidden = free[1][0]
    requests = ask()
    requests[1] = PreviewRequest(prompt_ids=PROMPTS[1], rules=(ForbidTokens((forbidden,)),))
    requests[2] = PreviewRequest(prompt_ids=PROMPTS[2], rules=(TokenPenalty((42,), -1e6),))  # a bonus: always 42
    answers = tokens_of(generate(model, requests, greedy()))
    assert forbidden not in answers[1]
    assert answers[1] != free[1]
    assert answers[2] == (42,) * 16
    assert [answers[0], answers[3]] == [free[0], free[3]]


def test_rules_do_not_look_at_the_prompt(model: Any) -> None:
    """The trigger stands in the prompt, and left padding must not count as generated either."""
    free = tokens_of(generate(model, ask(), greedy(6)))
    rule = AfterSequence(triggers=((13, 14),), base_penalty=1e6, growth=1.0, max_penalty=1e6, exempt_ids=(50,))
    pad = AfterSequence(triggers=((0,),), base_penalty=1e6, growth=1.0, max_penalty=1e6, exempt_ids=(50,))
    assert tokens_of(generate(model, ask(rules=(rule, pad)), greedy(6))) == free


def test_a_forbidden_token_is_not_taken_for_a_broken_model(model: Any) -> None:
    answers = generate(model, ask(rules=(ForbidTokens(tuple(range(100))),)), greedy(4))
    assert {a.finish_reason for a in answers} == {"length"}
    assert all(token >= 100 for a in answers for token in a.token_ids)


@pytest.mark.parametrize(
    "rule",
    [
        TokenPenalty(tuple(range(64)), 1e308),
        RepetitionPenalty(1e-300, 4),
        AfterSequence(((5,),), base_penalty=1e300, growth=1e10, max_penalty=1e308, exempt_ids=(2,), exempt_bonus=1e308),
    ],
)
@pytest.mark.parametrize("temperature", [1e-4, 0.5])
def test_no_rule_makes_what_cannot_be_drawn_from(model: Any, rule: Any, temperature: float) -> None:
    """On a GPU it would end the process."""
    requests = [replace(request, rules=(rule,)) for request in ask()]
    answers = generate(model, requests, SamplingParams(max_new_tokens=6, temperature=temperature))
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_answers_part_at_the_first_token_that_differs(model: Any, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = PROMPTS[1]
    [ours] = tokens_of(generate(model, ask([prompt]), greedy()))
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt + ours[:5]]), use_cache=False).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    assert best == ours[5]
    before = state_of(model)
    found = first_difference(model, prompt, ours, (*ours[:5], second, *ours[6:9], 7))
    assert found is not None
    assert found[:3] == (5, best, second)
    assert found[3] == pytest.approx(float(logits[best] - logits[second]), abs=1e-4)
    assert state_of(model) == before


def test_the_first_token_may_differ_and_the_other_may_be_nearer(model: Any) -> None:
    [ours] = tokens_of(generate(model, ask([PROMPTS[0]]), greedy()))
    other = (ours[0] + 1) % 384
    forward, back = (first_difference(model, PROMPTS[0], *pair) for pair in ((ours, [other]), ([other], ours)))
    assert forward is not None
    assert back is not None
    assert (forward[:3], back[:3]) == ((0, ours[0], other), (0, other, ours[0]))
    assert forward[3] == -back[3] > 0


@pytest.mark.parametrize(("ours", "theirs"), [((1, 2), (1, 2)), ((1, 2), (1, 2, 3)), ((), (1,))])
def test_equal_answers_and_the_beginning_of_one_do_not_part(model: Any, ours: Any, theirs: Any) -> None:
    assert first_difference(model, PROMPTS[0], ours, theirs) is None
