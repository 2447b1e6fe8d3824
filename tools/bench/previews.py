"""What remote previews cost the training thread, and how fast weights reach a worker on this machine.

python tools/bench/previews.py [--mib 128] [--rounds 15]

Three figures: the stall of a preview against a bare copy of the same bytes into the same memory; what a step without a
preview pays; and the push of all weights against the same bytes through a plain TCP connection. The worker is a process
of its own, started here; runs of a kind are interleaved with those they are compared with.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from lightning_trainer import GrpcPreviewBackend
from lightning_trainer.preview import Prompter
from lightning_trainer.preview.snapshot import Slot
from lightning_trainer.profiles import Plain
from lightning_trainer.rpc.layout import layout_of, model_tensors
from lightning_trainer.types import PreviewRequest, SamplingParams

HIDDEN, LAYERS = 256, 4


def make_model(folder: Path, mib: int) -> Any:
    """A model of about so many MiB in fp32, most of them in its embedding; saved in `folder`."""
    vocabulary = mib * (1 << 20) // 4 // HIDDEN
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def seconds(act: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def told(values: list[float], scale: float, unit: str) -> str:
    """Median and range."""
    return f"{scale * statistics.median(values):8.2f} {unit} ({scale * min(values):.2f} to {scale * max(values):.2f})"


def bench_stall(model: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a snapshot, and of one bare copy of as many bytes into the same memory."""
    tensors = model_tensors(model)
    slot = Slot(layout_of(tensors), torch.device("cpu"))
    source = torch.empty(slot.nbytes, dtype=torch.uint8).random_(0, 255)
    target: Any = slot._bytes
    snapshots, copies = [], []
    for _ in range(rounds):
        copies.append(seconds(lambda: target.copy_(source)))
        snapshots.append(seconds(lambda: slot.fill(tensors)))
    slot.close()
    return snapshots, copies


def bench_loopback(nbytes: int) -> float:
    """Seconds for so many bytes through TCP to another thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    data, buffer = bytes(1 << 20), bytearray(1 << 20)

    def drain() -> None:
        peer, _ = listener.accept()
        left = nbytes
        while left > 0:
            left -= peer.recv_into(buffer)
        peer.close()

    thread = threading.Thread(target=drain)
    thread.start()
    started = time.perf_counter()
    with socket.create_connection(listener.getsockname()) as connection:
        for _ in range(nbytes // len(data)):
            connection.sendall(data)
        connection.sendall(data[: nbytes % len(data)])
        thread.join()
    listener.close()
    return time.perf_counter() - started


def bench_pushes(model: Any, backend: GrpcPreviewBackend, nbytes: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a push of all weights, committed; and of the same bytes through TCP."""
    pushes, plain = [], []
    request = PreviewRequest((1, 2, 3))
    for step in range(1, rounds + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
        plain.append(bench_loopback(nbytes))
        backend.submit([request], SamplingParams(max_new_tokens=1, temperature=0.0), step)
        [result] = backend.finish()
        assert result.success, result.error_message
        pushes.append(backend.metrics()["push_seconds"])
    return pushes, plain


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        model = make_model(folder, given.mib)
        nbytes = sum(entry.nbytes for entry in layout_of(model_tensors(model)))
        snapshots, copies = bench_stall(model, given.rounds)
        words = [sys.executable, "-m", "lightning_trainer", "serve", "--pretrained", str(folder)]
        words += ["--listen", "127.0.0.1:0", "--dtype", "fp32", "--device", "cpu"]
        worker = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        address = worker.stdout.readline().split()[2]
        backend = GrpcPreviewBackend(address, preflight="require", flush_timeout=120.0)
        tokenizer: Any = PreTrainedTokenizerFast
        backend.bind(_Silent(Plain(), tokenizer), model)
        pushes, plain = bench_pushes(model, backend, nbytes, max(3, given.rounds // 3))
        idle = [seconds(backend.collect) for _ in range(10_000)]
        backend.close()
        worker.terminate()
        worker.wait()
    stall = statistics.median(snapshots) - 1.25 * statistics.median(copies)
    print(f"{nbytes / (1 << 20):.0f} MiB in {len(layout_of(model_tensors(model)))} tensors, torch {torch.__version__}")
    print(f"snapshot            {told(snapshots, 1e3, 'ms')}")
    print(f"bare copy           {told(copies, 1e3, 'ms')}")
    print(f"  above 1.25 copies {1e3 * stall:8.2f} ms (at most 5)")
    print(f"step, no preview    {told(idle, 1e3, 'ms')} (at most 0.2)")
    print(f"push, committed     {told([nbytes / 1e9 / s for s in pushes], 1, 'GB/s')}")
    print(f"plain TCP           {told([nbytes / 1e9 / s for s in plain], 1, 'GB/s')}")
    ratio = statistics.median(plain) / statistics.median(pushes)
    print(f"  push / TCP        {ratio:8.2f} (at least 0.12)")


class _Silent(Prompter):
    """Reads no answers: only times count."""

    def __init__(self, profile: Any, tokenizer: Any) -> None:
        self.profile, self.tokenizer, self.stop_token_ids = profile, tokenizer, ()

    def decode(self, token_ids: Any) -> str:
        return ""


if __name__ == "__main__":
    main()
