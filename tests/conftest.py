"""Small real things every test can use: a tokenizer, a model, rows. No network, no GPU, a second at most to make."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch looks once, at a process's first product on a GPU; a deterministic run that comes later would be refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A byte-level BPE tokenizer with ChatML special tokens; the template is the caller's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str | None = CHATML) -> Any:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=sorted(alphabet), special_tokens=SPECIAL, show_progress=False
        )
        tokenizer.train_from_iterator(["hello world, what is the sum of these two numbers? " * 4], trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>"],
        )
        fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """The ChatML tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """A Qwen3 configuration of a few thousand parameters."""

    def make(**changes: Any) -> Any:
        from transformers import Qwen3Config

        values = {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "architectures": ["Qwen3ForCausalLM"],
        }
        return Qwen3Config(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any], tokenizer: Any) -> Path:
    """A model directory with fp32 weights and the ChatML tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_rows() -> Callable[..., list[dict[str, Any]]]:
    """Chat rows of unequal lengths, the same every time."""

    def make(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        rows = []
        for number in range(count):
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            question = "please " * rng.randint(0, 12) + f"what is {a} plus {b}?"
            answer = f"(add {a} {b}) = {a + b}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages, "number": number})
        return rows

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised rows go to a folder of the test session, not to the user's."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
