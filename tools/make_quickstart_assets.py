"""Write the assets of the embedded quickstart: chat rows, a tokenizer and a model configuration, no weights.

    python tools/make_quickstart_assets.py [--out configs/quickstart]

The task is two-digit arithmetic in natural requests. Each answer restates the problem in canonical form, works digit
by digit and ends with the marked result:

    user:       What is 47 plus 38?
    assistant:  (add 47 38): 7+8=15, 4+3+1=8. <<ANS_START>> (add 47 38) = 85 <<ANS_END>>

Two things make it learnable from random weights in minutes on two CPU cores. Digits are single tokens, and every step
needs only a copied digit or a fact about single digits, so that the problem as a whole never has to be memorised. The
restated form puts the operands at a fixed distance from the steps, however the request was worded.

No problem of `val.jsonl` occurs in `train.jsonl`, in either order of its operands. The output is a pure function of
`SEED` and this file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

SEED = 20240817
VAL_ROWS_PER_OP = 32
SMALLEST, LARGEST = 10, 99

LARGEST_VOCABULARY = 512
MAX_POSITIONS = 512
SYSTEM_PROMPT = "Show your steps."
ANSWER_START, ANSWER_END = "<<ANS_START>>", "<<ANS_END>>"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Not "special", so that decoding with skip_special_tokens keeps them: they are part of the answer's text.
TEXT_TOKENS = ("<think>", "</think>", ANSWER_START, ANSWER_END)

# Words and punctuation keep the space in front of them; each digit is a token of its own.
SPLIT_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

# ChatML. Reasoning is kept only in turns after the last user message; without reasoning every render of the first
# messages is a prefix of the whole.
CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else '' -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' -%}
{%- if not reasoning and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if reasoning and loop.index0 > ns.last_user -%}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Operation:
    """One kind of problem.

    Attributes:
        name: The operation's name in canonical form.
        requests: Wordings of the request, with `{a}` and `{b}`.
        solve: (a, b) to the steps in words and the result.
        train_rows: Number of training rows.
        tie_share: Share of the training rows whose operands have equal tens. Left to chance it is a tenth, and the
            cases only such problems show (the ones decide, a leading zero falls away) are learned last.
        ordered: Only problems with a >= b are drawn.
    """

    name: str
    requests: tuple[str, ...]
    solve: Callable[[int, int], tuple[str, int]]
    train_rows: int
    tie_share: float
    ordered: bool = False


def solve_add(a: int, b: int) -> tuple[str, int]:
    """47, 38 -> ("7+8=15, 4+3+1=8", 85). The carry is written even when it is 0."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={tens}", a + b


def solve_sub(a: int, b: int) -> tuple[str, int]:
    """43, 18 -> ("13-8=5, 4-1-1=2", 25). The borrow is written even when it is 0."""
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    return f"{ones}-{b % 10}={ones - b % 10}, {a // 10}-{b // 10}-{borrow}={tens}", a - b


def solve_max(a: int, b: int) -> tuple[str, int]:
    """52, 55 -> ("5=5, 2<5", 55)."""
    return compare_digits(a, b), max(a, b)


def solve_min(a: int, b: int) -> tuple[str, int]:
    """12, 55 -> ("1<5", 12)."""
    return compare_digits(a, b), min(a, b)


def compare_digits(a: int, b: int) -> str:
    """The tens compared, and the ones where the tens are equal: 52, 55 -> "5=5, 2<5"."""
    pairs = [(a // 10, b // 10), (a % 10, b % 10)]
    decisive = 0 if pairs[0][0] != pairs[0][1] else 1
    return ", ".join(f"{x}{'<' if x < y else '>' if x > y else '='}{y}" for x, y in pairs[: decisive + 1])


OPERATIONS = (
    Operation(
        "add",
        (
            "What is {a} plus {b}?",
            "Compute {a} + {b}.",
            "Add {a} and {b}.",
            "Find the sum of {a} and {b}.",
            "How much is {a} + {b}?",
        ),
        solve_add,
        train_rows=2300,
        tie_share=0.1,
    ),
    Operation(
        "sub",
        (
            "What is {a} minus {b}?",
            "Compute {a} - {b}.",
            "Subtract {b} from {a}.",
            "Take {b} away from {a}.",
            "How much is {a} - {b}?",
        ),
        solve_sub,
        train_rows=2300,
        tie_share=0.15,
        ordered=True,
    ),
    Operation(
        "max",
        (
            "Which is larger, {a} or {b}?",
            "Compute the larger of {a} and {b}.",
            "What is the maximum of {a} and {b}?",
            "Find the greater of {a} and {b}.",
        ),
        solve_max,
        train_rows=1700,
        tie_share=0.3,
    ),
    Operation(
        "min",
        (
            "Which is smaller, {a} or {b}?",
            "Compute the smaller of {a} and {b}.",
            "What is the minimum of {a} and {b}?",
            "Find the lesser of {a} and {b}.",
        ),
        solve_min,
        train_rows=1700,
        tie_share=0.3,
    ),
)


def chat_row(operation: Operation, a: int, b: int, rng: random.Random) -> dict[str, object]:
    """One chat row in the form the data module reads, with a wording drawn from `rng`."""
    steps, result = operation.solve(a, b)
    problem = f"({operation.name} {a} {b})"
    answer = f"{problem}: {steps}. {ANSWER_START} {problem} = {result} {ANSWER_END}"
    request = rng.choice(operation.requests).format(a=a, b=b)
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def draw_problems(operation: Operation, rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and validation problems of one operation; a validation pair is in no training pair in either order."""
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a >= b or not operation.ordered]
    rng.shuffle(pairs)
    validation = pairs[:VAL_ROWS_PER_OP]
    held_out = {frozenset(pair) for pair in validation}
    free = [pair for pair in pairs[VAL_ROWS_PER_OP:] if frozenset(pair) not in held_out]
    ties = round(operation.train_rows * operation.tie_share)
    tied = [(a, b) for a, b in free if a // 10 == b // 10]
    others = [(a, b) for a, b in free if a // 10 != b // 10]
    return tied[:ties] + others[: operation.train_rows - ties], validation


def make_rows() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """All training and validation rows, each list shuffled."""
    rng = random.Random(SEED)
    train: list[dict[str, object]] = []
    validation: list[dict[str, object]] = []
    for operation in OPERATIONS:
        train_problems, validation_problems = draw_problems(operation, rng)
        train += [chat_row(operation, a, b, rng) for a, b in train_problems]
        validation += [chat_row(operation, a, b, rng) for a, b in validation_problems]
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """JSON lines, UTF-8, one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any text can be encoded, and the words of the task are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY - len(TEXT_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TEXT_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def task_texts(rows: Iterable[dict[str, object]]) -> Iterable[str]:
    """The text the tokenizer learns from: the rows, the system prompt and the names of the roles."""
    for row in rows:
        yield f"system\nuser\nassistant\n{SYSTEM_PROMPT}"
        messages = row["messages"]
        assert isinstance(messages, list)
        for message in messages:
            yield message["content"].replace(ANSWER_START, "").replace(ANSWER_END, "")


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of 341,040 parameters.

    From random weights an `initializer_range` near 1/sqrt(hidden_size) learns faster than the usual 0.02, and a small
    `rope_theta` gives every rotary frequency a use within some 70 tokens.
    """
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def write_model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """What `AutoConfig` and `AutoTokenizer` need to start from random weights."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template inside tokenizer_config.json
    model_config(tokenizer).save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def main() -> None:
    """Write everything under --out."""
    parser = argparse.ArgumentParser(description="Write the assets of the embedded quickstart.")
    parser.add_argument("--out", type=Path, default=Path("configs/quickstart"), help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train, validation = make_rows()
    write_rows(out / "train.jsonl", train)
    write_rows(out / "val.jsonl", validation)
    write_model_folder(out / "model", train_tokenizer(task_texts(train)))


if __name__ == "__main__":
    main()
