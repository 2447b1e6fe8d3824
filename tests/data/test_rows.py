"""Reading rows: which line is which, what makes a line bad, and which names are Hub ids."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_trainer.data import rows as rows_module
from lightning_trainer.data.rows import BadRow, RawRow, Source, read, sources
from lightning_trainer.types import InputError


def rows_of(path: Path, content: bytes | str) -> list[RawRow | BadRow]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read(Source(path.name, path)))


def bad(rows: list[RawRow | BadRow]) -> list[tuple[int, str]]:
    return [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]


def good(rows: list[RawRow | BadRow]) -> list[tuple[int, Any]]:
    return [(row.line, row.data) for row in rows if isinstance(row, RawRow)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a"])
def test_lines_are_counted_from_one_and_blank_lines_count(tmp_path: Path, name: str) -> None:
    rows = rows_of(tmp_path / name, '\n{"a": 1}\n  \n\t\r\n{"a": 2}\r\n{"a": 3}')
    assert good(rows) == [(2, {"a": 1}), (5, {"a": 2}), (6, {"a": 3})]
    assert {row.file for row in rows} == {name}


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = "x\u2028y\u0085z\x0cw"
    rows = rows_of(tmp_path / "a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + '\n{"a": 2}\n')
    assert good(rows) == [(1, {"a": text}), (2, {"a": 2})]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    assert good(rows_of(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xe9 at column 11"),
        pytest.param(b'{"a": "hel', "not JSON: Unterminated string starting at at column 7"),
        pytest.param(b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": "x\x00y"}', "not JSON: Invalid control character at at column 9"),
        (b"\x00\x00\x00", "not JSON: Expecting value at column 1"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
        (b"[1, 2]", "a row must be a JSON object, not list"),
        (b'"text"', "a row must be a JSON object, not str"),
        (b"null", "a row must be a JSON object, not NoneType"),
        (b"[" * 200_000, "not usable: JSON nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert bad(rows) == [(2, reason)]
    assert good(rows) == [(1, {"a": 1}), (3, {"a": 3})]


def test_a_half_line_at_the_end_is_a_bad_row(tmp_path: Path) -> None:
    whole = b'{"a": 1}\n{"a": 2}\n'
    assert bad(rows_of(tmp_path / "a.jsonl", whole[:-4])) == [(2, "not JSON: Expecting value at column 6")]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text(max_size=20) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
            | st.lists(st.text("\"\\]},[{ \n\u2028é😀", max_size=4), max_size=3),
            max_size=3,
        ),
        max_size=5,
    ),
    indent=st.none() | st.integers(0, 2),
    plain=st.booleans(),
    cut=st.none() | st.integers(0, 60),
    at_once=st.integers(1, 40),
)  # fmt: skip
def test_an_array_comes_out_the_same_however_much_of_it_is_read_at_once(
    tmp_path: Path, rows: list[Any], indent: int | None, plain: bool, cut: int | None, at_once: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=plain)
    text = text if cut is None else text[: min(cut, len(text) - 1)]
    (tmp_path / "a.json").write_text(text, encoding="utf-8")

    def found() -> list[Any]:
        try:
            return good(list(read(Source("a.json", tmp_path / "a.json"))))
        except InputError as error:
            return [str(error)]

    whole = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "AT_ONCE", at_once)
        assert found() == whole
    if cut is None:
        assert [data for _, data in whole] == rows


def test_a_number_too_long_for_python_is_a_bad_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'{"a": ' + b"1" * 5000 + b'}\n{"a": 2}\n')
    assert [line for line, _ in bad(rows)] == [1]
    assert good(rows) == [(2, {"a": 2})]


def test_the_bad_byte_behind_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "caf\xe9"}\n')
    assert "byte 0xe9" in bad(rows)[0][1]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.jsonl", "") == []
    assert rows_of(tmp_path / "a.json", "\n\n") == []


def test_array_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    text = """\ufeff
[
  {"a": 1},
  {
    "a": [
      [2], {"b": "]"}
    ]
  }, {"a": 3},

  [4],
  {"a": 5}
]
"""
    rows = rows_of(tmp_path / "a.json", text)
    assert good(rows) == [(3, {"a": 1}), (4, {"a": [[2], {"b": "]"}]}), (8, {"a": 3}), (11, {"a": 5})]
    assert bad(rows) == [(10, "a row must be a JSON object, not list")]


def test_array_lines_count_the_same_with_carriage_returns(tmp_path: Path) -> None:
    assert good(rows_of(tmp_path / "a.json", '[\r\n{"a": 1},\r\n{"a": 2}\r\n]')) == [(2, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("text", ["[]", "[\n]", " [ ]\n"])
def test_an_empty_array_has_no_rows(tmp_path: Path, text: str) -> None:
    assert rows_of(tmp_path / "a.json", text) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a": 2', 3),
        ('[\n{"a": 1},\n{"a": }\n, {"a": 3}]', 3),
        ('[\n{"a": 1}', 2),
        ('[\n{"a": 1},\n', 3),
    ],
)
def test_a_broken_array_names_the_line_of_the_break(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(InputError, match=f"^a.json:{line}: this JSON array breaks"):
        rows_of(tmp_path / "a.json", text)


def test_a_broken_array_names_the_line_of_the_fault_however_far_into_the_file(tmp_path: Path) -> None:
    sound = '{"a": "' + "x" * 1000 + '"},\n'
    with pytest.raises(InputError, match=r"^a\.json:3002: this .* here: Expecting value, in line 3003$"):
        rows_of(tmp_path / "a.json", "[\n" + sound * 3000 + '{"a":\n }, {"b": 1}]')


def test_a_number_too_long_for_python_breaks_an_array_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^a\.json:2: "):
        rows_of(tmp_path / "a.json", '[\n{"a": ' + "1" * 5000 + "}]")


def test_an_array_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: not UTF-8 at byte 7"):
        rows_of(tmp_path / "a.json", b'[{"a":"\xe9"}]')


def test_parquet_rows_are_numbered_and_nulls_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "text": [None, "c"]}), path, row_group_size=1)
    assert good(list(read(Source("a.parquet", path)))) == [(1, {"prompt": "a"}), (2, {"prompt": "b", "text": "c"})]


def test_what_is_no_parquet_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^a\.parquet: not a parquet file"):
        rows_of(tmp_path / "a.parquet", '{"a": 1}')


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match=r"no data file '.*trian\.jsonl'; did you mean '.*/train\.jsonl'\?") as caught:
        sources(str(tmp_path / "trian.jsonl"), "data.train_path")
    assert caught.value.key == "data.train_path"


def test_a_missing_directory_a_directory_and_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nor a directory"):
        sources(str(tmp_path / "nowhere" / "a.jsonl"), "k")
    with pytest.raises(InputError, match="is a directory; name its files"):
        sources(str(tmp_path), "k")
    with pytest.raises(InputError, match="an empty list"):
        sources([], "k")


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    for path in paths:
        path.write_text("{}")
    assert [source.path for source in sources([str(path) for path in paths], "k")] == paths


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `datasets.load_dataset` was asked for; it answers with two rows."""
    asked = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"a": [1, 2], "b": [None, "x"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/name/split", ("owner/name", None, "split")),
        pytest.param(
            "owner/name:config/split",
            ("owner/name", "config", "split"),
        ),
        pytest.param(
            "owner/train",
            ("owner/train", None, "train"),
        ),
        pytest.param(
            "teknium/OpenHermes-2.5",
            ("teknium/OpenHermes-2.5", None, "train"),
        ),
        pytest.param(
            "owner/name:v1.0",
            ("owner/name", "v1.0", "train"),
        ),
    ],
)
def test_a_hub_id_is_taken_apart(hub: list[tuple[Any, ...]], name: str, asked: tuple[Any, ...]) -> None:
    [source] = sources(name, "k")
    assert source.path is None
    assert good(list(read(source))) == [(1, {"a": 1}), (2, {"a": 2, "b": "x"})]
    assert hub == [asked]


def test_a_hub_data_set_that_is_not_there_is_the_users_to_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Dataset 'owner/nmae' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="no file 'owner/nmae', and no such data set on the Hub"):
        list(read(Source("owner/nmae", None)))


@pytest.mark.parametrize("name", ["/data/rows", "./data/rows", "~/data/rows", "a/b/c/d", "rows", "data/rows.jsonl"])
def test_a_path_is_no_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="there is no data file"):
        sources(name, "k")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_identity_depends_on_content_alone(data: dict[str, Any]) -> None:
    row = RawRow("a.jsonl", 1, data)
    assert row.identity == RawRow("b.parquet", 9, reordered(data)).identity
    assert row.identity != RawRow("a.jsonl", 1, {**data, "more": 1}).identity
    assert 0 <= row.identity < 2**64


def test_identity_takes_half_an_emoji(tmp_path: Path) -> None:
    [row] = rows_of(tmp_path / "a.jsonl", r'{"a": "\ud83d"}')
    assert isinstance(row, RawRow)
    assert row.identity == RawRow("b", 2, {"a": "\ud83d"}).identity


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    assert Source("a", path).digest() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
