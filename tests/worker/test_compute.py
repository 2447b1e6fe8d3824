"""Turns and the thread that computes."""

import asyncio
import threading
import time

import pytest

from lightning_trainer.worker.compute import Compute, Turns


async def queue_up(turns: Turns, order: list[str], name: str, urgent: bool = False) -> None:
    await turns.take(urgent)
    order.append(name)
    await asyncio.sleep(0)
    turns.give()


def test_turns_come_in_order_and_urgent_ones_first() -> None:
    async def scene() -> list[str]:
        turns, order = Turns(), []
        await turns.take()
        tasks = [asyncio.create_task(queue_up(turns, order, name, name == "urgent")) for name in ("a", "b", "urgent")]
        await asyncio.sleep(0)
        assert (turns.waiting, turns.taken) == (3, True)
        turns.give()
        await asyncio.gather(*tasks)
        assert (turns.waiting, turns.taken) == (0, False)
        return order

    assert asyncio.run(scene()) == ["urgent", "a", "b"]


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_turn_is_not_lost_with_who_waited_for_it(handed_over: bool) -> None:
    async def scene() -> list[str]:
        turns, order = Turns(), []
        await turns.take()
        given_up = asyncio.create_task(turns.take())
        last = asyncio.create_task(queue_up(turns, order, "last"))
        await asyncio.sleep(0)
        if handed_over:
            turns.give()
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        if not handed_over:
            turns.give()
        await last
        assert not turns.taken
        return order

    assert asyncio.run(scene()) == ["last"]


def test_a_place_is_taken_at_once_and_can_be_left_before_and_after_its_turn_has_come() -> None:
    async def scene() -> None:
        turns = Turns()
        places = []
        for ahead in range(4):
            assert turns.waiting + turns.taken == ahead
            places.append(turns.enter())
        turns.leave(places[1])  # its turn has not come
        assert turns.waiting == 2
        turns.leave(places[0])  # its turn has
        assert [place.done() for place in places[2:]] == [True, False]
        turns.leave(places[2])
        await asyncio.wait_for(places[3], 1)
        turns.give()
        assert not turns.taken

    asyncio.run(scene())


def test_the_thread_hands_on_results_and_faults_and_ends() -> None:
    async def scene() -> None:
        compute = Compute()
        assert await compute.run(threading.get_ident) == await compute.run(threading.get_ident)
        with pytest.raises(ZeroDivisionError):
            await compute.run(lambda: 1 // 0)
        assert compute.close(5)

    asyncio.run(scene())


def test_a_thread_that_hangs_is_not_waited_for() -> None:
    compute, gate = Compute(), threading.Event()
    compute.submit(lambda: gate.wait(5))
    began = time.monotonic()
    assert not compute.close(0.05)
    assert time.monotonic() - began < 1
    gate.set()
    assert compute.close(5)


def test_a_turn_is_not_lost_on_one_who_was_cancelled_in_the_same_moment() -> None:
    async def act() -> None:
        turns = Turns()
        await turns.take()
        waiting = asyncio.ensure_future(turns.take())
        await asyncio.sleep(0)
        waiting.cancel()
        turns.give()  # before the one who waited has heard of it
        assert not turns.taken
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(turns.take(), 1)

    asyncio.run(act())
