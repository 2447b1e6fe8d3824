"""When a worker is called, and when it is left alone."""

import random

from lightning_trainer.preview.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_three_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.wait() is None
    for _ in range(3):
        breaker.failed()
    assert breaker.state == "open"


def test_probes_become_rarer_up_to_a_minute_and_vary_by_a_fifth() -> None:
    clock = Clock()
    breaker = Breaker(clock, random.Random(0))
    breaker.failed()
    breaker.failed()
    waits = []
    for _ in range(12):
        breaker.failed()
        wait = breaker.wait()
        assert wait is not None
        waits.append(wait)
        clock.now += wait
        assert breaker.wait() == 0.0
    expected = [min(60.0, 1.6**n) for n in range(12)]
    assert all(0.8 * e <= w <= 1.2 * e for w, e in zip(waits, expected, strict=True))
    assert len({round(w / e, 6) for w, e in zip(waits, expected, strict=True)}) > 6
    breaker.succeeded()
    assert (breaker.state, breaker.wait()) == ("closed", None)


def test_a_refusal_is_for_good() -> None:
    breaker = Breaker()
    breaker.refused()
    breaker.succeeded()
    breaker.failed()
    assert (breaker.state, breaker.wait()) == ("off", None)
