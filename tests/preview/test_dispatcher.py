"""The dispatcher as a process: light, never without a deadline, and gone with its trainer."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import eventually

from lightning_trainer import preview
from lightning_trainer.preview import companion
from lightning_trainer.preview.companion import Companion
from lightning_trainer.preview.dialogue import Deadlines, Lines, Setup
from lightning_trainer.rpc import preview_pb2 as pb
from lightning_trainer.rpc.layout import Entry
from lightning_trainer.worker import lease

FOLDER = Path(preview.__file__).parent

CALLS = {"Describe", "Generate", "GetStatus", "Begin", "Upload", "Commit", "Abort", "Renew", "Release"}


def setup(slots: tuple[int, ...] = (), address: str = "127.0.0.1:1") -> Setup:
    return Setup(
        address=address,
        ca=None,
        token="t" * 32,
        run_id="run",
        kind=int(pb.UPDATE_KIND_MODEL),
        identity=pb.ModelIdentity(architecture="A").SerializeToString(),
        adapter=b"",
        layout=(Entry("w", pb.DTYPE_F32, (2, 3)),),
        slots=slots,
        deadlines=Deadlines(begin=4.0),
    )


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_every_call_of_a_worker_has_a_deadline() -> None:
    found = []
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            target = node.func.value if node.func.attr == "future" else node.func
            if isinstance(target, ast.Attribute) and target.attr in CALLS:
                found.append(target.attr)
                assert "timeout" in {word.arg for word in node.keywords}, f"{path.name}:{node.lineno}"
    assert sorted(found) == ["Begin", "Commit", "Describe", "Generate", "GetStatus", "Release", "Renew", "Upload"]


def test_only_the_dispatchers_modules_import_grpc() -> None:
    importing = {
        path.stem
        for path in FOLDER.glob("*.py")
        if any(f"\n{line}" in path.read_text() for line in ("import grpc", "from lightning_trainer.rpc.channel"))
    }
    assert importing <= {"calls", "dispatcher"}


def test_it_starts_fast_and_without_torch() -> None:
    code = companion._START.replace(
        "main()\n",
        "import time\nnames = 'torch transformers lightning numpy peft'.split()\n"
        "print(time.process_time(), [n for n in names if n in sys.modules])\n",
    )
    words = [sys.executable, "-P", "-c", code, str(companion.ROOT), "0"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    seconds, modules = told.split(" ", 1)
    assert modules.strip() == "[]"
    assert float(seconds) < 1.0


def test_a_setup_survives_the_wire() -> None:
    whole = setup((3, 4))
    assert Setup.from_json(whole.to_json()) == whole
    assert "t" * 32 not in repr(whole)


def test_sending_never_waits_for_a_reader() -> None:
    import socket

    ours, theirs = socket.socketpair()
    a, b = Lines(ours), Lines(theirs)
    started = time.perf_counter()
    for number in range(50):
        a.send({"number": number, "much": "x" * 100_000})
    assert time.perf_counter() - started < 1.0
    got: list[int] = []
    while len(got) < 50:
        got += [message["number"] for message in b.receive(0.1)]
        a.flush()
    assert got == list(range(50))
    a.close()
    with pytest.raises(EOFError):
        b.receive(1.0)
    b.close()


def test_signals_of_the_group_do_not_reach_it_and_quit_does() -> None:
    running = Companion(setup())
    try:
        assert eventually(lambda: bool(running.receive(0.1)) or running.state == "lost")
        assert os.getpgid(running.pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(running.pid, number)
        time.sleep(0.3)
        assert running.receive() == []
        assert not gone(running.pid)
        pid, started = running.pid, time.monotonic()
    finally:
        running.stop()
    assert time.monotonic() - started < 0.5
    assert gone(pid)


def test_a_frozen_one_is_killed_in_bounded_time() -> None:
    running = Companion(setup())
    pid = running.pid
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    running.stop()
    assert time.monotonic() - started < 2.0
    assert gone(pid)


TRAINER = """
import sys, time, os
import torch
from lightning_trainer.preview.remote import GrpcPreviewBackend
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
backend = GrpcPreviewBackend("127.0.0.1:1")
backend.bind(None, model)
from torch.utils.data import DataLoader
batches = list(DataLoader(list(range(8)), num_workers=2, multiprocessing_context="fork"))
print(len(batches), backend.state, "grpc" in sys.modules, backend._bound.companion.pid, flush=True)
time.sleep(60)
"""


def test_the_trainer_never_imports_grpc_and_kill_9_leaves_no_orphan(tiny_model_dir: Path) -> None:
    words = [sys.executable, "-W", "error::RuntimeWarning", "-c", TRAINER, str(tiny_model_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stderr is not None
        told = trainer.stdout.readline().split()
        assert told, trainer.stderr.read()
        assert told[:3] == ["8", "lost", "False"]
        pid = int(told[3])
        assert not gone(pid)
        trainer.kill()
        assert eventually(lambda: gone(pid), 2.0)
        assert "fork" not in trainer.stderr.read()


def test_times_that_belong_together_do() -> None:
    """A lease is renewed well before it ends, and given up within the time that the dispatcher has to end."""
    assert 2 * Deadlines().idle + Deadlines().renew < lease.SECONDS
    assert Deadlines().release < companion.QUIT_SECONDS
