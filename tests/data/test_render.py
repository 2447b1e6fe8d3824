"""The quick way to render says what the tokenizer's says, whether a template only appends or looks ahead."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_trainer.data.pieces import PieceTokenizer
from lightning_trainer.data.plain_template import PlainTemplate, Watched, is_plain, plain_template
from lightning_trainer.data.render import marked_token_ids, turns_of_all
from lightning_trainer.template import continued_token_ids, token_ids

MakeTokenizer = Callable[..., Any]

MESSAGE = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LOOP = f"{{% for m in messages %}}{MESSAGE}{{% endfor %}}"

APPENDING = {
    "chatml": LOOP + PROMPT,
    "first": "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nbe kind\n' }}"
    "{% endif %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "slice": "{% if messages[0].role == 'system' %}{{ '[' + messages[0].content + ']' }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "looks_back": "{% for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}{{ '&' }}"
    "{% endif %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "numbers": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    + MESSAGE + "{% endfor %}" + PROMPT,
    "macro": "{% macro say(m) %}" + MESSAGE + "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}" + PROMPT,
    "closes": LOOP + "{{ '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' }}",
    "options": LOOP + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>' }}{% endif %}{% endif %}",
    "strips": "{% for m in messages %}{{ m.role + ':' + m.content | trim + '<|im_end|>' }}{% endfor %}" + PROMPT,
}  # fmt: skip
"""They write of each message before they look at the next."""

LOOKING = {
    "rewrites": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>' }}{% endif %}" + MESSAGE + "{% endfor %}"
    + PROMPT,
    "last": "{% for m in messages %}{% if loop.last %}{{ '!' }}{% endif %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "next": "{% for m in messages %}" + MESSAGE + "{% if loop.nextitem is defined %}{{ loop.nextitem.role }}{% endif %}"
    "{% endfor %}" + PROMPT,
    "length": "{{ messages | length }}" + LOOP + PROMPT,
    "minus_one": "{% if messages[-1].role == 'assistant' %}{{ '#' }}{% endif %}" + LOOP + PROMPT,
    "backwards": "{% for m in messages[::-1] %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "range": "{% for i in range(12) %}{% if messages[i] is defined %}{{ messages[i].content }}{% else %}{{ '.' }}"
    "{% endif %}{% endfor %}" + PROMPT,
    "range_break": "{% for i in range(12) %}{% if messages[i] is not defined %}{{ messages[i - 1].content }}{% break %}"
    "{% endif %}{{ messages[i].content }}{% endfor %}" + PROMPT,
    "prompt_in_loop": "{% for m in messages %}" + MESSAGE + "{% if loop.last and add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor %}",
    "prompt_first": "{% if add_generation_prompt %}{{ '?' }}{% endif %}" + LOOP + PROMPT,
    "tail_of_state": "{% set ns = namespace(said='') %}{% for m in messages %}{% set ns.said = m.content %}" + MESSAGE
    + "{% endfor %}{% if add_generation_prompt %}{{ ns.said + '<|im_start|>assistant\n' }}{% endif %}",
    "tail_of_messages": LOOP + "{% if add_generation_prompt %}{{ messages[0].content }}{% endif %}",
    "tail_of_name": "{% set first = messages[0].content %}" + LOOP
    + "{% if add_generation_prompt %}{{ first }}{% endif %}",
    "tail_of_all": LOOP + "{% if add_generation_prompt %}{{ messages }}{% endif %}",
    "tail_of_macro": "{% macro say() %}{{ messages[0].content }}{% endmacro %}" + LOOP
    + "{% if add_generation_prompt %}{{ say() }}{% endif %}",
    "steps": "{% for i in range(2) %}{% for m in messages %}{{ m.content }}"
    "{% if loop.index0 == i %}{% break %}{% endif %}{% endfor %}{% endfor %}" + PROMPT,
    "tail_calls": LOOP + "{% if add_generation_prompt %}{{ strftime_now('%f') | length }}{% endif %}",
    "peeks_at_tools": "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% else %}" + MESSAGE
    + "{% endif %}{% endfor %}" + PROMPT,
    "peeks_at_users": "{% for m in messages %}{% set u = m.role == 'user' %}"
    "{% if u and not loop.last and loop.nextitem.role == 'user' %}{{ '+' }}{% endif %}" + MESSAGE
    + "{% endfor %}" + PROMPT,
    "printed": "{{ messages | string | length }}" + LOOP + PROMPT,
    "compared": "{% if messages[0:] == messages %}{{ '=' }}{% endif %}" + LOOP + PROMPT,
    "printed_within": "{% for m in messages %}{{ (messages,) | string | length }}" + MESSAGE + "{% endfor %}" + PROMPT,
    "method": "{% if messages.copy is defined %}{{ messages.copy() | length }}{% endif %}" + LOOP + PROMPT,
    "no_method": "{% if messages.seen is defined %}{{ '!' }}{% endif %}" + LOOP + PROMPT,
    "first_of": "{{ (messages | first).content }}" + LOOP + PROMPT,
    "before_it": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}" + LOOP + PROMPT,
    "own_items": "{% set d = dict(items=5) %}{{ d.items is callable }}{{ d['items'] }}{{ messages | length }}"
    + LOOP + PROMPT,
    "names_the_mark": "{% for m in messages %}{{ m.content }}"
    "{{ '' if lightning_trainer_end_of_message is defined else '.' }}{% endfor %}" + PROMPT,
    "tail_looks": LOOP + "{% for m in messages %}{{ m.role }}{% endfor %}{{ messages[0].role }}" + PROMPT,
    "buffered": "{% set out %}" + LOOP + "{% endset %}{{ out }}" + PROMPT,
    "filtered": "{% filter trim %}" + LOOP + "{% endfilter %}" + PROMPT,
    "twice": LOOP + LOOP + PROMPT,
    "skips": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}" + MESSAGE + "{% endfor %}"
    + PROMPT,
    "only_some": "{% for m in messages if m.role != 'user' %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "inner": "{% for m in messages %}{% for n in messages %}{{ n.role }}{% endfor %}" + MESSAGE + "{% endfor %}"
    + PROMPT,
    "else": "{% for m in messages %}" + MESSAGE + "{% else %}{{ 'nothing' }}{% endfor %}" + PROMPT,
    "joined": "{{ messages | map(attribute='content') | join('|') }}" + PROMPT,
    "copied": "{% set all = messages + [] %}{% for m in all %}" + MESSAGE + "{% endfor %}" + PROMPT,
    "refuses": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + MESSAGE + "{% endfor %}" + PROMPT,
}  # fmt: skip
"""They look ahead, or write behind the loop what depends on it, or do what cannot be seen through."""

texts = st.text(st.sampled_from("ab \n<|im_end|>{}é😀"), min_size=1, max_size=8)
messages = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(("system", "user", "assistant", "tool", "user", "assistant")),
        texts,
    ),
    min_size=1,
    max_size=6,
)


def reference(tokenizer: Any, conversation: list[dict[str, str]]) -> list[tuple[str, str]] | str:
    """By the tokenizer, a turn at a time."""

    def text(given: list[dict[str, str]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(given, tokenize=False, **options))

    ends = [end for end in range(2, len(conversation) + 1) if conversation[end - 1]["role"] == "assistant"]
    try:
        return [(text(conversation[: end - 1], add_generation_prompt=True), text(conversation[:end])) for end in ends]
    except Exception as error:
        return str(error)


def said(quick: PlainTemplate, conversation: list[dict[str, str]]) -> list[tuple[str, str]] | str:
    try:
        return quick.turns(conversation)
    except Exception as error:
        return str(error)


def plain(tokenizer: Any) -> PlainTemplate:
    quick = plain_template(tokenizer, tokenizer.chat_template)
    assert quick is not None
    return quick


@pytest.mark.parametrize("source", [*APPENDING.values(), *LOOKING.values()], ids=[*APPENDING, *LOOKING])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(conversation=messages)
def test_turns_are_those_of_the_tokenizer(make_tokenizer: MakeTokenizer, source: str, conversation: Any) -> None:
    tokenizer = make_tokenizer(source)
    assert said(plain(tokenizer), conversation) == reference(tokenizer, conversation)


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def renders(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> int:
    """How many times the template is run for CHAT."""
    quick, count = plain(tokenizer), 0
    pieces = PlainTemplate._pieces

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return pieces(*args, **options)

    quick.turns(CHAT)  # the generation prompt is known from then on
    monkeypatch.setattr(PlainTemplate, "_pieces", counting)
    assert quick.turns(CHAT) == reference(tokenizer, CHAT)
    return count


@pytest.mark.parametrize("source", APPENDING.values(), ids=APPENDING)
def test_a_template_that_only_appends_is_rendered_once(
    monkeypatch: pytest.MonkeyPatch, make_tokenizer: MakeTokenizer, source: str
) -> None:
    assert renders(monkeypatch, make_tokenizer(source)) == 1


@pytest.mark.parametrize(
    "name", ["rewrites", "last", "length", "prompt_in_loop", "tail_of_state", "tail_calls", "skips"]
)
def test_a_template_that_looks_ahead_is_rendered_turn_by_turn(
    monkeypatch: pytest.MonkeyPatch, make_tokenizer: MakeTokenizer, name: str
) -> None:
    assert renders(monkeypatch, make_tokenizer(LOOKING[name])) >= 4


def test_what_a_template_cannot_be_watched_through_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    peeking = PlainTemplate(LOOKING["peeks_at_tools"], {})
    looks_ahead, does_not = [CHAT[1], {"role": "tool", "content": "t"}, CHAT[2]], CHAT
    tried = 0
    watched = PlainTemplate._watched

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal tried
        tried += 1
        return watched(*args, **options)

    peeking.turns([CHAT[1], CHAT[2]])  # the generation prompt is known from then on
    monkeypatch.setattr(PlainTemplate, "_watched", counting)
    for _ in range(63):
        peeking.turns(looks_ahead)
    peeking.turns([CHAT[1], CHAT[2]])  # one between them that does not: the count begins anew
    for _ in range(70):
        peeking.turns(looks_ahead)
    assert tried == 63 + 1 + 64
    assert peeking.turns(does_not)[-1][1].endswith("four<|im_end|>\n")


def test_messages_note_how_far_they_were_looked_at() -> None:
    watched = Watched(CHAT)
    assert (watched[0], watched.seen) == (CHAT[0], 1)
    assert bool(watched)
    rest = watched[1:]
    assert watched.seen == 1
    assert (rest[1], watched.seen) == (CHAT[2], 3)
    loop = iter(rest)
    assert (next(loop), watched.loops, watched.start, watched.seen, watched.finished) == (CHAT[1], 1, 1, 3, False)
    assert list(loop) == CHAT[2:]
    assert (watched.seen, watched.finished) == (6, True)
    looks = (len, repr, str, lambda it: it[-1], lambda it: it[:2], lambda it: it[::-1], list, lambda it: it[5:][:1],
             lambda it: it == CHAT, lambda it: it != it[:0], lambda it: CHAT[0] in it[4:])  # fmt: skip
    for look in looks:
        watched = Watched(CHAT)
        answer = look(watched)
        assert watched.seen == 6
        assert answer == look(CHAT)


def test_the_tokenizers_way_is_taken_where_the_first_comes_out_otherwise(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(PlainTemplate, "turns", lambda self, messages: [("wrong", "wrong and")])
    assert turns_of_all(tokenizer, [{"messages": CHAT}] * 3) == [reference(tokenizer, CHAT)] * 3


def test_the_tokenizers_way_is_taken_where_transformers_has_another(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.delattr("transformers.utils.chat_template_utils._compile_jinja_template")
    assert plain_template(tokenizer, tokenizer.chat_template) is None
    monkeypatch.undo()
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: ["mine"])
    assert plain_template(tokenizer, tokenizer.chat_template) is None


def test_conversations_with_more_than_texts_go_the_tokenizers_way_beside_the_others(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP + PROMPT)
    tools = [{"type": "function", "function": {"name": "f"}}]
    mixed = [{"messages": CHAT}, {"messages": CHAT, "tools": tools}, {"messages": CHAT[1:3]}]
    assert [is_plain(conversation) for conversation in mixed] == [True, False, True]
    first, with_tools, last = turns_of_all(tokenizer, mixed)
    assert first == reference(tokenizer, CHAT)
    assert last == reference(tokenizer, CHAT[1:3])
    assert not isinstance(with_tools, ValueError)
    assert with_tools[0][0].startswith('[{"type"')


def test_a_refused_conversation_leaves_the_others(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(LOOKING["refuses"])
    odd = {"messages": [CHAT[1], CHAT[1], CHAT[2]]}
    good = {"messages": CHAT[1:]}
    first, refused, last = turns_of_all(tokenizer, [good, odd, good])
    assert first == last == reference(tokenizer, CHAT[1:])
    assert str(refused) == "the chat template refuses this conversation: roles must alternate"


def test_a_broken_template_is_told_of_by_the_row(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}")
    [refused] = turns_of_all(tokenizer, [{"messages": CHAT}])
    assert "the chat template refuses this conversation: Unexpected end of template" in str(refused)


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(conversations=st.lists(messages, min_size=1, max_size=4))
def test_marks_are_those_of_the_tokenizer(make_tokenizer: MakeTokenizer, conversations: Any) -> None:
    tokenizer = make_tokenizer(MARKED)
    expected = [
        tokenizer.apply_chat_template(one, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for one in conversations
    ]
    found = marked_token_ids(tokenizer, [{"messages": one} for one in conversations])
    assert found == [(one["input_ids"], one["assistant_masks"]) for one in expected]


# --- pieces


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.lists(st.text(max_size=12) | texts, min_size=1, max_size=5), min_size=1, max_size=4))
def test_pieces_come_out_as_each_by_itself(tokenizer: Any, rows: list[list[str]]) -> None:
    expected = [[*token_ids(tokenizer, row[:1]), *continued_token_ids(tokenizer, row[1:])] for row in rows]
    assert PieceTokenizer(tokenizer)(rows) == expected


def test_a_text_that_holds_the_separator_is_cut_apart_all_the_same(tokenizer: Any) -> None:
    pieces = PieceTokenizer(tokenizer)
    assert pieces._separator is not None
    assert pieces._separator.text == "<|endoftext|>"
    rows = [["a<|endoftext|>b", "c"], ["d", "e"]]
    end = pieces._separator.token
    found = pieces(rows)
    assert found == [[*token_ids(tokenizer, row[:1]), *token_ids(tokenizer, row[1:])] for row in rows]
    assert end in found[0][0]


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([AddedToken("<|free|>", special=True, normalized=False)], "<|free|>"),
        ([AddedToken("<|im_start|>", special=True, normalized=False)], None),  # in the template
        ([AddedToken("EOS", special=True, normalized=False)], None),
        ([AddedToken("<|free|>", special=False, normalized=False)], None),
        ([AddedToken("<|free|>", special=True, normalized=True)], None),
        ([AddedToken("<|free|>", special=True, normalized=False, lstrip=True)], None),
        ([AddedToken("<|free|>", special=True, normalized=False, rstrip=True)], None),
        ([AddedToken("<|free|>", special=True, normalized=False, single_word=True)], None),
        ([AddedToken("<|free|>", special=True, normalized=False), AddedToken("<<|free|>", special=False)], None),
        ([AddedToken("<|free|>", special=True, normalized=False), AddedToken("a<", special=False)], None),
        ([AddedToken("<|free|>", special=True, normalized=False), AddedToken("foo", single_word=True)], "<|free|>"),
    ],
)
def test_a_separator_stands_alone(added: list[Any], expected: str | None) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["hello world " * 9], trainer)
    inner.add_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = APPENDING["chatml"]
    pieces = PieceTokenizer(tokenizer)
    assert (pieces._separator and pieces._separator.text) == expected
    rows = [["a foo", "foo b"], ["a<", "b<|free|>c"], ["<", "|free|>"]]
    assert pieces(rows) == [[*token_ids(tokenizer, row[:1]), *continued_token_ids(tokenizer, row[1:])] for row in rows]


def test_a_tokenizer_that_puts_a_space_before_every_text_is_given_each_by_itself() -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(["hello world " * 9], trainers.BpeTrainer(vocab_size=90, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", additional_special_tokens=["<sep>"])
    rows = [["hello", " world", "hello"], ["world"]]
    expected = [[*token_ids(tokenizer, row[:1]), *continued_token_ids(tokenizer, row[1:])] for row in rows]
    assert PieceTokenizer(tokenizer)(rows) == expected


def test_padding_and_truncation_of_others_do_not_reach_the_ids(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    alone = token_ids(tokenizer, ["hello world", "a"])
    tokenizer(["hello world", "a"], padding=True, truncation=True, max_length=4)
    assert token_ids(tokenizer, ["hello world", "a"]) == alone
