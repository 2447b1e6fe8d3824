"""What every preview backend keeps to, run on the local one."""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lightning_trainer import pretrained, template
from lightning_trainer.data.collate import Collator
from lightning_trainer.model import CausalLMModule, CompensatedAdamW, attention
from lightning_trainer.preview import LocalPreviewBackend, PreviewBackend, Prompter
from lightning_trainer.preview.base import failed
from lightning_trainer.profiles.base import DataProfile
from lightning_trainer.types import CheckResult, ForbidTokens, PreviewRequest, PreviewResult

BACKENDS: list[type[PreviewBackend]] = [LocalPreviewBackend]


class Echo(DataProfile):
    """Adds a system prompt, a rule and a check that can be told apart from no profile at all."""

    name: ClassVar[str] = "test-echo"

    def build_logits_rules(self, tokenizer: Any, prompt: str = "") -> Any:
        return (ForbidTokens((len(prompt),)),)

    def check(self, prompt: str, golden: str | None, answer: str) -> CheckResult:
        return CheckResult(ok=True, correct=False, reason=f"{prompt}|{golden}|{len(answer) >= 0}")


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    attention.register()
    return pretrained.load_model(str(tiny_model_dir), torch.float32, attn_implementation=attention.PACKED).train()


@pytest.fixture
def prompter(tokenizer: Any) -> Prompter:
    return Prompter(Echo(), tokenizer, system_prompt="Be brief.")


@pytest.fixture(params=BACKENDS, ids=lambda cls: cls.__name__)
def backend(request: Any, prompter: Prompter, model: Any) -> Any:
    made = request.param()
    made.bind(prompter, model)
    yield made
    made.close()


def collect_all(backend: PreviewBackend, count: int) -> list[PreviewResult]:
    results: list[PreviewResult] = []
    end = time.monotonic() + 20
    while len(results) < count and time.monotonic() < end:
        results += backend.collect(timeout=1.0)
    return results


def test_answers_come_once_in_order_and_labelled(backend: PreviewBackend, prompter: Prompter) -> None:
    requests = [
        prompter.request({"prompt": f"what is {n}?"}, prompt_id=f"id-{n}", golden=f"gold {n}", step=40)
        for n in range(3)
    ]
    sampling = prompter.sampling(max_new_tokens=5, temperature=0.0, seed=9)
    backend.submit(requests, sampling, step=40)
    results = collect_all(backend, 3)
    assert [r.prompt_id for r in results] == ["id-0", "id-1", "id-2"]
    assert [r.prompt for r in results] == ["what is 0?", "what is 1?", "what is 2?"]
    assert [r.golden_answer for r in results] == ["gold 0", "gold 1", "gold 2"]
    for result in results:
        assert result.success
        assert result.error_message is None
        assert (result.step, result.weights_step, result.seed) == (40, 40, 9)
        assert result.backend_type == type(backend).backend_type
        assert 1 <= result.tokens_generated <= 5
        assert result.finish_reason in ("eos", "length")
        assert abs(result.timestamp - time.time()) < 60
        assert result.tokens_per_sec == pytest.approx(result.tokens_generated / result.generation_time_sec)
        assert result.check == CheckResult(True, False, f"{result.prompt}|{result.golden_answer}|True")
        assert result.prompt not in result.text
    assert backend.collect() == []


def test_two_submits_keep_their_own_steps(backend: PreviewBackend, prompter: Prompter) -> None:
    for step in (10, 20):
        request = prompter.request({"prompt": "hello"}, prompt_id="0", step=step)
        backend.submit([request], prompter.sampling(max_new_tokens=2, temperature=0.0), step)
    assert [(r.step, r.weights_step) for r in collect_all(backend, 2)] == [(10, 10), (20, 20)]


def test_greedy_answers_repeat(backend: PreviewBackend) -> None:
    first, second = (backend.preview("hello world", temperature=0.0, max_new_tokens=6) for _ in range(2))
    assert first.text == second.text


def test_preview_is_one_prompt_now(backend: PreviewBackend) -> None:
    result = backend.preview("what is 2 + 2?", "4", step=7, max_new_tokens=3, temperature=0.5, seed=11, top_k=5)
    assert (result.prompt, result.golden_answer, result.step, result.weights_step) == ("what is 2 + 2?", "4", 7, 7)
    assert result.seed == 11
    assert result.tokens_generated <= 3
    assert result.check is not None
    assert backend.collect() == []


def test_the_prompt_is_the_training_prompt(prompter: Prompter, tokenizer: Any) -> None:
    """Tokens of the preview's prompt are the beginning of the training row's, which goes on with the answer."""
    row = {"messages": [{"role": "user", "content": "what is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
    trained = Echo().transform_example(row, 0, "Be brief.")
    text = template.render(tokenizer, trained["messages"])
    (row_ids,) = template.token_ids(tokenizer, [text])
    request = prompter.request_of(trained, "0")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is 2 + 2?")
    assert tuple(row_ids[: len(request.prompt_ids)]) == request.prompt_ids
    assert tokenizer.decode(row_ids[len(request.prompt_ids) :]) == "4<|im_end|>\n"
    assert request.golden_answer == "4"
    assert request.rules == (ForbidTokens((len("what is 2 + 2?"),)),)
    assert prompter.request({"prompt": "what is 2 + 2?"}, "0").prompt_ids == request.prompt_ids


@pytest.mark.parametrize(
    "mode",
    [
        "prepend",
        pytest.param("replace"),
    ],
)
def test_a_rows_own_system_message_is_treated_as_in_training(tokenizer: Any, mode: Any) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
        ]
    }
    made = Prompter(Echo(), tokenizer, "Be brief.", mode).request(row, "0")
    trained = Echo().transform_example(row, 0, "Be brief.", system_prompt_mode=mode)
    assert made.prompt_ids == template.prompt_ids(tokenizer, {"messages": trained["messages"][:-1]})


def test_stop_tokens_and_text(prompter: Prompter, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompter.sampling().stop_token_ids == (end,)
    ids = tokenizer("hello <|im_start|> world")["input_ids"]
    assert prompter.decode([*ids, end]) == "hello <|im_start|> world"
    assert prompter.decode([]) == ""


def test_weights_that_diverged_are_no_success(backend: PreviewBackend, model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    result = backend.preview("hello", temperature=0.0, max_new_tokens=3)
    assert (result.success, result.finish_reason, result.text) == (False, "non_finite", "")
    assert result.error_message == "the logits were NaN or Inf"


def test_answers_are_by_the_weights_of_now(backend: PreviewBackend, model: Any) -> None:
    before = backend.preview("hello world", temperature=0.0, max_new_tokens=6).text
    with torch.no_grad():
        model.model.norm.weight.neg_()
    assert backend.preview("hello world", temperature=0.0, max_new_tokens=6).text != before


def test_unbound_backends_say_so() -> None:
    for cls in BACKENDS:
        backend = cls()
        with pytest.raises(RuntimeError, match=rf"{cls.__name__}\.bind\(prompter, model\) comes before previews"):
            backend.preview("hello")


def test_a_closed_backend_is_unbound(prompter: Prompter, model: Any) -> None:
    for cls in BACKENDS:
        backend = cls()
        backend.bind(prompter, model)
        backend.close()
        with pytest.raises(RuntimeError, match="comes before previews"):
            _ = backend.model


def test_a_failed_preview_keeps_its_request() -> None:
    request = PreviewRequest((1, 2), prompt_id="7", prompt="hi", golden_answer="ho", step=3)
    result = failed(request, "local", "no worker")
    assert not result.success
    assert (result.prompt_id, result.prompt, result.golden_answer, result.step) == ("7", "hi", "ho", 3)
    assert (result.finish_reason, result.error_message, result.check) == ("error", "no worker", None)
    assert dataclasses.asdict(result)["tokens_generated"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_is_bit_identical_with_and_without_previews(
    tiny_model_dir: Path, prompter: Prompter, dtype: torch.dtype, temperature: float
) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 384, n).astype(np.int32), (np.arange(n) > 2).astype(np.uint8)) for n in (9, 14, 6)]
    batch = Collator(rows, True, 0)(np.arange(3), 20)  # type: ignore[arg-type]
    attention.register()
    ends = []
    for asked in (False, True):
        torch.manual_seed(0)
        module = CausalLMModule("unused")
        module.model = pretrained.load_model(str(tiny_model_dir), dtype, attn_implementation=attention.PACKED).train()
        module.model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in module.model.model.layers:
            layer.self_attn.attention_dropout = 0.2  # takes draws from the generator that previews must not touch
        backend = LocalPreviewBackend()
        backend.bind(prompter, module.model)
        optimizer = CompensatedAdamW(module.parameters(), lr=1e-3)
        for step in range(1, 5):
            optimizer.zero_grad()
            (module.nats(batch) / batch.step_tokens).backward()
            optimizer.step()
            if asked:
                backend.preview("hello", step=step, max_new_tokens=4, temperature=temperature)
        ends.append(copy.deepcopy([*module.parameters(), *(optimizer.exact_weight(p) for p in module.parameters())]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
