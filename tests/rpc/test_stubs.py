"""The contract: stubs are what the pinned compiler makes of it, and it only ever grows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from lightning_trainer.rpc import preview_pb2, preview_pb2_grpc

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "preview_v1.binpb"
"""FileDescriptorProto of the last release: `python tests/rpc/test_stubs.py` writes it anew, with a release."""

STUBS = ("preview_pb2.py", "preview_pb2.pyi", "preview_pb2_grpc.py")


def test_the_stubs_are_what_the_pinned_compiler_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "gen_protos"), str(tmp_path)], check=True)
    for name in STUBS:
        made = (tmp_path / "lightning_trainer" / "rpc" / name).read_bytes()
        assert made == (ROOT / "lightning_trainer" / "rpc" / name).read_bytes(), f"{name}: run tools/gen_protos"


def test_what_is_required_is_not_below_what_generated_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    generated = preview_pb2_grpc.GRPC_GENERATED_VERSION
    assert f"grpcio>={generated}" in project["dependencies"]
    assert f"grpcio-tools=={generated}" in project["optional-dependencies"]["dev"]
    text = (ROOT / "lightning_trainer" / "rpc" / "preview_pb2.py").read_text()
    [major, minor, patch] = re.findall(r"^    (\d+),$", text, flags=re.MULTILINE)[:3]
    assert f"protobuf>={major}.{minor}.{patch},<{int(major) + 1}" in project["dependencies"]


def _present() -> descriptor_pb2.FileDescriptorProto:
    present = descriptor_pb2.FileDescriptorProto()
    preview_pb2.DESCRIPTOR.CopyToProto(present)
    return present


def _messages(messages: object, prefix: str = "") -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in messages:  # type: ignore[attr-defined]
        yield f"{prefix}{message.name}", message
        yield from _messages(message.nested_type, f"{prefix}{message.name}.")


def _facts(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[object, ...]]:
    """Everything an older peer relies on."""
    found: set[tuple[object, ...]] = {("package", file.package)}
    for name, message in _messages(file.message_type):
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            found.add((name, field.name, field.number, field.type, field.label, field.type_name, oneof))
        found |= {
            (name, "reserved", number) for span in message.reserved_range for number in range(span.start, span.end)
        }
        found |= {(name, kind.name, value.name, value.number) for kind in message.enum_type for value in kind.value}
    found |= {(kind.name, value.name, value.number) for kind in file.enum_type for value in kind.value}
    for service in file.service:
        for call in service.method:
            streams = (call.client_streaming, call.server_streaming)
            found.add((service.name, call.name, call.input_type, call.output_type, *streams))
    return found


def test_the_contract_only_grows() -> None:
    golden = descriptor_pb2.FileDescriptorProto.FromString(GOLDEN.read_bytes())
    assert _facts(golden) - _facts(_present()) == set()


@pytest.mark.parametrize("name", [name for name, _ in _messages(_present().message_type)])
def test_numbers_are_not_used_again(name: str) -> None:
    message = dict(_messages(_present().message_type))[name]
    reserved = {number for span in message.reserved_range for number in range(span.start, span.end)}
    assert reserved.isdisjoint(field.number for field in message.field)


def test_zero_of_every_enum_means_nothing() -> None:
    for kind in preview_pb2.DESCRIPTOR.enum_types_by_name.values():
        assert kind.values_by_number[0].name.endswith("_UNSPECIFIED")


if __name__ == "__main__":
    GOLDEN.write_bytes(_present().SerializeToString(deterministic=True))
