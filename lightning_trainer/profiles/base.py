"""What a profile is: how a row becomes a conversation, and which logits rules and which check go with it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_trainer.profiles.row_forms import conversation_from_row, text_of, with_text
from lightning_trainer.types import CheckResult, LogitsRule, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_trainer.logits_rules import RuleProcessor

SystemPromptMode = Literal["prepend", "replace"]


class DataProfile:
    """Base of all profiles; on its own it only adds the system prompt.

    A profile of your own overrides `transform_messages` (the usual case: rows are read and the system prompt is in
    place) or `transform_example` (everything), and `check` where it can say what a good answer is. Name it in the YAML
    as `class_path: my_package.MyProfile`. Constructor arguments become YAML keys.

    Attributes:
        name: How `get_profile` knows it; the class name where a subclass sets none.
        description: One line for people.
        version: Changes when the same row would be transformed differently.
        system_prompt_template: System prompt used where the configuration gives none; `{date}` becomes the date the
            run began, any other brace is literal text. None: no system prompt.
    """

    name: ClassVar[str] = "base"
    description: ClassVar[str] = ""
    version: ClassVar[str] = "1"
    system_prompt_template: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a subclass after its class where it gives no name of its own."""
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def transform_example(
        self,
        example: Row,
        index: int,
        system_prompt: str | None,
        *,
        rng: random.Random | None = None,
        system_prompt_mode: SystemPromptMode = "prepend",
    ) -> dict[str, Any]:
        """One row as the conversation that is trained on. Pure: neither the row nor the global RNG is touched.

        Args:
            example: The row as read.
            index: Position of the row in its split.
            system_prompt: Rendered system prompt (see `render_system_prompt`); None or blank adds none.
            rng: Source of every draw; key it by (seed, split, row). None: one keyed by `index`.
            system_prompt_mode: What happens to the row's own system message: `prepend` keeps it behind ours, in one
                message; `replace` puts ours in its place.

        Returns:
            `{"messages": [...]}` or `{"text": ...}`, with `tools` and `documents` where the row has them.

        Raises:
            ValueError: The row is malformed, or this profile cannot use it.
        """
        conversation = conversation_from_row(example)
        if "text" in conversation:
            return self.transform_text(conversation)
        messages = with_system_prompt(conversation["messages"], system_prompt, system_prompt_mode)
        rng = random.Random(f"{self.name}:{index}") if rng is None else rng
        return {**conversation, "messages": self.transform_messages(messages, rng)}

    def transform_messages(self, messages: list[Message], rng: random.Random) -> list[Message]:
        """What the profile makes of the messages, system prompt included. The list and its messages may be reused."""
        return messages

    def transform_text(self, conversation: dict[str, Any]) -> dict[str, Any]:
        """What the profile makes of a `text` row, which has no turns; by default it is refused."""
        raise ValueError(
            f"a 'text' row has no turns for profile {self.name!r} to work on; "
            f"use profile Plain, or give the row 'messages' or 'prompt' and 'response'"
        )

    def problems(self, example: Row) -> list[str]:
        """Why the row cannot be trained on under this profile; empty when it can."""
        try:
            self.transform_example(example, 0, None)
        except ValueError as error:
            return [str(error)]
        return []

    def validate_example(self, example: Row) -> bool:
        """Whether the row has no problems."""
        return not self.problems(example)

    def build_logits_rules(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> tuple[LogitsRule, ...]:
        """The rules under which an answer to `prompt` is generated.

        Args:
            tokenizer: Gives the token ids; the rules hold nothing else of it.
            prompt: Text of the last user message, as transformed. Rules belong to one prompt.
        """
        return ()

    def build_logits_processors(self, tokenizer: PreTrainedTokenizerBase, prompt: str = "") -> list[RuleProcessor]:
        """The same rules as a list for one call of transformers' `generate(logits_processor=...)`."""
        # Late: profiles load without torch.
        from lightning_trainer.logits_rules import RuleProcessor

        rules = self.build_logits_rules(tokenizer, prompt)
        return [RuleProcessor([rules])] if rules else []

    def check(self, prompt: str, golden: str | None, answer: str) -> CheckResult:
        """Whether an answer keeps the profile's contract, and whether it is right.

        By default an answer only has to say something; it is known to be right where it equals the golden answer.
        Never raises, whatever the text.

        Args:
            prompt: Text of the last user message, as transformed.
            golden: The row's own answer, transformed or not; None where there is none.
            answer: What the model wrote, without the prompt.
        """
        if not answer.strip():
            return CheckResult(ok=False, reason="the answer is empty")
        return CheckResult(ok=True, correct=same_text(golden, answer))

    @staticmethod
    def render_system_prompt(template: str | None, date: str) -> str | None:
        """The template with the run's date in it; None where there is nothing to say.

        Args:
            template: May hold `{date}`; every other brace is literal text.
            date: The date the run began.
        """
        if template is None or not template.strip():
            return None
        return template.replace("{date}", date)


def accepted_keywords(profile: DataProfile, **keywords: Any) -> dict[str, Any]:
    """Those keywords that the profile's `transform_example` takes.

    A profile of the user's own may know the three positional arguments alone.
    """
    parameters = _parameters(type(profile).transform_example)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}


@lru_cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def with_system_prompt(messages: list[Message], prompt: str | None, mode: SystemPromptMode) -> list[Message]:
    """A new list that opens with the system prompt; always one message, as some templates refuse a second."""
    if mode not in ("prepend", "replace"):
        raise ValueError(f"system_prompt_mode is {mode!r}; it must be 'prepend' or 'replace'")
    if prompt is None or not prompt.strip():
        return list(messages)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages]
    own = text_of(messages[0])
    text = f"{prompt}\n\n{own}" if mode == "prepend" and own.strip() else prompt
    return [with_text(messages[0], text), *messages[1:]]


def same_text(golden: str | None, answer: str) -> Literal[True] | None:
    """True where the texts agree. None otherwise: words that differ may still be right."""
    return True if golden is not None and golden.strip() == answer.strip() else None
