"""A client that has the .proto and nothing else of ours: stubs made from it alone, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fake_engine import SMALL, FakeEngine, expected_tokens
from grpc_tools import protoc
from worker_thread import running_worker

from lightning_trainer.rpc.layout import content_digest

PROTO = Path(__file__).parents[2] / "lightning_trainer" / "rpc" / "preview.proto"

TOKEN = "t" * 32

CLIENT = """
import hashlib, json, sys
import grpc
import preview_pb2 as pb, preview_pb2_grpc as stubs
from grpc_health.v1 import health_pb2, health_pb2_grpc

address, token, layout = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
channel = grpc.insecure_channel(address)
options = {"timeout": 10, "metadata": (("authorization", "Bearer " + token),) if token else ()}
health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
assert health.status == health_pb2.HealthCheckResponse.SERVING
try:
    held = stubs.PreviewStub(channel).Describe(pb.DescribeRequest(), **options)
except grpc.RpcError as error:
    print(json.dumps(error.code().name))
    sys.exit()
values = [bytes([number + 1]) * size for number, (_, _, _, size) in enumerate(layout)]
digests = [hashlib.sha256(value).digest() for value in values]
content = hashlib.sha256(b"".join(digests)).digest()
target = pb.WeightsRef(run_id="r", global_step=7, publish_seq=1, content_sha256=content)
tensors = [
    pb.TensorEntry(name=name, dtype=dtype, shape=shape, nbytes=size, sha256=digest, encoding=1, encoded_nbytes=size)
    for (name, dtype, shape, size), digest in zip(layout, digests)
]
weights = stubs.WeightsStub(channel)
begun = weights.Begin(
    pb.BeginRequest(update_id="u", identity=held.identity, kind=1, target=target, tensors=tensors), **options
)
data = b"".join(values[number] for number in begun.needed)
chunk = pb.UploadChunk(update_id="u", fencing_token=begun.fencing_token, offset=0, data=data)
assert weights.Upload(iter([chunk]), **options).cursor == len(data)
done = weights.Commit(pb.CommitRequest(update_id="u", fencing_token=begun.fencing_token, target=target), **options)
assert done.resident == target
asked = pb.GenerateRequest(
    request_id="g",
    weights=pb.WeightsSelector(exact=target),
    prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1, 2]))],
    sampling=pb.Sampling(greedy=True),
    stopping=pb.Stopping(max_new_tokens=9),
)
answer = []
for event in stubs.PreviewStub(channel).Generate(asked, **options):
    answer += event.delta.token_ids
    last = event
assert last.finished.weights == target
print(json.dumps([answer, target.content_sha256.hex()]))
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "preview.proto").write_bytes(PROTO.read_bytes())
    known = str(files("grpc_tools") / "_proto")
    words = [f"-I{folder}", f"-I{known}", f"--python_out={folder}", f"--grpc_python_out={folder}", "preview.proto"]
    assert protoc.main(["protoc", *words]) == 0
    (folder / "client.py").write_text(CLIENT)
    return folder


def ask(stubs: Path, address: str, token: str) -> Any:
    layout = [[entry.name, entry.dtype, entry.shape, entry.nbytes] for entry in SMALL]
    words = [sys.executable, "-P", str(stubs / "client.py"), address, token, json.dumps(layout)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(stubs)}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_describes_pushes_and_generates(stubs: Path) -> None:
    with running_worker(FakeEngine(), token=TOKEN) as worker:
        answer, content = ask(stubs, worker.address, TOKEN)
        assert content == content_digest(worker.engine.digests()).hex()
        assert answer == expected_tokens(bytes.fromhex(content), 9)


def test_it_is_refused_without_a_token(stubs: Path) -> None:
    with running_worker(FakeEngine(), token=TOKEN) as worker:
        assert ask(stubs, worker.address, "") == "UNAUTHENTICATED"
