"""What holds for every profile."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trainer.profiles import PROFILES, DataProfile, EmojiThink, Regime3, get_profile
from lightning_trainer.profiles.row_forms import text_of
from lightning_trainer.types import CheckResult

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "response": "Because."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "id": 4},
    {
        "messages": [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Four.", "reasoning_content": "2+2"},
        ],
        "tools": [{"type": "function"}],
    },
    {"prompt": "Only a question?"},
]
BAD_ROWS: list[dict[str, Any]] = [
    {},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"prompt": "x", "response": ""},
]

profiles = pytest.mark.parametrize("profile", [cls() for cls in PROFILES], ids=lambda profile: profile.name)


@profiles
@pytest.mark.parametrize("row", ROWS)
def test_transform_is_pure_deterministic_and_plain_data(profile: DataProfile, row: dict[str, Any]) -> None:
    before, global_state = copy.deepcopy(row), random.getstate()
    first = profile.transform_example(row, 3, "System.", rng=random.Random("42:train:3"))
    second = profile.transform_example(row, 3, "System.", rng=random.Random("42:train:3"))
    assert first == second
    assert profile.transform_example(row, 3, "System.") == profile.transform_example(row, 3, "System.")
    assert row == before
    assert random.getstate() == global_state
    assert json.loads(json.dumps(first)) == first
    assert not set(_containers(first)) & set(_containers(row))


def _containers(value: Any) -> Iterator[int]:
    """Ids of every dict and list inside `value`."""
    if isinstance(value, dict | list):
        yield id(value)
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)


@profiles
@pytest.mark.parametrize("row", ROWS)
def test_rows_keep_their_turns_and_get_one_system_message(profile: DataProfile, row: dict[str, Any]) -> None:
    with_prompt = profile.transform_example(row, 0, "System.")["messages"]
    without = profile.transform_example(row, 0, None)["messages"]
    assert [m["role"] for m in with_prompt].count("system") == 1
    assert text_of(with_prompt[0]).startswith("System.")
    own = [m for m in without if m["role"] == "system"]
    assert with_prompt[1:] == without[len(own) :]
    assert text_of(with_prompt[0]) == "\n\n".join(["System.", *[text_of(m) for m in own]])


@profiles
@pytest.mark.parametrize("row", ROWS)
def test_good_rows_have_no_problems_and_their_answers_pass(profile: DataProfile, row: dict[str, Any]) -> None:
    assert profile.validate_example(row)
    messages = profile.transform_example(row, 0, None)["messages"]
    if messages[-1]["role"] != "assistant":
        return
    prompt = next(text_of(m) for m in reversed(messages) if m["role"] == "user")
    golden = text_of(messages[-1])
    assert profile.check(prompt, golden, golden).passed
    assert not profile.check(prompt, golden, "").ok


@profiles
@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_have_problems(profile: DataProfile, row: dict[str, Any]) -> None:
    assert not profile.validate_example(row)
    with pytest.raises(ValueError):
        profile.transform_example(row, 0, None)


TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="(add mulpowdiv=0123456789.-/)<>_ANS\n"),
    st.lists(
        st.sampled_from(["<<ANS_START>>", "<<ANS_END>>", "(pow", "(div", "9", "0", ")", "=", "🤔", "🛑", "\n", " "])
    ).map("".join),
)


@profiles
@settings(deadline=None)  # the machine may be busy
@given(prompt=TEXTS, golden=st.none() | TEXTS, answer=TEXTS)
def test_check_never_raises(profile: DataProfile, prompt: str, golden: str | None, answer: str) -> None:
    result = profile.check(prompt, golden, answer)
    assert isinstance(result, CheckResult)
    assert bool(result.reason) == (not result.passed)


@profiles
@settings(deadline=None)  # the machine may be busy
@given(
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "response", "text", "tools", "conversations"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda c: (
                st.lists(c, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), c, max_size=3)
            ),
            max_leaves=8,
        ),
    )
)
def test_any_row_is_transformed_or_refused_with_a_reason(profile: DataProfile, row: dict[str, Any]) -> None:
    assert all(isinstance(problem, str) and problem for problem in profile.problems(row))


@profiles
def test_names_lead_back(profile: DataProfile) -> None:
    assert type(get_profile(profile.name)) is type(profile) is type(get_profile(type(profile).__name__))
    assert profile.description
    assert profile.version


def test_text_rows_need_plain() -> None:
    for profile in (EmojiThink(), Regime3()):
        with pytest.raises(ValueError, match="use profile Plain"):
            profile.transform_example({"text": "Once"}, 0, None)


def test_get_profile_errors_name_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"'emoji_thnk', did you mean 'emoji_think'\?; known profiles: plain, emoji_think, regime3"
    ):
        get_profile("emoji_thnk")
    with pytest.raises(ValueError, match=r"no option 'emoji_fracton', did you mean 'emoji_fraction'\?"):
        get_profile("emoji_think", emoji_fracton=0.5)
    with pytest.raises(ValueError, match="its options: none"):
        get_profile("plain", emoji_fraction=0.5)
    with pytest.raises(ValueError, match="emoji_fraction is 2"):
        get_profile("emoji_think", emoji_fraction=2)


def test_profiles_load_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lightning_trainer.profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
