"""Config files as text: positions of keys, and the faults of files that are not what they should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_trainer.engine.config.config_file import ConfigError, Position, check_command_line, read_positions


def write(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def positions(folder: Path, text: str) -> dict[str, tuple[int, int]]:
    return {key: (place.line, place.column) for key, place in read_positions(write(folder, text)).items()}


def fault(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read_positions(write(folder, text))
    return str(caught.value).replace(f"{folder}/", "")


def test_position_reads_as_file_line_column() -> None:
    assert str(Position("run.yaml", 3, 5)) == "run.yaml:3:5"


def test_every_key_and_item_has_its_position(tmp_path: Path) -> None:
    text = (
        "# comment\n"
        "trainer:\n"
        "  callbacks:\n"
        "  - class_path: Timer\n"
        "    init_args: {duration: 3}\n"
        "  callbacks+: [{class_path: X}]\n"
    )
    assert positions(tmp_path, text) == {
        "trainer": (2, 1),
        "trainer.callbacks": (3, 3),
        "trainer.callbacks.0": (4, 5),
        "trainer.callbacks.0.class_path": (4, 5),
        "trainer.callbacks.0.init_args": (5, 5),
        "trainer.callbacks.0.init_args.duration": (5, 17),
        "trainer.callbacks+": (6, 3),
        "trainer.callbacks+.0": (6, 16),
        "trainer.callbacks+.0.class_path": (6, 17),
    }


def test_aliased_and_merged_keys_stand_where_they_were_written(tmp_path: Path) -> None:
    text = "a: &a {lr: 1, wd: 2}\nb:\n  <<: *a\n  lr: 3\nc: *a\n"
    found = positions(tmp_path, text)
    assert found["b.lr"] == (4, 3)  # its own key wins over the merged one
    assert found["b.wd"] == (1, 15)
    assert found["c.lr"] == (1, 8)


def test_the_first_of_several_merged_mappings_wins(tmp_path: Path) -> None:
    found = positions(tmp_path, "a: &a {x: 1}\nb: &b {x: 2, y: 3}\nc: {<<: [*a, *b]}\n")
    assert found["c.x"] == (1, 8)
    assert found["c.y"] == (2, 14)


def test_a_mapping_of_nothing_is_a_config(tmp_path: Path) -> None:
    assert read_positions(write(tmp_path, "{}")) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml:1:1: the file is empty; expected keys with values, such as 'model:'"),
        ("# only a comment\n", "run.yaml:1:1: the file is empty; expected keys with values, such as 'model:'"),
        ("- model\n- data\n", "run.yaml:1:1: expected keys with values at the top of the file, found a list"),
        (
            "\nmodel:3\n",
            "run.yaml:2:1: expected keys with values at the top of the file, found 'model:3'; "
            "a key needs a colon and a space after it",
        ),
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3:1: a: the key is set twice; it already stands at run.yaml:1:1"),
        ("m:\n  lr: 1\n  lr: 2\n", "run.yaml:3:3: m.lr: the key is set twice; it already stands at run.yaml:2:3"),
        ("c: [{x: 1, x: 2}]\n", "run.yaml:1:12: c.0.x: the key is set twice; it already stands at run.yaml:1:6"),
        (
            "a: [1, 2\nb: 3\n",
            "run.yaml:2:2: not valid YAML: while parsing a flow sequence that began on line 1, "
            "expected ',' or ']', but got ':'",
        ),
        ("a: b: c\n", "run.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        (
            "a:\n\tb: 3\n",
            "run.yaml:2:1: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token; indent with spaces, not tabs",
        ),
        ("a: *nowhere\n", "run.yaml:1:4: not valid YAML: found undefined alias 'nowhere'"),
        ("a: &x {b: *x}\n", "run.yaml:1:4: a.b: the alias stands inside its own anchor"),
        ("a: !secret 3\n", "run.yaml:1:4: a: unknown YAML tag !secret"),
        ("<<: 3\n", "run.yaml:1:5: <<: expected a mapping to merge"),
        ("? [1, 2]\n: 3\n", "run.yaml:1:3: the file: a key must be plain text"),
        (b"a: 1\nb: \xff\n", "run.yaml:2:4: not UTF-8 (byte 0xff); save the file as UTF-8"),
        ("a: 1\nb: \x07\n", "run.yaml:2:4: not valid YAML: special characters are not allowed"),
    ],
)
def test_a_broken_file_is_told_with_its_place(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert fault(tmp_path, text) == expected


def test_two_documents_are_one_too_many(tmp_path: Path) -> None:
    assert fault(tmp_path, "a: 1\n---\nb: 2\n").startswith("run.yaml:2:1: not valid YAML: expected a single document")


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    near = write(tmp_path, "a: 1", "quickstart.yaml")
    with pytest.raises(ConfigError) as caught:
        read_positions(tmp_path / "quikstart.yaml")
    assert str(caught.value) == f"{tmp_path}/quikstart.yaml: no such file; did you mean {near}?"


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory; name a YAML file in it$"):
        read_positions(tmp_path)


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"], ["-c", "{}"], ["-c{}"]])
def test_each_config_on_the_command_line_is_read(tmp_path: Path, spelling: list[str]) -> None:
    broken = write(tmp_path, "a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2:1: a: the key is set twice"):
        check_command_line(["fit", "--model.lr", "3", *(word.format(broken) for word in spelling)])


def test_the_second_config_is_read_too(tmp_path: Path) -> None:
    good, broken = write(tmp_path, "a: 1", "good.yaml"), write(tmp_path, "", "broken.yaml")
    with pytest.raises(ConfigError, match=r"broken.yaml:1:1: the file is empty"):
        check_command_line(["fit", "--config", str(good), "--config", str(broken)])


def test_a_missing_config_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_command_line(["fit", "--config", f"{tmp_path}/nothing.yaml"])
    assert str(caught.value) == f"command line: --config {tmp_path}/nothing.yaml: no such file"


@pytest.mark.parametrize("value", ['{"a": 1}', "a: 1\nb: 2", "-", "s3://bucket/run.yaml"])
def test_what_is_no_local_file_is_left_to_jsonargparse(value: str) -> None:
    check_command_line(["fit", "--config", value])


def test_the_check_loads_no_torch_and_is_quick(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from lightning_trainer.engine.config.config_file import check_command_line\n"
        "check_command_line(['fit', '--config', sys.argv[1]])\n"
        "print(time.process_time() - start)\n"
        "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])\n"
    )
    config = write(tmp_path, "model:\n  lr: 3\n" + "".join(f"key{n}: {{x: {n}}}\n" for n in range(50)))
    result = subprocess.run(
        [sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True, cwd=_root()
    )
    seconds, modules = result.stdout.splitlines()
    assert float(seconds) < 0.3
    assert modules == "[]"


def _root() -> Path:
    return Path(__file__).parents[2]
