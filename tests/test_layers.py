"""Imports point downwards; some packages never see Lightning."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_trainer"

LEVELS = [
    {"types"},
    {
        "template",
        "pretrained",
        "adapters",
        "logits_rules",
        "profiles",
        "precision",
        "checkpoints",
        "status",
        "signals",
    },
    {"generation", "lock", "rpc"},
    {"data", "model", "preview", "worker"},
    {"callbacks"},
    {"engine", "diagnose"},
    {"commands"},
    {"cli"},
    {"__main__"},
]

WITHOUT_LIGHTNING = {
    "types",
    "template",
    "pretrained",
    "adapters",
    "logits_rules",
    "generation",
    "profiles",
    "preview",
    "rpc",
    "worker",
    "checkpoints",
    "status",
    "signals",
    "lock",
}

LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = _part(path)
    for name in _imports(path):
        words = name.split(".")
        if words[0] == "lightning_trainer" and len(words) > 1 and words[1] in LEVEL_OF and words[1] != part:
            below = LEVEL_OF[words[1]] < LEVEL_OF[part]
            # Single files of the second level may lean on each other's plain functions; packages may not.
            assert below or {part, words[1]} <= {"profiles", "logits_rules"}, f"{part} imports {words[1]}"
        assert not (words[0] == "lightning" and part in WITHOUT_LIGHTNING), f"{part} imports {name}"


def test_every_part_has_a_level() -> None:
    assert {_part(path) for path in FILES} == set(LEVEL_OF)
