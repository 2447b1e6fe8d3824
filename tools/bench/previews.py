"""What remote previews cost the training thread, and how fast weights reach a worker on this machine.

A push is all that the dispatcher does: digests, upload, commit. It is compared with as many bytes through a plain TCP
connection, run in turn with it.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Row, interleaved
from preview_rig import FakeWorker, bound, nudge, one_preview, save_model, seconds, served, stand_for
from worker_thread import StockClient

from lightning_trainer import GrpcPreviewBackend
from lightning_trainer.adapters import LoraSettings
from lightning_trainer.preview.calls import connect
from lightning_trainer.preview.publication import publication_of
from lightning_trainer.preview.pusher import Pusher
from lightning_trainer.preview.snapshot import Slot
from lightning_trainer.rpc.layout import layout_of, model_tensors, raw_bytes

ROOT = Path(__file__).parents[2]
HIDDEN = 256

RAW_TIMES = 4
"""The bytes of a push go through raw TCP so often: it is faster, and what else the machine does averages out."""

# Inputs and outputs of a layer's linear maps in Qwen3-0.6B, and its layers.
WIDE, QUERIES, KEYS, INNER, LAYERS = 1024, 2048, 1024, 3072, 28
LINEAR = {
    "self_attn.q_proj": (WIDE, QUERIES),
    "self_attn.k_proj": (WIDE, KEYS),
    "self_attn.v_proj": (WIDE, KEYS),
    "self_attn.o_proj": (QUERIES, WIDE),
    "mlp.gate_proj": (WIDE, INNER),
    "mlp.up_proj": (WIDE, INNER),
    "mlp.down_proj": (INNER, WIDE),
}


def run(quick: bool) -> list[Row]:
    """The table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_large(folder / "large", 128)
        rounds = 3 if quick else 7
        tiny = save_model(folder / "tiny")
        return [
            stall(model, 7 if quick else 25),
            idle_step(tiny),
            *pushes(folder, model, rounds),
            adapters(tiny, rounds),
            commit(folder / "tiny", tiny, 10 if quick else 50),
        ]


def save_large(folder: Path, mib: int) -> Any:
    """A model of about so many MiB, most of them in its embedding."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    return save_model(folder, vocab_size=(mib << 20) // 4 // HIDDEN, **shape)


def stall(model: Any, rounds: int) -> Row:
    """How much longer a snapshot takes than a bare copy of as many bytes into the same memory."""
    tensors = model_tensors(model)
    slot = Slot(layout_of(tensors), torch.device("cpu"))
    source = torch.empty(slot.nbytes, dtype=torch.uint8).random_(0, 255)
    target: Any = slot._bytes
    arms = {"copy": lambda: target.copy_(source), "snapshot": lambda: slot.fill(tensors)}
    found = interleaved(arms, rounds, clock=time.perf_counter)
    slot.close()
    over = tuple(1000 * (s - 1.25 * c) for s, c in zip(found["snapshot"], found["copy"], strict=True))
    note = f"{source.nbytes >> 20} MiB; a copy takes {1000 * sorted(found['copy'])[rounds // 2]:.0f} ms"
    return Row("stall of a snapshot above 1.25 bare copies", over, "ms", at_most=5.0, note=note)


def pushes(folder: Path, model: Any, rounds: int) -> list[Row]:
    """All weights to `serve`, in the clear and over TLS."""
    certs = folder / "certs"
    subprocess.run([ROOT / "tools" / "make_certs", certs, "127.0.0.1"], check=True, stdout=subprocess.DEVNULL)
    token, flags = certs / "token", ["--dtype", "fp32"]
    tls = [*flags, "--tls-cert", f"{certs}/worker.pem", "--tls-key", f"{certs}/worker.key", "--token-file", f"{token}"]
    with (
        served(folder / "large", *flags) as (open_address, _),
        served(folder / "large", *tls) as (tls_address, _),
    ):
        in_clear = pusher_to(model, GrpcPreviewBackend(open_address))
        over_tls = pusher_to(model, GrpcPreviewBackend(tls_address, ca=certs / "ca.pem", token_file=token))
        clear, secret = [], []
        for step in range(1, rounds + 1):
            clear.append(of_raw(in_clear, model, step))
            secret.append(of_raw(over_tls, model, step))
    (push, upload), (tls_push, tls_upload) = zip(*clear, strict=True), zip(*secret, strict=True)
    return [
        Row("push of all weights / raw TCP", push, note="digests, upload and commit"),
        Row("  its upload alone / raw TCP", upload, at_least=0.12, note="the worker's digests included"),
        Row("push over TLS, with a token / raw TCP", tls_push),
        Row("  its upload alone / raw TCP", tls_upload, at_least=0.10),
    ]


class TimedPusher(Pusher):
    """As the dispatcher's.

    Attributes:
        upload_seconds: Of the newest push.
    """

    upload_seconds = 0.0

    def _upload(self, *words: Any) -> None:
        self.upload_seconds = seconds(lambda: super(TimedPusher, self)._upload(*words))


def pusher_to(model: Any, backend: GrpcPreviewBackend) -> TimedPusher:
    """In this process, which does nothing else meanwhile."""
    setup = backend._setup_of(publication_of(model, None), [])
    return TimedPusher(connect(setup), setup)


def of_raw(pusher: TimedPusher, model: Any, step: int) -> tuple[float, float]:
    """Speed of a push of all weights, and of its upload, of that of raw TCP just before it."""
    nudge(model)
    view = memoryview(b"".join(raw_bytes(tensor) for tensor in model_tensors(model).values()))
    raw = loopback(RAW_TIMES * len(view)) / RAW_TIMES
    pushed = pusher.push(view, step, step)
    return raw / pushed.seconds, raw / pusher.upload_seconds


def loopback(nbytes: int) -> float:
    """Seconds for so many bytes through TCP to another thread."""
    data, buffer = bytes(1 << 20), bytearray(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drain() -> None:
            peer, _ = listener.accept()
            left = nbytes
            with peer:
                while left > 0:
                    left -= peer.recv_into(buffer)

        thread = threading.Thread(target=drain)
        thread.start()
        started = time.perf_counter()
        with socket.create_connection(listener.getsockname()) as connection:
            for start in range(0, nbytes, len(data)):
                connection.sendall(data[: nbytes - start])
            thread.join()
        return time.perf_counter() - started


def idle_step(tiny: Any) -> Row:
    """What the callback asks of the backend at a step without a preview, as its hooks do."""
    with FakeWorker(stand_for(tiny)) as worker, bound(worker.address, tiny) as backend:

        def steps() -> None:
            for _ in range(500):
                backend.claim(backend.collect(), ())
                backend.notices()

        each = [1000 * seconds(steps) / 500 for _ in range(20)]
    return Row("a step without a preview", tuple(each), "ms", at_most=0.2)


class _Adapters:
    """LoRA of rank 16 on every linear map of the 0.6B model, in bf16, without the model."""

    settings = LoraSettings(rank=16)

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for layer in range(LAYERS):
            for name, (inputs, outputs) in LINEAR.items():
                for part, shape in (("A", (16, inputs)), ("B", (outputs, 16))):
                    key = f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
                    self._tensors[key] = torch.randn(shape, dtype=torch.bfloat16)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As an Adapter's."""
        return self._tensors

    def train(self) -> None:
        """Change every weight."""
        for tensor in self._tensors.values():
            tensor.add_(0.125)


def adapters(tiny: Any, rounds: int) -> Row:
    """From `submit` to an answer by them: the fake engine takes no time for one token."""
    ours, found = _Adapters(), []
    with FakeWorker(stand_for(tiny, ours)) as worker, bound(worker.address, tiny, ours) as backend:
        for step in range(1, rounds + 2):
            ours.train()
            found.append(seconds(partial(one_preview, backend, step)))
        sent = backend.metrics()["push_mb"]
    note = f"{sent:.1f} MB in {len(ours.tensors())} tensors; snapshot, push, commit and an answer of one token"
    return Row("adapters of a 0.6B model, end to end", tuple(found[1:]), "s", at_most=1.0, note=note)


def commit(folder: Path, tiny: Any, rounds: int) -> Row:
    """What the worker says of verifying an update of the whole tiny model and writing it."""
    layout, found = layout_of(model_tensors(tiny)), []
    with served(folder, "--dtype", "fp32") as (address, _), StockClient(address) as client:
        for seq in range(1, rounds + 1):
            nudge(tiny)
            tensors = {name: bytes(raw_bytes(tensor)) for name, tensor in model_tensors(tiny).items()}
            target, update = client.ref(tensors, seq), str(seq)
            needed = client.begin(client.begin_request(layout, tensors, target, update)).needed
            client.upload(update, b"".join(tensors[layout[number].name] for number in needed))
            done = client.commit(update, target)
            found.append((done.verify_micros + done.apply_micros) / 1000)
    note = f"{len(layout)} tensors; verify + apply"
    return Row("commit of a tiny model", tuple(found), "ms", at_most=50.0, note=note)
