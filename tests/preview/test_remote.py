"""The remote backend with a worker that is well: right answers, rightly labelled, and training left alone."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chaos import eventually
from remote_rig import QUICK, adds_up, ask, bound, collect, content, fake_for, right, set_weights
from worker_thread import running_worker

from lightning_trainer import pretrained
from lightning_trainer.adapters import LoraSettings, put_in
from lightning_trainer.preview import LocalPreviewBackend, Prompter
from lightning_trainer.preview.remote import GrpcPreviewBackend
from lightning_trainer.profiles.plain import Plain
from lightning_trainer.rpc.layout import identity_of
from lightning_trainer.rpc.limits import Limits
from lightning_trainer.types import InputError, PreviewRequest, SamplingParams
from lightning_trainer.worker.engine import TransformersEngine


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return pretrained.load_model(str(tiny_model_dir), torch.float32).train()


@pytest.fixture
def prompter(tokenizer: Any) -> Prompter:
    return Prompter(Plain(), tokenizer)


def test_answers_are_by_the_weights_of_the_step_they_name(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model)
    with running_worker(engine) as worker, bound(worker.address, prompter, model) as backend:
        assert backend.state == "connected"
        assert backend.notices() == [f"preview worker {worker.address}: connected"]
        for step in (10, 20, 30):
            weights = set_weights(model, step)
            ask(backend, step, prompts=3)
            backend.settle()
            set_weights(model, step + 1)  # the next optimizer step, while the preview is under way
            results = collect(backend, 3)
            assert [result.prompt_id for result in results] == [f"{step}-{n}" for n in range(3)]
            assert all(right(result, step, weights, prompter) for result in results)
            assert all(result.seed == 5 and result.finish_reason == "length" for result in results)
        assert backend.counters == {
            "triggered": 3, "ok": 3, "failed": 0, "dropped": 0, "skipped": 0, "pending": 0
        }  # fmt: skip
        figures = backend.metrics()
        assert figures["push_mb"] == pytest.approx(identity_of(model).total_bytes / 1e6)
        assert 0 < figures["push_seconds"] < 5
        assert 0 <= figures["generate_seconds"] < 5
        assert (figures["dropped"], figures["failures"], figures["skipped"]) == (0, 0, 0)
        assert figures["stall_ms"] > 0
        assert backend.notices() == []


def test_weights_that_the_worker_has_are_not_sent_again(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        weights = set_weights(model, 1)
        ask(backend, 1)
        collect(backend)
        ask(backend, 2)
        assert right(collect(backend)[0], 2, weights, prompter)
        assert backend.metrics()["push_mb"] == 0
        with torch.no_grad():
            model.model.norm.weight.fill_(3.0)
        ask(backend, 3)
        assert right(collect(backend)[0], 3, content(model), prompter)
        assert backend.metrics()["push_mb"] == model.model.norm.weight.nbytes / 1e6


def test_a_real_worker_answers_as_the_model_in_training_does(
    model: Any, prompter: Prompter, tiny_model_dir: Path
) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    requests = [prompter.request({"prompt": text}, prompt_id=text, step=7) for text in ("hello", "what is the sum?")]
    greedy = prompter.sampling(max_new_tokens=6, temperature=0.0)
    local = LocalPreviewBackend()
    local.bind(prompter, model)
    local.submit(requests, greedy, 7)
    expected = [(answer.text, answer.finish_reason, answer.tokens_generated) for answer in local.collect()]
    make = lambda: TransformersEngine(tiny_model_dir, torch.float32, torch.device("cpu"))  # noqa: E731
    with running_worker(make) as worker, bound(worker.address, prompter, model) as backend:
        backend.submit(requests, greedy, 7)
        results = collect(backend, 2)
        assert [(r.text, r.finish_reason, r.tokens_generated) for r in results] == expected
        assert backend.preview("hello", step=7, max_new_tokens=6, temperature=0.0).text == expected[0][0]


def test_of_adapters_only_they_are_sent(model: Any, prompter: Prompter, tiny_model_dir: Path) -> None:
    settings = LoraSettings(rank=2, alpha=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    with torch.random.fork_rng():
        adapter = put_in(model, settings, str(tiny_model_dir))
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.uniform_(-0.5, 0.5)
    request = prompter.request({"prompt": "hello"}, prompt_id="0", step=4)
    greedy = prompter.sampling(max_new_tokens=6, temperature=0.0)
    local = LocalPreviewBackend()
    local.bind(prompter, model)
    local.submit([request], greedy, 4)
    expected = local.collect()[0].text
    make = lambda: TransformersEngine(tiny_model_dir, torch.float32, torch.device("cpu"))  # noqa: E731
    with running_worker(make) as worker, bound(worker.address, prompter, model, adapter=adapter) as backend:
        assert len(backend._bound.mailbox.slots) == 2
        backend.submit([request], greedy, 4)
        assert [result.text for result in collect(backend)] == [expected]
        assert backend.metrics()["push_mb"] == sum(t.nbytes for t in adapter.tensors().values()) / 1e6


def test_a_newer_preview_takes_the_place_of_the_one_that_waits(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model, token_seconds=0.05)
    with running_worker(engine) as worker, bound(worker.address, prompter, model) as backend:
        weights = {}
        for step in (1, 2, 3, 4):
            weights[step] = set_weights(model, step)
            ask(backend, step)
            backend.settle()
            if step == 1:
                assert eventually(lambda: backend.collect() == [] and backend._bound.mailbox.room() is not None)
            assert adds_up(backend)
        results = collect(backend, 2)
        assert [result.weights_step for result in results] == [1, 4]
        assert all(right(result, result.step, weights[result.step], prompter) for result in results)
        assert backend.counters["dropped"] == 2


def test_without_a_free_slot_a_preview_is_dropped_and_counted(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        os.kill(backend._bound.companion.pid, signal.SIGSTOP)
        started = time.perf_counter()
        for step in range(1, 6):
            ask(backend, step)
        assert time.perf_counter() - started < 0.5
        assert (backend.counters["dropped"], backend.counters["pending"]) == (4, 1)
        os.kill(backend._bound.companion.pid, signal.SIGCONT)
        assert [result.weights_step for result in collect(backend)] == [1]


def test_random_generators_and_weights_are_left_alone(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker:
        before = [p.clone() for p in model.parameters()]
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]
        with bound(worker.address, prompter, model) as backend:
            ask(backend, 1)
            assert collect(backend)[0].success
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.training


def test_a_look_without_news_costs_next_to_nothing(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        times = []
        for _ in range(300):
            started = time.perf_counter()
            backend.settle()
            backend.collect()
            times.append(time.perf_counter() - started)
        assert sorted(times)[150] < 0.05e-3


def test_finish_waits_for_what_is_under_way_and_no_longer(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model, token_seconds=0.02)
    with running_worker(engine) as worker:
        with bound(worker.address, prompter, model, flush_timeout=5.0) as backend:
            ask(backend, 1)
            assert [result.weights_step for result in backend.finish()] == [1]
        engine.token_seconds = 0.5
        with bound(worker.address, prompter, model, flush_timeout=0.3) as backend:
            ask(backend, 2, prompts=2)
            started = time.monotonic()
            results = backend.finish()
            assert time.monotonic() - started < 2.0
            assert [r.error_message for r in results] == ["not done within 0.3 s of the end of the run"] * 2
            assert backend.counters["failed"] == 1


def test_a_second_fit_starts_and_ends_cleanly(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker:
        backend = GrpcPreviewBackend(worker.address)
        for step in (1, 2):
            backend.bind(prompter, model)
            weights = set_weights(model, step)
            ask(backend, step)
            assert right(collect(backend)[0], step, weights, prompter)
            backend.close()
            backend.close()
        with pytest.raises(RuntimeError, match="bind"):
            ask(backend, 3)


def test_a_forked_child_leaves_the_dispatcher_to_its_parent(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        backend._owner += 1  # as seen from a child
        backend.close()
        backend._owner -= 1
        ask(backend, 1)
        assert collect(backend)[0].success


def test_too_little_memory_is_said_before_training(model: Any, prompter: Prompter) -> None:
    backend = GrpcPreviewBackend("127.0.0.1:1")
    backend._available = lambda: 1 << 20
    with pytest.raises(InputError, match=r"need \d+ bytes .* 1048576 are free"):
        backend.bind(prompter, model)
    assert backend._exchange is None


def test_a_quantised_base_is_refused_in_words(model: Any, prompter: Prompter) -> None:
    model.is_quantized = True
    with pytest.raises(InputError, match="quantised"):
        GrpcPreviewBackend("127.0.0.1:1").bind(prompter, model)


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"address": "nonsense"}, "address", "expected HOST:PORT"),
        ({"address": "192.168.1.5:8765"}, "address", "TLS and a token"),
        ({"address": "192.168.1.5:8765", "token_file": "token", "insecure_lan": True}, "address", "in the clear"),
        ({"address": "127.0.0.1:1", "token_file": "absent"}, "token_file", "cannot be read"),
        ({"address": "127.0.0.1:1", "token_file": "open"}, "token_file", "chmod 600"),
        ({"address": "127.0.0.1:1", "ca": "absent"}, "ca", "cannot be read"),
        ({"address": "127.0.0.1:1", "flush_timeout": -1.0}, "flush_timeout", "must lie in"),
    ],
)
def test_arguments_that_cannot_work_are_refused(settings: Any, key: str, words: str, tmp_path: Path) -> None:
    for name, mode in (("token", 0o600), ("open", 0o644)):
        (tmp_path / name).write_text("t" * 40)
        (tmp_path / name).chmod(mode)
    files = {name: tmp_path / settings[name] for name in ("ca", "token_file") if name in settings}
    with pytest.raises(InputError, match=words) as caught:
        GrpcPreviewBackend(**{**settings, **files})
    assert caught.value.key == f"preview_backend.{key}"


def test_grpc_missing_is_said_when_the_backend_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install grpcio"):
        GrpcPreviewBackend("127.0.0.1:1")


def test_the_token_is_shown(model: Any, prompter: Prompter, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s" * 40)
    file.chmod(0o600)
    with running_worker(fake_for(model), token="s" * 40) as worker:
        with bound(worker.address, prompter, model, token_file=file) as backend:
            ask(backend, 1)
            assert collect(backend)[0].success
        with bound(worker.address, prompter, model) as backend:
            assert backend.state == "off"
            assert "UNAUTHENTICATED" in backend.notices()[0]


def test_more_prompts_than_a_batch_are_answered_as_they_are_locally(
    model: Any, prompter: Prompter, tiny_model_dir: Path
) -> None:
    texts = [f"what is {n} plus {n}?" for n in range(18)]
    requests = [prompter.request({"prompt": text}, prompt_id=text, step=7) for text in texts]
    sampled = prompter.sampling(max_new_tokens=6, temperature=1.3, seed=11)
    local = LocalPreviewBackend()
    local.bind(prompter, model)
    local.submit(requests, sampled, 7)
    expected = [answer.text for answer in local.collect()]
    make = lambda: TransformersEngine(tiny_model_dir, torch.float32, torch.device("cpu"))  # noqa: E731
    with running_worker(make) as worker, bound(worker.address, prompter, model) as backend:
        backend.submit(requests, sampled, 7)
        assert [result.text for result in collect(backend, 18)] == expected
        assert backend.counters["ok"] == 1


def test_what_the_worker_does_not_take_fails_by_itself_and_in_words(model: Any, prompter: Prompter) -> None:
    limits = Limits(max_prompt_tokens=3, max_new_tokens=8)
    with (
        running_worker(fake_for(model), limits=limits) as worker,
        bound(worker.address, prompter, model) as backend,
    ):
        weights = set_weights(model, 1)
        backend.submit(
            [PreviewRequest((1, 2, 3), prompt_id="short", step=1), PreviewRequest((1,) * 4, prompt_id="long", step=1)],
            SamplingParams(max_new_tokens=8),
            1,
        )
        short, long = collect(backend, 2)
        assert right(short, 1, weights, prompter)
        assert (long.success, long.prompt_id) == (False, "long")
        assert "4 tokens, the worker takes 3: start it with --max-prompt-tokens 4" in str(long.error_message)
        ask(backend, 2, tokens=9)
        assert "--max-new-tokens 9" in str(collect(backend)[0].error_message)
        weights = set_weights(model, 3)
        ask(backend, 3)
        assert right(collect(backend)[0], 3, weights, prompter)
        assert backend.state == "connected"


def test_several_ask_at_one_step_through_one_snapshot(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model, token_seconds=0.01)
    with running_worker(engine) as worker, bound(worker.address, prompter, model) as backend:
        for step in (1, 2):
            weights = set_weights(model, step)
            for who in "abc":
                backend.submit(
                    [PreviewRequest((1, 2, 3), prompt_id=who, step=step)], SamplingParams(max_new_tokens=8), step
                )
            backend.settle()
            set_weights(model, step + 50)  # later ones must not get these
            results = collect(backend, 3)
            assert [result.prompt_id for result in results] == ["a", "b", "c"]
            assert all(right(result, step, weights, prompter) for result in results)
        assert (backend.counters["ok"], backend.counters["dropped"]) == (6, 0)
        assert len(engine.applied) == 2


def test_weights_changed_within_a_step_are_not_taken_for_those_of_the_snapshot(model: Any, prompter: Prompter) -> None:
    """An average of weights, put in at the end of training, has the step of the last weights."""
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        ask(backend, 5)
        first = collect(backend)[0]
        backend.settle()
        weights = set_weights(model, 77)
        ask(backend, 5)
        second = collect(backend)[0]
        assert right(second, 5, weights, prompter)
        assert first.text != second.text


def test_the_answers_are_told_apart_by_the_names_of_their_prompts(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        for who in "ab":
            backend.submit([PreviewRequest((1, 2, 3), prompt_id=who, step=1)], SamplingParams(max_new_tokens=8), 1)
        done = collect(backend, 2)
        assert [result.prompt_id for result in backend.claim(done, {"b"})] == ["b"]
        assert [result.prompt_id for result in backend.claim([], {"a"})] == ["a"]
        assert backend.claim([], {"a", "b"}) == []


def test_the_last_preview_waits_for_room_and_the_end_is_bounded_all_the_same(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker:
        with bound(worker.address, prompter, model, flush_timeout=5.0) as backend:
            pid = backend._bound.companion.pid
            os.kill(pid, signal.SIGSTOP)
            ask(backend, 1)
            timer = threading.Timer(0.5, os.kill, (pid, signal.SIGCONT))
            timer.start()
            weights = set_weights(model, 2)
            backend.make_room()
            ask(backend, 2)
            assert [result.weights_step for result in backend.finish()] == [1, 2]
            assert backend.counters["dropped"] == 0
            assert content(model) == weights
            timer.join()
        with bound(worker.address, prompter, model, flush_timeout=0.4) as backend:
            os.kill(backend._bound.companion.pid, signal.SIGSTOP)
            ask(backend, 1)
            started = time.monotonic()
            for step in (2, 3):
                backend.make_room()
                ask(backend, step)
                backend.finish()
            assert time.monotonic() - started < 0.4 + 3.0


def test_the_worker_is_free_for_another_run_when_this_one_has_ended(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker:
        for run in ("one", "two"):
            backend = GrpcPreviewBackend(worker.address)
            backend.run_id = run
            backend.bind(prompter, model)
            weights = set_weights(model, 1)
            ask(backend, 1)
            assert right(collect(backend)[0], 1, weights, prompter)
            backend.close()


def test_the_worker_is_kept_while_there_is_nothing_to_push(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model), lease=0.8) as worker:
        with bound(worker.address, prompter, model) as backend:
            assert worker.host.loaded is not None
            lease = worker.host.loaded.lease
            ask(backend, 1)
            assert collect(backend)[0].success
            assert lease.remaining > 0
            assert not eventually(lambda: lease.remaining == 0, seconds=2.5)
        assert lease.remaining == 0


def test_a_preview_asked_for_by_hand_is_by_the_weights_as_they_are(
    model: Any, prompter: Prompter, tiny_model_dir: Path
) -> None:
    make = lambda: TransformersEngine(tiny_model_dir, torch.float32, torch.device("cpu"))  # noqa: E731
    with running_worker(make) as worker, bound(worker.address, prompter, model) as backend:
        for number in range(3):  # all of them with step 0
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
            local = LocalPreviewBackend()
            local.bind(prompter, model)
            expected = local.preview("hello", max_new_tokens=6, temperature=0.0).text
            assert backend.preview("hello", max_new_tokens=6, temperature=0.0).text == expected


def test_nothing_asked_is_nothing_done(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
        backend.submit([], SamplingParams(), 1)
        ask(backend, 1)
        assert collect(backend)[0].success
        assert backend.counters["triggered"] == 1


def test_a_slow_worker_answers_all_who_ask_in_turn(model: Any, prompter: Prompter) -> None:
    with (
        running_worker(fake_for(model, token_seconds=0.02)) as worker,
        bound(worker.address, prompter, model) as backend,
    ):
        answered = []
        for step in range(1, 25):
            set_weights(model, step)
            for who in "ab":
                backend.submit(
                    [PreviewRequest((1, 2), prompt_id=who, step=step)], SamplingParams(max_new_tokens=4), step
                )
            backend.settle()
            time.sleep(0.06)  # an answer takes 0.08
            answered += [result.prompt_id for result in backend.collect()]
        assert abs(answered.count("a") - answered.count("b")) <= 2
        assert len(answered) > 8
        assert sum("faster than it answers" in line for line in backend.notices()) == 1


def test_limits_are_asked_for_anew_before_a_preview_is_refused_for_them(
    model: Any, prompter: Prompter, tmp_path: Path
) -> None:
    path = str(tmp_path / "worker")
    with running_worker(fake_for(model), path=path, limits=Limits(max_new_tokens=4)) as first:
        backend = GrpcPreviewBackend(first.address)
        backend._deadlines = QUICK
        backend.bind(prompter, model)
        ask(backend, 1)
        assert "--max-new-tokens 8" in str(collect(backend)[0].error_message)
    with running_worker(fake_for(model), path=path):  # started again, as the message says
        weights = set_weights(model, 2)
        assert eventually(lambda: _answer(backend, 2).success, 5.0)
        assert right(_answer(backend, 2), 2, weights, prompter)
        backend.close()


def _answer(backend: GrpcPreviewBackend, step: int) -> Any:
    ask(backend, step)
    return collect(backend)[0]


def test_adapters_need_a_base_on_the_workers_disk(model: Any, prompter: Prompter, tiny_model_dir: Path) -> None:
    bare = fake_for(model, has_weights=False)
    with torch.random.fork_rng():
        adapter = put_in(model, LoraSettings(rank=2, target_modules=["q_proj"]), str(tiny_model_dir))
    with running_worker(bare) as worker, pytest.raises(InputError, match="has no weights, on which adapters could lie"):
        GrpcPreviewBackend(worker.address, preflight="require").bind(prompter, model, adapter)


def test_a_run_that_must_have_its_worker_waits_while_that_loads(model: Any, prompter: Prompter) -> None:
    bound_at: list[float] = []

    def bind(address: str) -> None:
        backend = GrpcPreviewBackend(address, preflight="require")

        def begin() -> None:
            backend.bind(prompter, model)
            bound_at.append(time.monotonic())
            backend.close()

        thread = threading.Thread(target=begin)
        thread.start()
        time.sleep(1.0)
        threads.append(thread)

    threads: list[threading.Thread] = []
    with running_worker(lambda: (time.sleep(1.5), fake_for(model))[1], while_loading=bind):
        ready = time.monotonic()
        threads[0].join(10)
        assert bound_at
        assert bound_at[0] > ready - 1.0
