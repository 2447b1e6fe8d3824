"""The profile that trains rows as they are."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_trainer.profiles.base import DataProfile


class Plain(DataProfile):
    """The system prompt goes first, nothing else changes; `text` rows pass as they are.

    Has no system prompt of its own: rows get one only where the configuration gives it.
    """

    name: ClassVar[str] = "plain"
    description: ClassVar[str] = "Rows as they are, with the system prompt in front"
    version: ClassVar[str] = "1"

    def transform_text(self, conversation: dict[str, Any]) -> dict[str, Any]:
        """A `text` row is trained whole; a system prompt has no place in it."""
        return conversation
