"""Sources: which files a path stands for, and reading on behind any row."""

import json

import pytest

from llmkit.core.errors import DataError
from llmkit.data.node import Docstrings, Jsonl, Parquet
from llmkit.data.rows import Raw


def texts(count, start=0):
    return [{"text": f"row {i}"} for i in range(start, start + count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


FORMATS = {"jsonl": (Jsonl, write_jsonl), "parquet": (Parquet, write_parquet)}


@pytest.fixture(params=FORMATS)
def source(request, tmp_path):
    """A source of 17 rows in three files, one of them empty."""
    cls, write = FORMATS[request.param]
    for name, rows in (("a", texts(8)), ("b", []), ("c", texts(9, 8))):
        write(tmp_path / f"{name}.rows", rows)
    return cls(path=str(tmp_path / "*.rows"))


def said(rows):
    return [(row.values, row.file, row.line) if isinstance(row, Raw) else str(row) for row in rows]


def test_reading_goes_on_behind_any_row(source):
    whole = list(source.rows())
    assert [row.values["text"] for row in whole] == [f"row {i}" for i in range(17)]
    assert list(source.rows(())) == whole
    for index, row in enumerate(whole):
        at = json.loads(json.dumps(row.at))  # as a checkpoint keeps it
        assert list(source.rows(at)) == whole[index + 1 :]


def test_take_holds_over_files_and_behind_any_row(source):
    from dataclasses import replace

    few = replace(source, take=10)
    whole = list(few.rows())
    assert [row.values["text"] for row in whole] == [f"row {i}" for i in range(10)]
    for index, row in enumerate(whole):
        assert list(few.rows(row.at)) == whole[index + 1 :]


def test_docstrings_go_on_behind_a_row():
    rows = [row for row, _ in zip(Docstrings(split="valid").rows(), range(6), strict=False)]
    on = [row for row, _ in zip(Docstrings(split="valid").rows(rows[2].at), range(3), strict=False)]
    assert on == rows[3:]


def test_reading_goes_on_behind_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + '{"text": "a"}\n\nnothing\n{"text": "b"}\n')
    whole = list(Jsonl(path=str(path)).rows())
    assert [isinstance(row, Raw) for row in whole] == [True, False, True]
    for index, row in enumerate(whole):
        assert said(Jsonl(path=str(path)).rows(row.at)) == said(whole[index + 1 :])


def test_a_list_is_read_as_it_stands_and_a_glob_by_name(tmp_path):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    paths = [str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl")]
    source = Jsonl(path=paths)
    assert [row.values["text"] for row in source.rows()] == ["c", "a", "b"]
    assert list(source.files()) == [paths[0], str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    odd = tmp_path / "[x].jsonl"  # a file whose name looks like a glob
    write_jsonl(odd, [{"text": "x"}])
    assert [row.values["text"] for row in Jsonl(path=str(odd)).rows()] == ["x"]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no\*\.jsonl: matches no file"):
        list(Jsonl(path=str(tmp_path / "no*.jsonl")).rows())
