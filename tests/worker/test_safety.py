"""Bytes from the wire become values of tensors, and nothing else: no code, no paths, no lines in a log."""

import ast
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import SMALL, FakeEngine
from worker_thread import StockClient, refused, running_worker

import lightning_trainer
from lightning_trainer.rpc import preview_pb2 as pb

PACKAGE = Path(lightning_trainer.__file__).parent
WIRE = ("rpc", "worker", "preview")

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "code"}
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "jit"), ("importlib", "import_module")}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.alias) and node.name == "import_module":
            yield node.name
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from (".".join(pair) for pair in ATTRIBUTES if pair == (node.value.id, node.attr))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield node.arg


@pytest.mark.parametrize("package", WIRE)
def test_x5_no_module_near_the_wire_can_turn_bytes_into_code(package: str) -> None:
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files
    found = {str(path): list(faults(ast.parse(path.read_text("utf-8")))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_x5_the_test_would_find_them() -> None:
    lines = [
        "import pickle",
        "from importlib import import_module",
        "eval(a)",
        "torch.load(b)",
        "f(trust_remote_code=1)",
    ]
    assert [len(list(faults(ast.parse(line)))) for line in lines] == [1] * 5
    assert list(faults(ast.parse("model.eval()"))) == []


def test_worker_imports_downwards() -> None:
    allowed = {"types", "pretrained", "adapters", "logits_rules", "generation", "rpc", "signals", "worker"}
    for path in (PACKAGE / "worker").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = [name.split(".") for name in names]
            assert all(part[0] != "lightning" for part in parts), path
            ours = {part[1] for part in parts if part[0] == "lightning_trainer" and len(part) > 1}
            assert ours <= allowed, path


def filled(value: int) -> dict[str, bytes]:
    return {entry.name: bytes([value]) * entry.nbytes for entry in SMALL}


def test_x5_a_push_and_a_generation_unpickle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was unpickled")

    for module, name in [(pickle, "loads"), (pickle, "load"), (torch, "load")]:
        monkeypatch.setattr(module, name, never)
    with running_worker(FakeEngine()) as running, StockClient(running.address) as client:
        assert client.ask([[1]], 3, client.push(SMALL, filled(1), 1))


opened: list[str] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "subprocess.Popen"):
        opened.append(f"{event} {arguments[0]}")


def test_x8_no_string_of_the_wire_is_used_as_a_path() -> None:
    global opened
    sys.addaudithook(note)
    path = "../../canary/etc/passwd"
    with running_worker(FakeEngine()) as running, StockClient(running.address, run_id=path) as client:
        opened = []
        ref = client.push(SMALL, filled(1), 1)
        prompt = pb.Prompt(tokens=pb.TokenIds(ids=[1]), prompt_id=path, rules=[])
        assert client.ask([[1]], 3, ref, prompts=[prompt], request_id=path)
        message = client.begin_request(SMALL, filled(2), client.ref(filled(2), 2), path)
        message.tensors[0].name = path
        assert refused(lambda: client.begin(message))[1] == "MANIFEST_INVALID"
        found, opened = opened, None
    assert [line for line in found if "canary" in line] == []


def test_x10_neither_prompts_nor_tokens_nor_the_password_are_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    token, prompt = "canary-token-canary-token-canary-token", "canary-prompt"
    engine = FakeEngine()
    with running_worker(engine, token=token) as running:
        with StockClient(running.address, token=token, run_id="canary-run") as client:
            ref = client.push(SMALL, filled(1), 1)
            asked = {"prompts": [pb.Prompt(tokens=pb.TokenIds(ids=[311] * 3), prompt_id=prompt)]}
            client.ask([[1]], 3, ref, **asked)
            engine.raise_next = RuntimeError("canary-text: token 311")
            assert refused(lambda: client.ask([[1]], 3, ref, **asked))[0] == "INTERNAL"
            engine.fail_apply_after = 0
            assert refused(lambda: client.push(SMALL, filled(2), 2))[1] == "POISONED"
            assert refused(lambda: client.ask([[400]], 3))[0] == "INVALID_ARGUMENT"
        with StockClient(running.address, token="canary-wrong" * 4) as stranger:
            assert refused(stranger.describe)[0] == "UNAUTHENTICATED"
    written = caplog.text + "".join(capfd.readouterr())
    assert "Generate failed: RuntimeError" in written
    assert "canary" not in written
    assert "311" not in written
