"""`lightning-trainer serve` as a user runs it: who may listen where, ports, signals, kills."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import SMALL, FakeEngine, expected_tokens
from worker_thread import StockClient, refused, running_worker

from lightning_trainer.cli import main
from lightning_trainer.types import InputError


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef" * 2)
    path.chmod(0o600)
    return path


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `serve` says when it refuses; --pretrained names nothing, so nothing is ever listened on."""
    assert main(["serve", "--pretrained", "/nowhere", *words]) == 2
    return capsys.readouterr().err


NO_MODEL = "holds no config.json"
EXPOSED = "can be reached from other machines"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("0.0.0.0:0", EXPOSED),
        ("[::]:0", EXPOSED),
        ("192.168.1.5:8765", EXPOSED),
        ("worker.lan:8765", EXPOSED),
        ("localhost.evil.example:1", EXPOSED),
        ("localhost:0", NO_MODEL),
        ("127.0.0.1:0", NO_MODEL),
        ("127.9.9.9:0", NO_MODEL),
        ("[::1]:0", NO_MODEL),
        ("unix:/tmp/worker", NO_MODEL),
        ("127.0.0.1", "expected HOST:PORT"),
        ("127.0.0.1:70000", "there is no port 70000"),
    ],
)
def test_beyond_this_machine_nothing_is_listened_on(
    capsys: pytest.CaptureFixture[str], address: str, says: str
) -> None:
    assert says in complaint(capsys, "--listen", address)


def test_tls_and_token_or_an_explicit_word_open_it(capsys: pytest.CaptureFixture[str], token_file: Path) -> None:
    lan, tls = ["--listen", "0.0.0.0:0"], ["--tls-cert", "c.pem", "--tls-key", "k.pem"]
    token = ["--token-file", str(token_file)]
    assert "has not a token" in complaint(capsys, *lan, *tls)
    assert "has not TLS" in complaint(capsys, *lan, *token)
    assert "in the clear" in complaint(capsys, *lan, *token, "--insecure-lan")
    assert "go together" in complaint(capsys, *lan, *tls[:2])
    assert NO_MODEL in complaint(capsys, *lan, *tls, *token)
    assert NO_MODEL in complaint(capsys, *lan, "--insecure-lan")
    token_file.chmod(0o644)
    assert "others may read" in complaint(capsys, *token)


FAKE = """
import asyncio, sys
from fake_engine import FakeEngine
from lightning_trainer.rpc.security import parse_address
from lightning_trainer.worker.server import Serving, serve
ready = lambda target: print("listening on", target, flush=True)
asyncio.run(serve(Serving(parse_address("127.0.0.1:0")), lambda: FakeEngine(token_seconds=0.02), ready))
"""


@contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker in a process of its own, and its address."""
    helpers = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[2])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:1", "PYTHONPATH": helpers}
    worker = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        assert line.startswith("listening on "), line
        yield worker, line.split()[2]
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def listening(port: int) -> list[str]:
    """Addresses of sockets that listen on `port`, as /proc has them; gRPC binds IPv4 through IPv6."""
    tables = (Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [host for host, place in places if int(place, 16) == port]


def test_35_a_worker_listens_where_it_is_told_to_and_ends_when_it_is_told_to(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", "--pretrained", str(tiny_model_dir), "--device", "cpu", "--threads", "1", "--listen"]
    with process("-m", "lightning_trainer", *serve, "127.0.0.1:0") as (worker, address):
        port = int(address.split(":")[1])
        assert listening(port) in (["0100007F"], ["0000000000000000FFFF00000100007F"])
        assert main([*serve, address]) == 2
        assert "address in use" in capsys.readouterr().err
        with StockClient(address) as client:
            assert not client.describe().HasField("resident")
            call = client.preview.Generate(client.request([[5]], 100), timeout=30)
            assert [next(call).WhichOneof("event") for _ in range(2)] == ["queued", "started"]
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
            assert list(call)[-1].finished.total_generated_tokens == 100


def test_a_second_signal_ends_a_worker_at_once() -> None:
    with process("-c", FAKE) as (worker, address), StockClient(address) as client:
        call = client.preview.Generate(client.request([[5]], 1000), timeout=30)
        assert [next(call).WhichOneof("event") for _ in range(2)] == ["queued", "started"]
        worker.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.3)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(1) == 128 + signal.SIGTERM
        assert refused(lambda: list(call))[0] == "UNAVAILABLE"


LOST = FAKE.replace("FakeEngine(token_seconds=0.02)", "engine").replace(
    "ready =", "engine = FakeEngine(); engine.raise_next, engine.alive = RuntimeError('CUDA error'), False\nready ="
)


def test_a_process_whose_device_has_failed_ends_with_1_so_that_another_may_start() -> None:
    with process("-c", LOST) as (worker, address):
        with StockClient(address) as client:
            assert refused(lambda: client.ask([[1]], 3))[0] == "INTERNAL"
        assert worker.wait(10) == 1


def test_16_what_a_killed_worker_was_sent_is_gone_and_sent_again() -> None:
    tensors = {entry.name: bytes([1]) * entry.nbytes for entry in SMALL}
    with process("-c", FAKE) as (worker, address), StockClient(address) as client:
        was = client.describe()
        target = client.ref(tensors, 1)
        client.begin(client.begin_request(SMALL, tensors, target, "u"))
        client.upload("u", tensors["a"] + tensors["b"])
        worker.kill()
        assert refused(lambda: client.commit("u", target))[0] == "UNAVAILABLE"
        worker.wait()
        with running_worker(FakeEngine(), port=int(address.split(":")[1])):
            now = StockClient(address)
            assert now.describe().worker_instance_id != was.worker_instance_id
            assert not now.describe().HasField("resident")
            now.fencing_token = client.fencing_token
            assert refused(lambda: now.commit("u", target)) == ("ABORTED", "FENCED")
            ref = now.push(SMALL, tensors, 1)
            assert now.ask([[1]], 5, ref) == [expected_tokens(ref.content_sha256, 5)]
            now.channel.close()


def test_35_a_port_or_a_socket_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with running_worker(FakeEngine()) as running:
        port = int(running.address.split(":")[1])
        with pytest.raises(InputError, match="address in use"), running_worker(FakeEngine(), port=port):
            pass
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "s"))
        taken.listen()
        with pytest.raises(InputError, match="address in use"), running_worker(FakeEngine(), path=str(tmp_path / "s")):
            pass
    with running_worker(FakeEngine(), path=str(tmp_path / "t")) as running, StockClient(running.address) as client:
        assert client.ask([[1]], 3)


def test_a_model_that_cannot_be_loaded_ends_the_worker_with_2(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny_model_dir / "model.safetensors").read_bytes()[:-1])
    assert main(["serve", "--pretrained", str(tmp_path), "--listen", "127.0.0.1:0", "--device", "cpu"]) == 2
    assert "no weights could be loaded" in capsys.readouterr().err
