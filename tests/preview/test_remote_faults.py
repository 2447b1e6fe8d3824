"""Whatever happens to worker, network and dispatcher: training goes on, and no text stands under another's weights.

Numbers are those of the fault matrix.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import ChaosProxy, WorkerProcess, eventually
from remote_rig import QUICK, adds_up, ask, bound, collect, content, fake_for, right, set_weights
from worker_thread import running_worker

from lightning_trainer import pretrained
from lightning_trainer.preview import Prompter
from lightning_trainer.preview.dialogue import Deadlines
from lightning_trainer.preview.publication import publication_of
from lightning_trainer.preview.remote import GrpcPreviewBackend
from lightning_trainer.profiles.plain import Plain
from lightning_trainer.rpc.layout import identity_of
from lightning_trainer.rpc.limits import CHUNK_BYTES
from lightning_trainer.types import InputError
from lightning_trainer.worker.resident import Resident


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return pretrained.load_model(str(tiny_model_dir), torch.float32).train()


@pytest.fixture(scope="module")
def big_model(tiny_config: Any) -> Any:
    """6 MB, in tensors that are not alike."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(tiny_config(vocab_size=45000), dtype=torch.float32)


@pytest.fixture
def prompter(tokenizer: Any) -> Prompter:
    return Prompter(Plain(), tokenizer)


@pytest.fixture
def proxy() -> Iterator[ChaosProxy]:
    with ChaosProxy("127.0.0.1:1") as made:
        yield made


def closed_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def pid_of(backend: GrpcPreviewBackend) -> int:
    return backend._bound.companion.pid


# --- 14: nobody there at the start


def test_14_a_closed_port_does_not_keep_training_from_starting(model: Any, prompter: Prompter) -> None:
    address, started = closed_port(), time.monotonic()
    with bound(address, prompter, model, deadlines=Deadlines()) as backend:
        assert time.monotonic() - started < 3.0
        assert backend.state == "lost"
        [line] = backend.notices()
        assert line.startswith(f"preview worker {address}: ")
        assert "Connection refused" in line
        ask(backend, 1)
        assert "UNAVAILABLE" in str(collect(backend)[0].error_message)
        assert backend.counters["failed"] == 1


def test_14_a_black_hole_does_neither(model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    proxy.set("blackhole")
    started = time.monotonic()
    with bound(proxy.address, prompter, model, deadlines=Deadlines()) as backend:
        assert time.monotonic() - started < 3.0
        assert backend.state == "lost"


def test_14_require_ends_the_run_before_its_first_step(model: Any, prompter: Prompter) -> None:
    address = closed_port()
    backend = GrpcPreviewBackend(address, preflight="require")
    with pytest.raises(InputError, match=rf"worker at {address} cannot be used: .*refused") as caught:
        backend.bind(prompter, model)
    assert caught.value.key == "preview_backend.address"
    assert backend._exchange is None


def test_14_off_does_not_wait_and_the_worker_may_come_later(model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    proxy.set("refuse")
    started = time.monotonic()
    with bound(proxy.address, prompter, model, preflight="off") as backend:
        assert time.monotonic() - started < 0.3
        for step in (1, 2, 3):
            ask(backend, step)
            assert not collect(backend)[0].success
        assert backend.state == "paused"
        ask(backend, 4)
        assert str(backend.collect()[0].error_message).startswith("skipped: ")
        with running_worker(fake_for(model)) as worker:
            proxy.target = worker.address
            proxy.set("pass")
            assert eventually(lambda: backend.collect() == [] and backend.state == "connected", 6.0)
            weights = set_weights(model, 5)
            ask(backend, 5)
            assert right(collect(backend)[0], 5, weights, prompter)
        lost, paused, connected = backend.notices()
        assert lost.endswith("; training continues")
        assert paused.endswith("; previews are paused until it answers, training continues")
        assert connected.endswith(": connected")


def test_local_answers_while_the_worker_does_not(model: Any, prompter: Prompter) -> None:
    with bound(closed_port(), prompter, model, on_unavailable="local") as backend:
        assert backend.state == "lost"
        ask(backend, 4, prompts=2, tokens=3)
        results = backend.collect()
        assert [(r.success, r.backend_type, r.weights_step) for r in results] == [(True, "local", 4)] * 2
        assert model.training


# --- 15, 16, 48: the worker goes, another comes


def test_15_killed_while_it_generates(model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    first, second = fake_for(model, token_seconds=0.1), fake_for(model)
    with running_worker(first) as one, running_worker(second) as two:
        proxy.target = one.address
        with bound(proxy.address, prompter, model) as backend:
            set_weights(model, 1)
            ask(backend, 1)
            assert eventually(lambda: first.steps >= 3)
            cut = time.monotonic()
            proxy.set("reset")
            [result] = collect(backend)
            assert time.monotonic() - cut < 0.5
            assert not result.success
            assert "UNAVAILABLE" in str(result.error_message)
            proxy.target = two.address
            proxy.set("pass")
            weights = set_weights(model, 2)
            time.sleep(0.6)  # gRPC's own pause before it connects again
            ask(backend, 2)
            assert right(collect(backend)[0], 2, weights, prompter)
            assert len(second.applied[0]) == len(second.layout)
            assert backend.state == "connected"


def test_15_18_a_real_process_frozen_and_killed(model: Any, prompter: Prompter) -> None:
    setup = GrpcPreviewBackend("127.0.0.1:1")._setup_of(publication_of(model, None), [])
    with WorkerProcess(json.dumps(setup.to_json())) as worker, bound(worker.address, prompter, model) as backend:
        weights = set_weights(model, 1)
        ask(backend, 1)
        assert right(collect(backend)[0], 1, weights, prompter)
        worker.send(signal.SIGSTOP)
        frozen = time.monotonic()
        ask(backend, 2)
        slowest = 0.0
        results: list[Any] = []
        while not results and time.monotonic() - frozen < 6.0:
            started = time.perf_counter()
            results = backend.collect()
            backend.settle()
            slowest = max(slowest, time.perf_counter() - started)
            time.sleep(0.002)
        assert not results[0].success
        assert slowest < 0.1
        worker.send(signal.SIGCONT)
        weights = set_weights(model, 3)
        ask(backend, 3)
        assert right(collect(backend)[0], 3, weights, prompter)
        ask(backend, 4)
        backend.settle()
        time.sleep(0.15)
        worker.send(signal.SIGKILL)
        killed = time.monotonic()
        assert not collect(backend)[0].success
        assert time.monotonic() - killed < 1.0


def test_16_killed_while_weights_come_in(big_model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    first, second = fake_for(big_model), fake_for(big_model)
    with running_worker(first) as one, running_worker(second) as two:
        proxy.target, proxy.rate = one.address, 5e6
        with bound(proxy.address, prompter, big_model) as backend:
            proxy.set("throttle")
            weights = content(big_model)
            ask(backend, 1)
            assert eventually(lambda: proxy.to_worker > 2e6)
            proxy.target = two.address
            proxy.set("reset")
            proxy.set("pass")
            assert right(collect(backend)[0], 1, weights, prompter)
            assert first.applied == []
            assert len(second.applied) == 1


def test_48_another_model_on_the_same_port(model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    other = identity_of(model)
    other.config_sha256 = b"\7" * 32
    first, second = fake_for(model), fake_for(model)
    second._identity = other
    with running_worker(first) as one, running_worker(second) as two:
        proxy.target = one.address
        with bound(proxy.address, prompter, model) as backend:
            proxy.target = two.address
            proxy.set("reset")
            proxy.set("pass")
            ask(backend, 1)
            result = collect(backend)[0]
            if backend.state == "lost":  # the call that found the connection gone
                time.sleep(0.6)
                ask(backend, 2)
                result = collect(backend)[0]
            assert not result.success
            assert backend.state == "off"
            assert "config_sha256 differ" in backend.notices()[-1]
            assert second.applied == []


# --- 18, 19: slow and silent


def test_18_a_worker_that_falls_silent_is_given_up_and_taken_back(
    model: Any, prompter: Prompter, proxy: ChaosProxy
) -> None:
    engine = fake_for(model, token_seconds=0.05)
    with running_worker(engine) as worker:
        proxy.target = worker.address
        with bound(proxy.address, prompter, model) as backend:
            ask(backend, 1, tokens=40)
            assert eventually(lambda: engine.steps >= 3)
            proxy.set("blackhole")
            silent = time.monotonic()
            [result] = collect(backend)
            assert time.monotonic() - silent < 2.0
            assert "generation: nothing moved for 1 s" in str(result.error_message)
            proxy.set("pass")
            weights = set_weights(model, 2)
            ask(backend, 2)
            assert right(collect(backend)[0], 2, weights, prompter)


def test_19_a_slow_worker_fails_and_the_newest_preview_comes_next(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model, token_seconds=0.1)
    quick = Deadlines(**{**QUICK.__dict__, "generate": 0.5})
    with running_worker(engine) as worker, bound(worker.address, prompter, model, deadlines=quick) as backend:
        weights: dict[int, bytes] = {}
        for step in (1, 2, 3):
            weights[step] = set_weights(model, step)
            ask(backend, step)
            backend.settle()
            if step == 1:
                assert eventually(lambda: backend.collect() == [] and backend._bound.mailbox.room() is not None)
        engine.token_seconds = 0.0 if engine.steps else 0.1
        first, second = collect(backend, 2)
        assert (first.step, first.success) == (1, False)
        assert "DEADLINE_EXCEEDED" in str(first.error_message)
        assert second.step == 3
        assert backend.counters["dropped"] == 1
        assert adds_up(backend)


# --- 20, 21, 22: the network


def test_20_an_upload_goes_on_where_it_was_cut(
    big_model: Any, prompter: Prompter, proxy: ChaosProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fake_for(big_model)
    total = sum(entry.nbytes for entry in engine.layout)
    begun_at: list[int] = []
    taken: list[int] = []
    begin, chunk = Resident.begin, Resident.chunk

    def noting_begin(self: Resident, request: Any) -> Any:
        response = begin(self, request)
        begun_at.append(response.resume_offset)
        return response

    def noting_chunk(self: Resident, data: Any, stream: object) -> int:
        cursor = chunk(self, data, stream)
        taken.append(len(data.data))
        return cursor

    monkeypatch.setattr(Resident, "begin", noting_begin)
    monkeypatch.setattr(Resident, "chunk", noting_chunk)
    with running_worker(engine) as worker:
        proxy.target, proxy.rate = worker.address, 5e6
        with bound(proxy.address, prompter, big_model) as backend:
            proxy.set("throttle")
            weights = content(big_model)
            ask(backend, 1)
            assert eventually(lambda: proxy.to_worker > 3e6)
            proxy.set("blackhole")
            time.sleep(2.0)
            assert backend.collect() == []
            proxy.set("pass")
            assert right(collect(backend)[0], 1, weights, prompter)
    first, *later = begun_at
    assert first == 0
    assert later
    assert min(later) >= CHUNK_BYTES  # taken up again, not begun anew
    assert sum(taken) == total  # each byte once: what a system's buffers held of the cut upload is not taken twice


@pytest.mark.parametrize("mode", ["reset", "corrupt"])
def test_21_a_broken_connection_brings_no_wrong_weights(
    big_model: Any, prompter: Prompter, proxy: ChaosProxy, mode: Any
) -> None:
    engine = fake_for(big_model)
    before, weights = engine.content(), content(big_model)
    with running_worker(engine) as worker:
        proxy.target, proxy.rate = worker.address, 20e6
        with bound(proxy.address, prompter, big_model) as backend:
            proxy.set("throttle")
            already = proxy.to_worker
            ask(backend, 1)
            assert eventually(lambda: proxy.to_worker > already + 1e6)
            proxy.set(mode)
            if mode == "reset":
                time.sleep(0.2)
                proxy.set("pass")
            [result] = collect(backend, 1, 12.0)
            assert engine.content() in (before, weights)
            if result.success:
                assert right(result, 1, weights, prompter)
            else:
                assert engine.content() == before
            proxy.set("pass")
            time.sleep(0.6)
            ask(backend, 2)
            assert right(collect(backend)[0], 2, weights, prompter)


def test_22_a_slow_link_is_waited_for_and_then_spared(big_model: Any, prompter: Prompter, proxy: ChaosProxy) -> None:
    engine = fake_for(big_model)
    with running_worker(engine) as worker:
        proxy.target, proxy.rate = worker.address, 4e6
        with bound(proxy.address, prompter, big_model) as backend:
            proxy.set("throttle")
            weights = content(big_model)
            ask(backend, 1)
            assert right(collect(backend)[0], 1, weights, prompter)
            took = backend.metrics()["push_seconds"]
            assert took > 1.2
            assert backend._bound._not_before - time.monotonic() > 2.0 * took
            ask(backend, 2)
            assert collect(backend, 1, 0.3) == []  # the link is left to others for three times as long
            assert backend.counters["pending"] == 1
            assert right(backend.finish()[0], 2, weights, prompter)  # not at the end of the run


# --- 30: another model; another trainer


@pytest.mark.parametrize("field", ["vocab_size", "layout_sha256", "dtype", "config_sha256"])
def test_30_another_model_is_named_by_what_differs(model: Any, prompter: Prompter, field: str) -> None:
    engine = fake_for(model)
    setattr(engine._identity, field, 2 if field in ("vocab_size", "dtype") else b"\5" * 32)
    with running_worker(engine) as worker:
        with bound(worker.address, prompter, model) as backend:
            assert backend.state == "off"
            [line] = backend.notices()
            assert f"{field} differ" in line
            ask(backend, 1)
            assert f"{field} differ" in str(backend.collect()[0].error_message)
            assert backend.counters["skipped"] == 1
        with pytest.raises(InputError, match=f"{field} differ"):
            GrpcPreviewBackend(worker.address, preflight="require").bind(prompter, model)


def test_24_another_trainer_holds_the_worker(model: Any, prompter: Prompter) -> None:
    with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as first:
        ask(first, 1)
        assert collect(first)[0].success
        with bound(worker.address, prompter, model) as second:
            second.close()
            second.run_id = "another"
            second.bind(prompter, model)
            assert "another run holds the worker" in second.notices()[-1]
            assert second.state == "lost"
            ask(second, 1)
            assert "another run holds the worker" in str(collect(second)[0].error_message)
            second.preflight = "require"
            with pytest.raises(InputError, match="another run holds the worker"):
                second.bind(prompter, model)


def test_42_a_proxy_of_the_environment_is_not_asked(
    model: Any, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as canary:
        canary.bind(("127.0.0.1", 0))
        canary.listen()
        canary.setblocking(False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{canary.getsockname()[1]}")
        with running_worker(fake_for(model)) as worker, bound(worker.address, prompter, model) as backend:
            ask(backend, 1)
            assert collect(backend)[0].success
        with pytest.raises(BlockingIOError):
            canary.accept()


# --- 45: the dispatcher; I2: the end


def test_45_a_killed_dispatcher_is_started_again_three_times(model: Any, prompter: Prompter) -> None:
    engine = fake_for(model, token_seconds=0.05)
    with running_worker(engine) as worker, bound(worker.address, prompter, model) as backend:
        for round_ in (1, 2, 3):
            ask(backend, 10 * round_)
            made = engine.steps
            assert eventually(lambda made=made: engine.steps > made)  # type: ignore[misc]
            os.kill(pid_of(backend), signal.SIGKILL)
            [result] = collect(backend)
            assert result.error_message == "the preview dispatcher ended (signal 9)"
            weights = set_weights(model, round_)
            ask(backend, 10 * round_ + 1)
            assert right(collect(backend)[0], 10 * round_ + 1, weights, prompter)
        os.kill(pid_of(backend), signal.SIGKILL)
        assert eventually(lambda: backend.collect() == [] and backend.state == "off")
        ask(backend, 50)
        assert "ended (signal 9) 4 times" in str(backend.collect()[0].error_message)
        assert sum("NO PREVIEWS" in line for line in backend.notices()) == 1
        assert adds_up(backend)


@pytest.mark.parametrize("mode", ["blackhole", "refuse"])
@pytest.mark.parametrize("when", ["upload", "generation"])
def test_i2_the_end_of_the_run_is_bounded(
    big_model: Any, prompter: Prompter, proxy: ChaosProxy, mode: Any, when: str
) -> None:
    engine = fake_for(big_model, token_seconds=0.1)
    with running_worker(engine) as worker:
        proxy.target, proxy.rate = worker.address, 3e6
        with bound(proxy.address, prompter, big_model, flush_timeout=0.5, deadlines=Deadlines()) as backend:
            before = proxy.to_worker
            if when == "upload":
                proxy.set("throttle")
            ask(backend, 1, tokens=40)
            reached = (lambda: proxy.to_worker > before + 1e6) if when == "upload" else (lambda: engine.steps > 2)
            assert eventually(reached)
            proxy.set(mode)
            pid, started = pid_of(backend), time.monotonic()
            assert [result.success for result in backend.finish()] == [False]
            backend.close()
            assert time.monotonic() - started < 0.5 + 3.0
            assert not Path(f"/proc/{pid}").exists()
            proxy.set("pass")
