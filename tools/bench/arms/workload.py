"""The throughput tables' workload: a model, its tokenizer and 10,000 chats, a pure function of this file.

python tools/bench/arms/workload.py FOLDER [--chats 10000] [--shape 7M]

FOLDER then holds `model/` (Qwen3's shape, random weights, a byte-level BPE of 8,192 tokens trained on the chats),
`chats.jsonl`, and `rows.npz`: the same chats as the token rows that `fit` makes of them, for arms that are
handed tokens. Lengths are log-normal, 195 tokens on average; about 44 % of the tokens are the assistant's and carry a
label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SEED = 20261124
CHATS = 10_000
VOCABULARY = 8_192

WORDS, SPREAD = 148, 0.8
"""Mean of a chat's words, and sigma of their logarithm: with the template 195 tokens, and as spread as chats are."""

MOST_WORDS = 1_500
ASSISTANT_SHARE = 0.475
"""Of a chat's words. The same in every chat: how much is labelled must not depend on which chats an arm draws."""

LEXICON = 12_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """A model, and how much it is given.

    Attributes:
        max_length: Tokens of a packed row, and of an optimizer step.
        dtype: Of the weights.
        config: Of the model: what is not Qwen3's own default, or is worth saying.
    """

    max_length: int
    dtype: str
    config: dict[str, Any]


SHAPES = {
    "7M": Shape(
        2_048,
        "float32",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 784,  # 6.9 M parameters, together with tied embeddings
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
    "0.6B": Shape(
        4_096,
        "bfloat16",
        {
            "vocab_size": 151_936,
            "hidden_size": 1_024,
            "intermediate_size": 3_072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
}


@dataclass(frozen=True)
class TokenRows:
    """Chats as tokens; chat i holds `ids[starts[i] : starts[i + 1]]`.

    Attributes:
        ids: Token ids, chat after chat.
        labelled: 1 where the token is trained on, as long as `ids`.
        starts: Where each chat starts; one more than there are chats.
        max_length: Tokens of an optimizer step.
    """

    ids: Ints
    labelled: Ints
    starts: Ints
    max_length: int

    @classmethod
    def load(cls, workload: Path) -> TokenRows:
        """Those of a workload's folder."""
        with np.load(workload / "rows.npz") as held:
            return cls(held["ids"], held["labelled"], held["starts"], int(held["max_length"]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[tuple[Ints, Ints]]:
        """Token ids and labels of each chat; the label is -100 where the token is not trained on."""
        for first, last in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            ids = self.ids[first:last]
            yield ids, np.where(self.labelled[first:last] == 1, ids, -100)

    @property
    def lengths(self) -> Ints:
        """Tokens of each chat."""
        return np.diff(self.starts)

    @property
    def labels(self) -> Ints:
        """Labelled tokens of each chat."""
        return np.add.reduceat(self.labelled, self.starts[:-1])

    @property
    def per_step(self) -> int:
        """Chats that hold the tokens of an optimizer step on average, for arms that count chats and not tokens."""
        return round(self.max_length / float(self.lengths.mean()))


def chats(count: int) -> list[list[dict[str, str]]]:
    """So many chats of one question and one answer."""
    rng = np.random.default_rng(SEED)
    words = _lexicon(rng)
    frequency = 1 / (np.arange(len(words)) + 10)  # Zipf's law, less steep at its head
    sizes = np.exp(rng.normal(np.log(WORDS) - SPREAD**2 / 2, SPREAD, count)).clip(4, MOST_WORDS).astype(int)
    answers = (sizes * ASSISTANT_SHARE).round().astype(int)
    drawn = rng.choice(words, int(sizes.sum()), p=frequency / frequency.sum())
    made, start = [], 0
    for size, answer in zip(sizes.tolist(), answers.tolist(), strict=True):
        text = drawn[start : start + size].tolist()
        question = {"role": "user", "content": " ".join(text[: size - answer])}
        made.append([question, {"role": "assistant", "content": " ".join(text[size - answer :])}])
        start += size
    return made


def _lexicon(rng: np.random.Generator) -> npt.NDArray[np.str_]:
    """Words of one to four syllables, each once; which of them are frequent is left to chance."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < LEXICON:
        found["".join(rng.choice(syllables, int(rng.integers(1, 5))))] = None
    return np.array(list(found))


def make(folder: Path, count: int = CHATS, shape: str = "7M") -> None:
    """Write the workload."""
    folder.mkdir(parents=True, exist_ok=True)
    made = chats(count)
    lines = (json.dumps({"messages": messages}) + "\n" for messages in made)
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    _make_tokenizer(folder / "model", made)
    _make_model(folder / "model", SHAPES[shape])
    _make_rows(folder, made, SHAPES[shape].max_length)


def _make_tokenizer(folder: Path, made: list[list[dict[str, str]]]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for chat in made for message in chat), trainer)
    end_of_text, turn_start, turn_end = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=end_of_text,
        eos_token=turn_end,
        additional_special_tokens=[turn_start],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(str(folder))


def _make_model(folder: Path, shape: Shape) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **shape.config,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        dtype=shape.dtype,
    )
    torch.manual_seed(SEED)
    Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype)).save_pretrained(str(folder))


def _make_rows(folder: Path, made: list[list[dict[str, str]]], most: int) -> None:
    from transformers import AutoTokenizer

    from lightning_trainer.data.encode import Encoder

    encode = Encoder(AutoTokenizer.from_pretrained(str(folder / "model")))
    rows = []
    for encoded in encode([{"messages": messages} for messages in made]):
        if isinstance(encoded, ValueError):
            raise encoded
        rows += encoded
    lengths = [len(row.ids) for row in rows]
    if max(lengths) > most:
        raise ValueError(f"a chat has {max(lengths)} tokens, more than the {most} of a step")
    np.savez(
        folder / "rows.npz",
        ids=np.array([token for row in rows for token in row.ids]),
        labelled=np.array([mark for row in rows for mark in row.trained]),
        starts=np.cumsum([0, *lengths]),
        max_length=most,
    )


def main() -> None:
    """Write it and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=int, default=CHATS)
    parser.add_argument("--shape", choices=SHAPES, default="7M")
    given = parser.parse_args()
    make(given.folder, given.chats, given.shape)
    rows = TokenRows.load(given.folder)
    print(
        f"{len(rows):,} chats, {rows.lengths.mean():.0f} tokens on average, {rows.lengths.max():,} at most, "
        f"{rows.labels.sum() / rows.lengths.sum():.1%} of them labelled"
    )


if __name__ == "__main__":
    main()
