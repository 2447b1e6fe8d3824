"""Chat templates of plain conversations (roles and texts alone), rendered as `apply_chat_template` does, but quicker.

What is trained in a conversation is found by rendering it up to each answer, and with it: two renders an answer. A
template that only appends needs one for all of them, because the text up to an answer is how the whole text begins:

    <|im_start|>user\\nhi<|im_end|>\\n | <|im_start|>assistant\\nhello<|im_end|>\\n |
                                    ^ end of message 0                         ^ end of message 1

That a template only appends is not guessed from its output but watched, conversation by conversation: a mark behind the
body of its loop says where each message ends, and the list of messages notes how far the template has looked. What was
written before the template looked at a message cannot depend on it. What stands behind the loop (the generation prompt)
must name nothing that the loop or the messages could have changed, which its syntax tree says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_trainer.types import Message

PLAIN_KEYS = {"role", "content"}

GIVE_UP_AFTER = 64
"""So many conversations, one after the other, had to be rendered turn by turn: the template's others will, too."""

_PROMPT_FLAG = "add_generation_prompt"

_LOOP_NUMBERS = frozenset({"index", "index0", "first", "last", "length", "revindex", "revindex0"})

_SCALARS = frozenset({bool, int, str})


def is_plain(conversation: Mapping[str, Any]) -> bool:
    """Whether there is nothing in it but messages, and nothing in them but roles and texts."""
    return conversation.keys() == {"messages"} and all(
        type(message) is dict and message.keys() == PLAIN_KEYS and type(message["content"]) is str
        for message in conversation["messages"]
    )


def plain_template(tokenizer: PreTrainedTokenizerBase, source: str) -> PlainTemplate | None:
    """The template `source` with the tokenizer's special tokens; None where it renders in a way of its own."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    own_way = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if own_way or not hasattr(chat_template_utils, "_compile_jinja_template"):
        return None
    try:
        return _compiled(source, json.dumps(tokenizer.special_tokens_map))
    except (TypeError, TemplateError):  # tokens that are objects; a broken template: the tokenizer says what it thinks
        return None


@lru_cache(maxsize=16)
def _compiled(source: str, special_tokens: str) -> PlainTemplate:
    return PlainTemplate(source, json.loads(special_tokens))


class PlainTemplate:
    """One chat template.

    Args:
        source: In Jinja's language.
        special_tokens: Names and texts that the template may use.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._environment = _with_quick_attributes(_compile_jinja_template(source).environment)
        self._tracker: Any = next(
            (part for part in self._environment.extensions.values() if hasattr(part, "activate_tracker")), None
        )
        self._template = self._environment.from_string(source)
        self._variables = {"tools": None, "documents": None, **special_tokens}
        watching = _with_message_ends(self._environment.parse(source))
        self._watching = None if watching is None else self._environment.from_string(watching)
        self._generation_prompt: str | None = None  # where it is the same for all
        self._looks_ahead = 0

    @property
    def has_tracker(self) -> bool:
        """Whether `generated` can say what stands within marks."""
        return self._tracker is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            jinja2.TemplateError: The template refuses it; or whatever else Jinja lets through.
        """
        return "".join(self._pieces(self._template, messages, add_generation_prompt))

    def _pieces(self, template: Any, messages: Any, add_generation_prompt: bool, **more: Any) -> Iterator[str]:
        variables = {"messages": messages, _PROMPT_FLAG: add_generation_prompt, **self._variables, **more}
        pieces: Iterator[str] = template.root_render_func(template.new_context(variables))
        return pieces

    def generated(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and (start, end) of what stands within its `{% generation %}` marks.

        Raises:
            jinja2.TemplateError: The template refuses the conversation; or whatever else Jinja lets through.
        """
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        with self._tracker.activate_tracker(pieces, spans):
            for piece in self._pieces(self._template, messages, False):
                pieces.append(piece)  # each at once: the tracker counts what stands there
        return "".join(pieces), spans

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """Of each answer that has something before it, the text up to it, generation prompt included, and with it.

        Raises:
            jinja2.TemplateError: The template refuses one of them; or whatever else Jinja lets through.
        """
        ends = [end for end in range(2, len(messages) + 1) if messages[end - 1]["role"] == "assistant"]
        if not ends:
            return []
        if self._looks_ahead < GIVE_UP_AFTER and (once := self._in_one_render(messages, ends)) is not None:
            self._looks_ahead = 0
            return once
        self._looks_ahead += 1
        return [(self.render(messages[: end - 1], True), self.render(messages[:end])) for end in ends]

    def _in_one_render(self, messages: Sequence[Message], ends: Sequence[int]) -> list[tuple[str, str]] | None:
        """The same, or None where the template could have looked ahead."""
        if self._watching is None:
            return None
        try:
            text, places = self._watched(messages[: ends[-1]])
            if not all(end in places and end - 1 in places for end in ends):
                return None
            if self._generation_prompt is None:
                before = ends[0] - 1
                begun, places_begun = self._watched(messages[:before], add_generation_prompt=True)
                if before not in places_begun:
                    return None
                self._generation_prompt = begun[places_begun[before] :]
        except (TemplateError, TypeError, LookupError, AttributeError, ValueError):
            return None  # turn by turn it comes to light whether the template refuses one of them, and why
        prompt, closing = self._generation_prompt, text[places[ends[-1]] :]
        return [(text[: places[end - 1]] + prompt, text[: places[end]] + closing) for end in ends]

    def _watched(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, dict[int, int]]:
        """The text, and by number of messages where what they alone account for ends; nothing where that is unclear."""
        watched, pieces, size = Watched(messages), [], 0
        places: dict[int, int] = {}
        for piece in self._pieces(self._watching, watched, add_generation_prompt, **{_END_NAME: _END}):
            if piece is _END:
                count = watched.start + len(places) + 1
                if watched.seen != count or watched.loops != 1:
                    return "", {}  # something else was looked at than the messages one by one
                places[count] = size
            else:
                pieces.append(piece)
                size += len(piece)
        return ("".join(pieces), places) if watched.finished else ("", {})


class _EndOfMessage(str):
    """Stands among the pieces of a rendered text; is no text itself."""

    __slots__ = ()

    def __str__(self) -> str:
        return self


_END = _EndOfMessage()

_END_NAME = "lightning_trainer_end_of_message"


class Watched(Sequence["Message"]):
    """Messages that note how many of them have been looked at.

    Args:
        messages: All.
        start: How many at the front are not shown, because the template took a slice.
        whole: What this is a slice of; it keeps the notes.

    Attributes:
        seen: How many messages were looked at; one more than there are, once it could be told how many there are.
        loops: How many loops there were over them.
        start: Where the last of these began.
        finished: Whether it came to the end.
    """

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __init__(self, messages: Sequence[Message], start: int = 0, whole: Watched | None = None) -> None:
        self._messages, self._start = messages, start
        self._whole = self if whole is None else whole
        self.seen = self.loops = self.start = 0
        self.finished = False

    def look(self, count: int | None = None) -> None:
        """Note that so many messages have been looked at; None: all, and how many they are."""
        count = len(self._messages) + 1 if count is None else count
        self._whole.seen = max(self._whole.seen, count)

    def __len__(self) -> int:
        self.look()
        return len(self._messages) - self._start

    def __bool__(self) -> bool:
        self.look(self._start + 1)
        return len(self._messages) > self._start

    def __repr__(self) -> str:
        self.look()
        return repr(self._messages[self._start :])

    def __eq__(self, other: object) -> bool:
        self.look()
        return self._messages[self._start :] == (list(other) if isinstance(other, Watched) else other)

    def __iter__(self) -> Iterator[Message]:
        whole = self._whole
        whole.loops, whole.start = whole.loops + 1, self._start
        for place in range(self._start, len(self._messages)):
            if whole.seen <= place:
                whole.seen = place + 1
            yield self._messages[place]
        self.look()
        whole.finished = True

    @overload
    def __getitem__(self, place: int) -> Message: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Message]: ...
    def __getitem__(self, place: int | slice) -> Message | Sequence[Message]:
        if isinstance(place, int) and place >= 0:
            self.look(min(self._start + place, len(self._messages)) + 1)
            return self._messages[self._start + place]
        if isinstance(place, slice) and (place.start or 0) >= 0 and place.stop is None and place.step in (None, 1):
            return Watched(self._messages, self._start + (place.start or 0), self._whole)
        self.look()
        return self._messages[self._start :][place]


def _with_quick_attributes(environment: Any) -> Any:
    """A sandbox that answers the commonest questions (`message.role`, `loop.first`, `ns.last`) without looking them up.

    The answers are those of the sandbox: a key of a dictionary that is no method's name, a loop's numbers, a
    namespace's plain values.
    """
    from jinja2.runtime import LoopContext
    from jinja2.utils import Namespace

    careful: Callable[[Any, str], Any] = environment.getattr

    def quick(thing: Any, name: str) -> Any:
        kind = type(thing)
        if kind is dict:
            if name in thing and not hasattr(dict, name):
                return thing[name]
        elif kind is LoopContext:
            if name in _LOOP_NUMBERS:
                return getattr(thing, name)
        elif isinstance(thing, Namespace):
            value = getattr(thing, name, None)
            if type(value) in _SCALARS:
                return value
        elif kind is Watched:
            thing.look()  # it has other attributes than the list it stands for
        return careful(thing, name)

    overlaid = environment.overlay()
    overlaid.getattr = quick
    return overlaid


def _with_message_ends(tree: Any) -> Any:
    """The template with a mark behind the body of its last loop; None where what follows depends on the messages."""
    from jinja2 import nodes

    loops = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops:
        return None
    main, tail = tree.body[loops[-1]], tree.body[loops[-1] + 1 :]
    in_tail = [name.name for node in tail for name in node.find_all(nodes.Name)]
    everywhere = [name.name for name in tree.find_all(nodes.Name)]
    changeable = {"messages"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    calls = [call for node in tail for call in node.find_all(nodes.Call)]
    if changeable & {*in_tail} or calls or everywhere.count(_PROMPT_FLAG) != in_tail.count(_PROMPT_FLAG):
        return None
    if _END_NAME in everywhere:
        return None
    main.body.append(nodes.Output([nodes.Name(_END_NAME, "load")]).set_environment(tree.environment))
    return tree
