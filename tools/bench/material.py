"""What the tables run on: a text, a tokenizer that learned from it, templates, rows, a small model. No network.

The text is the help of Python's own language reference, which every installation has: English and some code.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Prefix-stable: more messages only add text."""

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Says itself what the assistant wrote."""

THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Rewrites earlier turns, as Qwen3's does: only what follows the last question has its thoughts."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS_A_WORD = 1.5
"""Of this text by this tokenizer, about."""


@cache
def words() -> list[str]:
    """The text, word by word."""
    return [word for word in " ".join(topics.values()).split(" ") if word.strip()]


def make_tokenizer(vocabulary: int = 16_384, template: str = CHATML) -> Any:
    """A byte-level BPE tokenizer as Qwen's, with ChatML's special tokens.

    Args:
        vocabulary: Its size. What the text has no pairs for is filled up, so that its file is as large as a real one's.
        template: The chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    contractions, word = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = rf"{contractions}|{word}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 16_384),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    if vocabulary > tokenizer.get_vocab_size():
        tokenizer = Tokenizer.from_str(_filled_up(json.loads(tokenizer.to_str()), vocabulary))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def _filled_up(rules: dict[str, Any], vocabulary: int) -> str:
    """The tokenizer's JSON with pairs of long tokens added, which next to no text has."""
    known, merges = rules["model"]["vocab"], rules["model"]["merges"]
    long = [token for token in known if len(token) > 8 and token not in SPECIAL]
    for a, b in itertools.product(long, repeat=2):
        if len(known) == vocabulary:
            break
        if a + b not in known:
            known[a + b] = len(known)
            merges.append([a, b])
    return json.dumps(rules)


def chat_rows(count: int, tokens: float = 195, turns: int = 1, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of log-normal length, two thirds of it the assistant's.

    Args:
        tokens: Mean length of a row.
        turns: Questions and answers of a row.
    """
    rng = np.random.default_rng(seed)
    text, sigma = words(), 0.8
    sizes = rng.lognormal(np.log(tokens / TOKENS_A_WORD) - sigma**2 / 2, sigma, size=count).clip(3)
    for number, size in enumerate(sizes):
        messages = []
        for role, share in (("user", 1 / 3), ("assistant", 2 / 3)) * turns:
            length = max(1, round(size * share / turns))
            start = int(rng.integers(len(text) - length))
            messages.append({"role": role, "content": " ".join(text[start : start + length])})
        yield {"messages": messages, "number": number}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """As JSONL."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_model(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A model directory: a Qwen3 of some thousand parameters, random weights, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(**{**sizes, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
