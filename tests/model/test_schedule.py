"""Schedules against factors worked out by hand."""

import math
from typing import Any

import pytest
import torch

from lightning_trainer.model.schedule import StepSchedule, WarmupConstant, WarmupCosine, WarmupStableDecay

PEAK = 0.1


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(schedule: StepSchedule, steps: int) -> list[float]:
    """The rate each of the first `steps` optimizer steps is made with, as a share of the peak."""
    out = []
    for _ in range(steps):
        out.append(schedule.optimizer.param_groups[0]["lr"] / PEAK)
        schedule.optimizer.step()
        schedule.step()
    return out


def test_warmup_rises_in_equal_parts() -> None:
    assert rates(WarmupConstant(optimizer(), warmup_steps=3, total_steps=10), 6) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    )


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    want = [1 / 2, 1, 0.5 + half / 2, 0.5, 0.5 - half / 2]  # after one warm-up step, quarters of half a circle
    assert rates(WarmupCosine(optimizer(), warmup_steps=1, total_steps=5), 5) == pytest.approx(want)


def test_cosine_ends_at_its_floor_and_stays() -> None:
    schedule = WarmupCosine(optimizer(), warmup_steps=0, total_steps=4, min_lr_ratio=0.2)
    assert schedule.factor(2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert [schedule.factor(4), schedule.factor(400)] == pytest.approx([0.2, 0.2])


def test_stable_then_a_line_down() -> None:
    schedule = WarmupStableDecay(optimizer(), warmup_steps=2, total_steps=12, decay_fraction=0.4, min_lr_ratio=0.1)
    line = [0.1 + 0.9 * share for share in (1, 3 / 4, 2 / 4, 1 / 4)]
    assert rates(schedule, 12) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, *line])
    assert schedule.factor(12) == pytest.approx(0.1)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_stable_decay_at_its_limits(fraction: float) -> None:
    schedule = WarmupStableDecay(optimizer(), warmup_steps=0, total_steps=4, decay_fraction=fraction)
    want = [1, 1, 1, 1] if fraction == 0 else [1, 3 / 4, 2 / 4, 1 / 4]
    assert [schedule.factor(s) for s in range(4)] == pytest.approx(want)


def test_warmup_is_3_percent_by_default() -> None:
    schedule = WarmupConstant(optimizer(), total_steps=101)  # 3.03 steps, rounded up
    assert [schedule.factor(s) for s in range(5)] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1])


@pytest.mark.parametrize("cls", [WarmupConstant, WarmupCosine, WarmupStableDecay])
def test_total_steps_come_from_the_trainer_unless_set(cls: Any) -> None:
    mine = cls(optimizer(), warmup_steps=0)
    mine.fit_to(10)
    assert mine.total_steps == 10
    users = cls(optimizer(), warmup_steps=0, total_steps=7)
    users.fit_to(10)
    assert users.total_steps == 7


def test_fit_to_sets_the_first_rate() -> None:
    schedule = WarmupConstant(optimizer())
    schedule.fit_to(100)
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(PEAK / 4)
    assert schedule.get_last_lr() == pytest.approx([PEAK / 4])


@pytest.mark.parametrize("cls", [WarmupConstant, WarmupCosine, WarmupStableDecay])
def test_a_resumed_run_goes_on_with_the_same_rates(cls: Any) -> None:
    whole = rates(cls(optimizer(), warmup_steps=3, total_steps=20), 20)
    first = cls(optimizer(), warmup_steps=3, total_steps=20)
    rates(first, 8)
    second = cls(optimizer(), warmup_steps=3, total_steps=20)
    second.load_state_dict(first.state_dict())
    assert rates(second, 12) == pytest.approx(whole[8:], abs=0)


def test_a_changed_peak_takes_effect_at_once_on_resume() -> None:
    first = WarmupConstant(optimizer(), warmup_steps=1, total_steps=20)
    rates(first, 5)
    new = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    second = WarmupConstant(new, warmup_steps=1, total_steps=20)
    second.load_state_dict(first.state_dict())
    assert new.param_groups[0]["lr"] == pytest.approx(0.7)


def test_the_state_is_the_step_alone() -> None:
    schedule = WarmupCosine(optimizer(), warmup_steps=1, total_steps=5)
    rates(schedule, 2)
    assert schedule.state_dict() == {"last_epoch": 2, "_step_count": 3}


def test_groups_keep_their_own_peaks() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    two = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    WarmupConstant(two, warmup_steps=1, total_steps=4)
    assert [group["lr"] for group in two.param_groups] == pytest.approx([0.5, 0.05])


def test_warmup_as_long_as_the_run() -> None:
    schedule = WarmupCosine(optimizer(), warmup_steps=4, total_steps=4)
    assert [schedule.factor(s) for s in range(4)] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    assert math.isfinite(schedule.factor(5))


@pytest.mark.parametrize(
    ("cls", "bad", "match"),
    [
        (WarmupConstant, {"warmup_steps": -1}, "warmup_steps must not be negative, not -1"),
        (WarmupCosine, {"total_steps": 0}, "total_steps must be at least 1, not 0"),
        (WarmupStableDecay, {"decay_fraction": 1.5}, r"decay_fraction must lie in \[0, 1\], not 1.5"),
    ],
)
def test_bad_arguments_are_refused(cls: Any, bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(optimizer(), **bad)
