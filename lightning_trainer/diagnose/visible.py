"""Characters of a row that would not be seen, or would do something, made visible."""

from __future__ import annotations

import re
import unicodedata

NEWLINE = "↵"

# Joiners hold emoji families and Persian words together: they are seen by what they do.
_SEEN = "\u200c\u200d"

_NAMED = {"\t": "\\t", "\r": "\\r"}

_SUSPECT = re.compile(r"[^\n -~]")


def parts(text: str, also: str = "") -> list[tuple[bool, str]]:
    """The text in runs of (escaped?, characters); newlines stay in it.

    Escaped are control characters, which could drive a terminal, and formatting ones, which turn the direction of text
    or are not seen at all.

        "a\\x1b[2Jb" -> [(False, "a"), (True, "\\\\x1b"), (False, "[2Jb")]

    Args:
        text: Of a row.
        also: Characters that mean something where the text is shown.
    """
    runs: list[tuple[bool, str]] = []
    for character in text:
        hidden = character in also or _is_hidden(character)
        shown = _escape(character) if hidden else character
        if runs and runs[-1][0] == hidden:
            runs[-1] = (hidden, runs[-1][1] + shown)
        else:
            runs.append((hidden, shown))
    return runs


def visible(text: str) -> str:
    """One line of text with nothing hidden in it, for names and reasons."""
    return "".join(shown for _, shown in parts(text, also="\n"))


def _is_hidden(character: str) -> bool:
    if not _SUSPECT.match(character) or character in _SEEN:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    code = ord(character)
    if character in _NAMED:
        return _NAMED[character]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
