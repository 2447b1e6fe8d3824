"""Nobody gets past the gate without the token, whatever they call and however they show it."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import SMALL, FakeEngine
from grpc_health.v1 import health_pb2
from worker_thread import RunningWorker, StockClient, refused, running_worker

from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc import preview_pb2_grpc as stubs
from lightning_trainer.rpc.channel import bearer, open_channel
from lightning_trainer.rpc.security import parse_address
from lightning_trainer.types import InputError

TOKEN = "0123456789abcdef0123456789abcdef"

METADATA: dict[str, tuple[tuple[str, str], ...]] = {
    "missing": (),
    "empty": (("authorization", ""),),
    "no scheme": (("authorization", TOKEN),),
    "another scheme": (("authorization", f"Basic {TOKEN}"),),
    "wrong": (("authorization", f"Bearer {TOKEN[:-1]}0"),),
    "a prefix": (("authorization", f"Bearer {TOKEN[:-1]}"),),
    "longer": (("authorization", f"Bearer {TOKEN}0"),),
    "two kilobytes": (("authorization", "Bearer " + "x" * 2048),),
    "twice": (("authorization", f"Bearer {TOKEN}"),) * 2,
    "under another name": (("x-authorization", f"Bearer {TOKEN}"),),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[RunningWorker]:
    with running_worker(FakeEngine(), token=TOKEN) as running:
        yield running


def raw(kind: str, method: str) -> Any:
    """Call any method with bytes: as what kind it is called, its bodies never matter."""

    def call(channel: grpc.Channel, metadata: Any) -> Any:
        stub = getattr(channel, kind)(method)
        body = iter([b"x"] * 3) if kind.startswith("stream") else b"x"
        answer = stub(body, timeout=5, metadata=metadata)
        return list(answer) if kind.endswith("stream") else answer

    return call


V1 = "/lightning_trainer.preview.v1"
CALLS = {
    "unary": raw("unary_unary", f"{V1}.Preview/Describe"),
    "server stream": raw("unary_stream", f"{V1}.Preview/Generate"),
    "client stream": raw("stream_unary", f"{V1}.Weights/Upload"),
    "both": raw("stream_stream", f"{V1}.Weights/Nothing"),
    "commit": raw("unary_unary", f"{V1}.Weights/Commit"),
    "health watch": raw("unary_stream", "/grpc.health.v1.Health/Watch"),
}


@pytest.mark.parametrize("shown", METADATA)
def test_27_calls_of_every_kind_need_the_token(worker: RunningWorker, shown: str) -> None:
    with grpc.insecure_channel(worker.address) as channel:
        for name, call in CALLS.items():
            code = refused(lambda call=call: call(channel, METADATA[shown]))[0]
            assert (name, code) == (name, "UNAUTHENTICATED")


def test_with_the_token_everything_works(worker: RunningWorker) -> None:
    with StockClient(worker.address, token=TOKEN) as client:
        ref = client.push(SMALL, {entry.name: bytes(entry.nbytes) for entry in SMALL}, 1)
        assert client.ask([[1]], 3, ref)
        assert client.serving("lightning_trainer.preview.v1.Preview")


def test_without_it_health_says_only_that_the_process_is_up(worker: RunningWorker) -> None:
    with StockClient(worker.address) as client:
        assert client.serving("")
        check = health_pb2.HealthCheckRequest(service="lightning_trainer.preview.v1.Preview")
        assert refused(lambda: client.health.Check(check, timeout=5))[0] == "UNAUTHENTICATED"


def test_an_upload_of_200_mebibytes_without_it_is_refused_at_once(worker: RunningWorker) -> None:
    sent = 0

    def endless() -> Iterator[pb.UploadChunk]:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield pb.UploadChunk(data=bytes(1 << 20))

    with StockClient(worker.address) as client:
        began = time.monotonic()
        assert refused(lambda: client.weights.Upload(endless(), timeout=10))[0] == "UNAUTHENTICATED"
        assert time.monotonic() - began < 2
        assert sent < 100


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own CA, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    pair = folder / "cert.pem", folder / "key.pem"
    words = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    about = ["-subj", "/CN=worker", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(pair[0]), "-keyout", str(pair[1])]
    subprocess.run([openssl, "req", *words, *about, *files], check=True, capture_output=True)
    return pair


def test_28_tls_is_never_left_out(certificate: tuple[Path, Path]) -> None:
    with running_worker(FakeEngine(), tls=certificate, token=TOKEN) as running:
        address = parse_address(running.address)
        with open_channel(address, certificate[0]) as channel:
            stub = stubs.PreviewStub(channel)
            assert stub.Describe(pb.DescribeRequest(), timeout=5, metadata=bearer(TOKEN)).engine == "fake"
            assert refused(lambda: stub.Describe(pb.DescribeRequest(), timeout=5))[0] == "UNAUTHENTICATED"
        with open_channel(address, None) as channel:
            stub = stubs.PreviewStub(channel)
            assert refused(lambda: stub.Describe(pb.DescribeRequest(), timeout=5))[0] == "UNAVAILABLE"


def test_a_key_that_is_none_is_said_so(certificate: tuple[Path, Path]) -> None:
    wrong = (certificate[0], certificate[0])
    with pytest.raises(InputError, match="belong together"), running_worker(FakeEngine(), tls=wrong):
        pass
    with (
        pytest.raises(InputError, match="cannot be read"),
        running_worker(FakeEngine(), tls=(Path("/no"), Path("/no"))),
    ):
        pass
