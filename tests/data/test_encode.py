"""Which tokens are trained: checked against text tokenised piece by piece, and against Hugging Face's own mask."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_trainer.data.encode import Encoded, Encoder
from lightning_trainer.template import prompt_ids

MakeTokenizer = Callable[..., Any]

QWEN3 = (  # the reasoning of turns before the last question is dropped, as Qwen3 does
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (  # closes the whole conversation with the end of text
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}"
)
NO_TRAILING_NEWLINE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEXT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def encode(tokenizer: Any, *messages: dict[str, Any], loss_on: Any = "assistant", **extras: Any) -> list[Encoded]:
    [result] = Encoder(tokenizer, loss_on)([{"messages": list(messages), **extras}])
    if isinstance(result, ValueError):
        raise result
    for row in result:
        assert len(row.ids) == len(row.trained)
        assert row.trained[0] == 0
    return result


def expected(tokenizer: Any, *pieces: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Ids and marks of pieces of text, each tokenised on its own."""
    ids, trained = [], []
    for text, is_trained in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        trained += [int(is_trained)] * len(part)
    return ids, trained


def trained_text(tokenizer: Any, row: Encoded) -> list[str]:
    """Each unbroken stretch of trained tokens, as text."""
    runs = groupby(zip(row.ids, row.trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for mark, run in runs if mark]


def test_one_turn_by_hand(tokenizer: Any) -> None:
    [row] = encode(tokenizer, user("hi"), assistant("hello"))
    tokens = "<|im_start|> u se r Ċ h i <|im_end|> Ċ <|im_start|> a s s is t a n t Ċ hello <|im_end|>"
    assert " ".join(tokenizer.convert_ids_to_tokens(row.ids)) == tokens
    assert row.trained == [0] * 19 + [1, 1]
    assert row.turn_ends == (21,)
    assert row.trained_tokens == 2


def test_turns_share_a_row_and_the_newline_after_the_end_is_not_trained(tokenizer: Any) -> None:
    [row] = encode(tokenizer, system("be"), user("hi"), assistant("hello"), user("and"), assistant("what"))
    first = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    second = "\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    pieces = [(first, False), ("hello<|im_end|>", True), (second, False), ("what<|im_end|>", True)]
    assert (row.ids, row.trained) == expected(tokenizer, *pieces)
    assert row.turn_ends == (len(expected(tokenizer, *pieces[:2])[0]), len(row.ids))


def test_an_answer_that_begins_with_newlines_is_tokenised_apart_from_its_prompt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    prompt, answer = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "\n\nhello<|im_end|>"
    [row] = encode(tokenizer, user("hi"), assistant("\n\nhello"))
    assert (row.ids, row.trained) == expected(tokenizer, (prompt, False), (answer, True))
    assert row.ids != tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]  # else this shows nothing


@pytest.mark.parametrize(
    "pasted", ["<|im_start|>assistant\nsure<|im_end|>", "hi<|im_end|>\n<|im_start|>assistant\nsure<|im_end|>\n"]
)
def test_a_header_pasted_by_a_user_trains_nothing(tokenizer: Any, pasted: str) -> None:
    [row] = encode(tokenizer, user(pasted), assistant("hello"))
    assert trained_text(tokenizer, row) == ["hello<|im_end|>"]
    [row] = encode(tokenizer, user("hi"), assistant("hello"), user(pasted), assistant("what"))
    assert trained_text(tokenizer, row) == ["hello<|im_end|>", "what<|im_end|>"]


def test_a_header_in_an_answer_is_part_of_the_answer(tokenizer: Any) -> None:
    content = "a<|im_end|>\n<|im_start|>user\nb"
    [row] = encode(tokenizer, user("hi"), assistant(content))
    assert trained_text(tokenizer, row) == [content + "<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    [row] = encode(tokenizer, user("hi"), assistant("hello"), user("and now?"))
    assert tokenizer.decode(row.ids).endswith("hello<|im_end|>")


def test_two_answers_in_succession_are_both_trained(tokenizer: Any) -> None:
    [row] = encode(tokenizer, user("hi"), assistant("hello"), assistant("world"))
    assert trained_text(tokenizer, row) == ["hello<|im_end|>", "world<|im_end|>"]


def test_two_system_messages_are_prompt(tokenizer: Any) -> None:
    [row] = encode(tokenizer, system("be"), user("hi"), assistant("hello"), system("short"), user("x"), assistant("y"))
    assert trained_text(tokenizer, row) == ["hello<|im_end|>", "y<|im_end|>"]
    assert "system\nshort" in tokenizer.decode(row.ids)


def test_blanks_at_the_end_of_an_answer_are_trained(tokenizer: Any) -> None:
    [row] = encode(tokenizer, user("hi"), assistant("hello \n"))
    assert trained_text(tokenizer, row) == ["hello \n<|im_end|>"]


def test_conversations_keep_their_places_when_one_is_refused(tokenizer: Any) -> None:
    rows = [[user("a"), assistant("b")], [assistant("c"), user("d")], [user("e"), assistant("f")], [user("g")]]
    first, second, third, fourth = Encoder(tokenizer)([{"messages": messages} for messages in rows])
    assert isinstance(first, list)
    assert trained_text(tokenizer, first[0]) == ["b<|im_end|>"]
    assert "starts with the assistant" in str(second)
    assert isinstance(third, list)
    assert trained_text(tokenizer, third[0]) == ["f<|im_end|>"]
    assert "there is no assistant turn" in str(fourth)
    assert Encoder(tokenizer)([]) == []


def test_text_no_tokenizer_takes_spoils_its_own_row_only(make_tokenizer: MakeTokenizer) -> None:
    call = {"function": {"name": "\ud83d", "arguments": "{}"}}
    template = TOOLS.replace("call.function | tojson", "call.function.name")
    spoilt = {"messages": [user("hi"), assistant("", tool_calls=[call])]}
    fine = {"messages": [user("hi"), assistant("hello")]}
    first, second = Encoder(make_tokenizer(template))([spoilt, fine])
    assert isinstance(first, ValueError)
    assert isinstance(second, list)


@pytest.mark.parametrize(
    ("template", "specials", "between", "end"),
    [
        (NO_TRAILING_NEWLINE, [], "<|im_start|>user\nand<|im_end|><|im_start|>assistant\n", "<|im_end|>"),
        (
            LLAMA3,
            ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            "<|start_header_id|>user<|end_header_id|>\n\nand<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (
            GEMMA,
            ["<start_of_turn>", "<end_of_turn>"],
            "\n<start_of_turn>user\nand<end_of_turn>\n<start_of_turn>model\n",
            "<end_of_turn>",
        ),
    ],
    ids=["no-newline", "llama3", "gemma"],
)
def test_families_of_templates(
    make_tokenizer: MakeTokenizer, template: str, specials: list[str], between: str, end: str
) -> None:
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(specials, special_tokens=True)
    [row] = encode(tokenizer, user("hi"), assistant("hello"), user("and"), assistant("what"))
    opening = tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    pieces = [(opening, False), ("hello" + end, True), (between, False), ("what" + end, True)]
    assert (row.ids, row.trained) == expected(tokenizer, *pieces)


def test_without_an_end_of_turn_token_the_whole_answer_is_trained(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(PLAIN_TEXT)
    [row] = encode(tokenizer, user("hi"), assistant("hello"), user("and"), assistant("what"))
    pieces = [("user: hi\nassistant: ", False), ("hello\n", True), ("user: and\nassistant: ", False), ("what\n", True)]
    assert (row.ids, row.trained) == expected(tokenizer, *pieces)


def test_nothing_after_the_end_of_turn_is_trained(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(PHI3)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    for row in encode(tokenizer, user("hi"), assistant("hello")):
        assert trained_text(tokenizer, row) == ["hello<|end|>"]


def test_turns_a_template_rewrites_get_a_row_each(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(QWEN3)
    turns = [user("hi"), assistant("hello", reasoning_content="one"), user("and"), assistant("what")]
    first, second = encode(tokenizer, *turns)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (first.ids, first.trained) == expected(
        tokenizer, (prompt, False), ("<think>\none\n</think>\n\nhello<|im_end|>", True)
    )
    prompt += "hello<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    assert (second.ids, second.trained) == expected(
        tokenizer, (prompt, False), ("<think>\n\n</think>\n\nwhat<|im_end|>", True)
    )


def test_turns_it_does_not_rewrite_share_a_row(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(QWEN3)
    [row] = encode(tokenizer, user("hi"), assistant("hello"), {"role": "tool", "content": "4"}, assistant("what"))
    assert trained_text(tokenizer, row) == [
        "<think>\n\n</think>\n\nhello<|im_end|>",
        "<think>\n\n</think>\n\nwhat<|im_end|>",
    ]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_sentencepiece_tokenizer_sees_what_it_sees_at_inference(scheme: str) -> None:
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=60, initial_alphabet=["\0"], special_tokens=specials, show_progress=False)
    pieces.train_from_iterator(["hello what is user assistant hi\nand "] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = NO_TRAILING_NEWLINE
    turns = [user("hi"), assistant("hello"), user("and"), assistant("what")]
    [row] = encode(tokenizer, *turns)
    prompt = prompt_ids(tokenizer, {"messages": turns[:3]})
    assert tuple(row.ids[: len(prompt)]) == prompt


def test_a_template_whose_answers_do_not_follow_their_prompts_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not follow from its own prompt"):
        encode(make_tokenizer(template), user("hi"), assistant("hello"))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}"])
def test_what_a_template_refuses_is_an_error_of_the_row(make_tokenizer: MakeTokenizer, template: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses this conversation"):
        encode(make_tokenizer(template), user("hi"), assistant("hello"))


def test_tool_calls_are_trained_and_tool_results_are_not(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        user("hi"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        assistant("what"),
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    [row] = encode(tokenizer, *turns, tools=tools)
    calls = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert trained_text(tokenizer, row) == [calls, "what<|im_end|>"]
    text = tokenizer.decode(row.ids)
    assert text.startswith('<|im_start|>system\n[{"type": "function"')
    assert "<|im_start|>tool\n3<|im_end|>" in text


@pytest.mark.parametrize(
    "messages",
    [
        [user("hi"), assistant("hello")],
        [
            system("be"),
            user("hi"),
            assistant("hello"),
            user("<|im_start|>assistant\nx<|im_end|>"),
            assistant("what 🤔"),
        ],
        [assistant("hello"), user("hi"), assistant("world")],
        [user("hi"), assistant("a"), assistant("b"), user("c")],
    ],
)
def test_marks_are_hugging_faces_own(make_tokenizer: MakeTokenizer, messages: list[dict[str, Any]]) -> None:
    tokenizer = make_tokenizer(MARKED)
    [row] = encode(tokenizer, *messages)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert row.ids == theirs["input_ids"]
    assert row.trained == theirs["assistant_masks"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert trained_text(tokenizer, row) == [answer + "<|im_end|>" for answer in answers]
    assert [row.trained[end - 1 : end + 1] for end in row.turn_ends] == [[1, 0]] * len(answers)


def test_the_first_token_is_never_trained_even_when_marked(make_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endfor %}"
    tokenizer = make_tokenizer(template)
    [row] = encode(tokenizer, assistant("hello"))
    assert (row.ids, row.trained) == (expected(tokenizer, ("hello<|im_end|>", True))[0], [0, 1])


def test_what_a_marked_template_refuses_is_an_error_of_the_row(make_tokenizer: MakeTokenizer) -> None:
    template = MARKED + "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(ValueError, match="refuses this conversation: user first"):
        encode(make_tokenizer(template), system("be"), user("hi"), assistant("hello"))


def test_loss_on_all_trains_every_token_but_the_first(tokenizer: Any) -> None:
    [row] = encode(tokenizer, user("hi"), assistant("hello"), loss_on="all")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert row.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.trained == [0] + [1] * (len(row.ids) - 1)


def test_loss_on_all_takes_a_marked_template_and_no_assistant(make_tokenizer: MakeTokenizer) -> None:
    [row] = encode(make_tokenizer(MARKED), user("hi"), loss_on="all")
    assert row.trained == [0] + [1] * (len(row.ids) - 1)


@pytest.mark.parametrize("text", ["hello world", "hello world<|im_end|>"])
def test_a_text_is_trained_whole_and_ends_once(tokenizer: Any, text: str) -> None:
    [[row]] = Encoder(tokenizer)([{"text": text}])
    assert row.ids == tokenizer("hello world<|im_end|>", add_special_tokens=False)["input_ids"]
    assert row.trained == [0] + [1] * (len(row.ids) - 1)
    assert row.cut(2) == Encoded(row.ids[:2], [0, 1], (2,))


def test_texts_need_no_template_and_mix_with_messages(make_tokenizer: MakeTokenizer, tokenizer: Any) -> None:
    [[row]] = Encoder(make_tokenizer(None))([{"text": "hello"}])
    assert row.trained == [0, 1]
    [[text], [chat]] = Encoder(tokenizer)([{"text": "hello"}, {"messages": [user("hi"), assistant("hello")]}])
    assert trained_text(tokenizer, text) == ["<|im_end|>"]
    assert trained_text(tokenizer, chat) == ["hello<|im_end|>"]


def test_messages_without_a_template_are_an_error_of_the_row(make_tokenizer: MakeTokenizer) -> None:
    [result] = Encoder(make_tokenizer(None))([{"messages": [user("hi"), assistant("hello")]}])
    assert isinstance(result, ValueError)


def test_cut_keeps_whole_turns() -> None:
    row = Encoded(list(range(9)), [0, 1, 1, 0, 1, 0, 0, 1, 1], (3, 5, 9))
    assert row.cut(9) == row
    assert row.cut(8) == Encoded([0, 1, 2, 3, 4], [0, 1, 1, 0, 1], (3, 5))
    assert row.cut(4) == Encoded([0, 1, 2], [0, 1, 1], (3,))
    assert row.cut(2) is None


REFUSES = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"


@pytest.mark.parametrize("template", [QWEN3 + REFUSES, MARKED + REFUSES, TOOLS + REFUSES])
@pytest.mark.parametrize("characters", [1 << 24, 40])
def test_many_rows_are_encoded_as_each_alone(
    make_tokenizer: MakeTokenizer, template: str, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused ones, ones with tools, texts and ones without an answer among them; in one group and in many."""
    monkeypatch.setattr("lightning_trainer.data.encode.GROUP_CHARACTERS", characters)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows: list[dict[str, Any]] = [
        {"messages": [user("hi"), assistant("hello")]},
        {"messages": [user("no"), assistant("hello")]},
        {"text": "hello world"},
        {"messages": [user("hi"), assistant("a"), user("what"), assistant("world")]},
        {"messages": [user("hi"), assistant("hello")], "tools": tools},
        {"messages": [assistant("hello"), user("hi")]},
        {"messages": [user("hi")]},
        {"messages": [user("is"), assistant("the sum")]},
    ] * 20
    encoder = Encoder(make_tokenizer(template))
    together, alone = encoder(rows), [encoder([row])[0] for row in rows]
    assert [str(found) if isinstance(found, ValueError) else found for found in together] == [
        str(found) if isinstance(found, ValueError) else found for found in alone
    ]
    assert "not this" in str(together[1])
