"""Sources: which files a path stands for, what each format gives, and reading on behind any row."""

import bz2
import gzip
import json
import lzma
from dataclasses import replace

import pytest

from llmkit.core.errors import DataError, RecipeError
from llmkit.data.node import Arrow, Csv, Data, Docstrings, Hub, Jsonl, Parquet, Text
from llmkit.data.prepare import prepare
from llmkit.data.rows import BadRow, Raw
from llmkit.inference.speculation.node import Ngram
from llmkit.recipe.inputs import inputs, remote
from llmkit.stages.draft_head import HeadDrafter


def texts(count, start=0):
    return [{"text": f"row {i}"} for i in range(start, start + count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows):
    path.write_text("text\n" + "".join(f'"{row["text"]}"\r\n\n' for row in rows))


def write_text(path, rows):
    path.write_text("\n\n".join(row["text"] for row in rows))


def table(rows):
    import pyarrow as pa

    return pa.table({"text": pa.array([row["text"] for row in rows], pa.string())})


def write_parquet(path, rows):
    from pyarrow import parquet

    parquet.write_table(table(rows), path, row_group_size=3)


def write_arrow(path, rows, **more):
    import pyarrow as pa

    with pa.ipc.new_file(path, table(rows).schema, **more) as out:
        out.write_table(table(rows), max_chunksize=3)


def write_stream(path, rows, **more):
    import pyarrow as pa

    with pa.ipc.new_stream(path, table(rows).schema, **more) as out:
        out.write_table(table(rows), max_chunksize=3)


FORMATS = {
    "jsonl": (Jsonl, write_jsonl, {}),
    "csv": (Csv, write_csv, {}),
    "text": (Text, write_text, {}),
    "paragraph": (Text, write_text, {"document": "paragraph"}),
    "parquet": (Parquet, write_parquet, {}),
    "arrow": (Arrow, write_arrow, {}),
    "stream": (Arrow, write_stream, {}),
}


@pytest.fixture(params=FORMATS)
def source(request, tmp_path):
    """A source of 17 rows in three files, one of them empty."""
    cls, write, more = FORMATS[request.param]
    for name, rows in (("a", texts(8)), ("b", []), ("c", texts(9, 8))):
        write(tmp_path / f"{name}.rows", rows)
    return cls(path=str(tmp_path / "*.rows"), **more)


def said(rows):
    return [(row.values, row.file, row.line) if isinstance(row, Raw) else str(row) for row in rows]


def words(rows):
    return [row.values["text"] for row in rows]


def goes_on(source):
    """All rows, after reading on behind each was seen to give the rest."""
    whole = list(source.rows())
    for index, row in enumerate(whole):
        at = json.loads(json.dumps(row.at))  # as a checkpoint keeps it
        assert said(source.rows(at)) == said(whole[index + 1 :]), at
    return whole


def test_reading_goes_on_behind_any_row(source):
    assert words(goes_on(source)) == [f"row {i}" for i in range(17)]


def test_take_holds_over_files_and_behind_any_row(source):
    assert words(goes_on(replace(source, take=10))) == [f"row {i}" for i in range(10)]


def test_docstrings_go_on_behind_a_row():
    rows = [row for row, _ in zip(Docstrings(split="valid").rows(), range(6), strict=False)]
    on = [row for row, _ in zip(Docstrings(split="valid").rows(rows[2].at), range(3), strict=False)]
    assert on == rows[3:]


def test_reading_goes_on_behind_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + '{"text": "a"}\n\nnothing\n{"text": "b"}\n')
    assert [isinstance(row, Raw) for row in goes_on(Jsonl(path=str(path)))] == [True, False, True]


def test_a_list_is_read_as_it_stands_and_a_glob_by_name(tmp_path):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "a.folder").mkdir()
    paths = [str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].*")]
    source = Jsonl(path=paths)
    assert words(source.rows()) == ["c", "a", "b"]
    assert list(source.files()) == [paths[0], str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    odd = tmp_path / "[x].jsonl"  # a file whose name looks like a glob
    write_jsonl(odd, [{"text": "x"}])
    assert words(Jsonl(path=str(odd)).rows()) == ["x"]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no\*\.jsonl: matches no file"):
        list(Jsonl(path=str(tmp_path / "no*.jsonl")).rows())


# csv


def of(tmp_path, cls, text, name="rows.csv", **more):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return cls(path=str(path), **more)


def test_csv_reads_quotes_lines_within_fields_and_a_bom(tmp_path):
    text = '\ufeffprompt,completion\r\n"a ""b"", c","two\r\nlines"\r\n\r\nü,d\r\n'
    rows = goes_on(of(tmp_path, Csv, text))
    assert [row.values for row in rows] == [
        {"prompt": 'a "b", c', "completion": "two\r\nlines"},
        {"prompt": "ü", "completion": "d"},
    ]
    assert [row.line for row in rows] == [2, 5]


def test_csv_with_tabs_other_names_and_another_encoding(tmp_path):
    assert words(goes_on(of(tmp_path, Csv, "id\ttext\n1\ta,b\n", "rows.tsv"))) == ["a,b"]
    assert words(of(tmp_path, Csv, "1;a,b\n", delimiter=";", names=("id", "text")).rows()) == ["a,b"]
    assert words(of(tmp_path, Csv, "text\nü\n".encode("cp1252"), encoding="cp1252").rows()) == ["ü"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('text,more\n"a,b\n', r":2: ends within a quote"),
        ('text,more\n"a"b,c\n', r":2: has more behind a closing quote"),
        ("text,more\na,b,c\n", r":2: has 3 fields, and there are 2 columns"),
        ("text,more\na\n", r":2: has 1 fields"),
        ("text,more\na,\0\n", r":2: byte 12 is NUL"),
        ("text,more\na,ü\n".encode("latin-1"), r":2: byte 12 is not UTF-8"),
        ("text,more\na\rb,c\n", r":2: has a bare carriage return"),
    ],
)
def test_a_bad_line_of_csv_is_named_and_the_next_is_read(text, what, tmp_path):
    good = b"c,d\n"
    source = of(
        tmp_path,
        Csv,
        (text if isinstance(text, bytes) else text.encode())
        + (b"" if b'"a,' in (text if isinstance(text, bytes) else text.encode()) else good),
    )
    rows = goes_on(source)
    assert isinstance(rows[0], BadRow) and len(rows) == (1 if "ends within" in what else 2)
    with pytest.raises(BadRow, match=what):
        raise rows[0]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('text\na\n"b\nc\nd\n', r":3: opens a quote that goes on to line 5, which ends within a quote"),
        ('text\n"b\nc" d\n', r":2: opens a quote that goes on to line 3, which has more behind a closing quote"),
        ("text,text\na,b\n", r":1: names two columns 'text'"),
        ('"text\n', r":1: ends within a quote"),
        ('{"text": "a"}\n', r"is jsonl, not csv"),
        ("text\na\n".encode("utf-16"), r"is UTF-16 text, not csv; fix: save it as UTF-8"),
    ],
)
def test_csv_that_nobody_can_go_on_in_is_an_error(text, what, tmp_path):
    with pytest.raises(DataError, match=what):
        list(of(tmp_path, Csv, text).rows())


def test_a_quote_that_never_closes_holds_no_more_than_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.delimited.MOST_LINE", 1000)
    with pytest.raises(DataError, match=r":2: opens a quote that goes on to line 1\d\d, which is longer"):
        list(of(tmp_path, Csv, 'text\n"' + "a line\n" * 10_000).rows())


def test_a_delimiter_is_one_character():
    with pytest.raises(RecipeError, match="delimiter: ';;' is not one character"):
        Csv(path="a", delimiter=";;")
    with pytest.raises(RecipeError, match="names a column twice"):
        Csv(path="a", names=("a", "a"))


# text


def test_text_as_lines_paragraphs_and_whole_files(tmp_path):
    text = "\ufeff\n\na\r\n b \n\n\nc\n"
    assert words(goes_on(of(tmp_path, Text, text))) == ["a", " b ", "c"]
    assert words(goes_on(of(tmp_path, Text, text, document="paragraph"))) == ["a\r\n b ", "c"]
    assert words(goes_on(of(tmp_path, Text, text, document="file"))) == ["a\r\n b \n\n\nc"]
    assert not list(of(tmp_path, Text, "", document="file").rows())


def test_a_long_document_comes_in_pieces_that_make_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.text.PIECE", 20)
    text = "".join(f"line {i}\n" + "\n" * (i % 3) for i in range(30))
    rows = goes_on(of(tmp_path, Text, text, document="file"))
    assert "".join(words(rows)) == text.rstrip("\n") and len(rows) > 5
    assert [row.more for row in rows] == [True] * (len(rows) - 1) + [False]


def test_a_bad_line_of_text_stands_alone(tmp_path):
    rows = goes_on(of(tmp_path, Text, b"a\nb\n\xff\nc\n\nd\n", document="paragraph"))
    assert [isinstance(row, Raw) for row in rows] == [True, False, True, True]
    assert "rows.csv:3: byte 4 is not UTF-8" in str(rows[1])


@pytest.mark.parametrize("text", [b"\x7fELF\0\0", "text".encode("utf-32-be"), b"a\n" * 40 + b"\0"])
def test_a_binary_file_is_no_text(text, tmp_path):
    with pytest.raises(DataError, match=r"is binary: byte \d+ is NUL"):
        list(of(tmp_path, Text, text).rows())


# Arrow


def test_folders_that_datasets_saved_are_arrow_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(texts(7))
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=whole, valid=whole.select([4, 2])).save_to_disk(tmp_path / "two")
    assert words(goes_on(Arrow(path=str(tmp_path / "one")))) == [f"row {i}" for i in range(7)]
    assert len(Arrow(path=str(tmp_path / "one")).files()) == 2
    valid = Arrow(path=str(tmp_path / "two"), split="valid")
    assert words(valid.rows()) == ["row 4", "row 2"] and len(valid.files()) == 1
    for split, what in ((None, "has the splits train, valid; fix: set split"), ("x", "and no x")):
        with pytest.raises(DataError, match=what):
            list(Arrow(path=str(tmp_path / "two"), split=split).rows())
    with pytest.raises(DataError, match="has no splits, and train is asked for"):
        list(Arrow(path=str(tmp_path / "one"), split="train").rows())
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../rows.arrow"}]}')
    with pytest.raises(DataError, match="names no data files of its own"):
        list(Arrow(path=str(tmp_path / "one")).rows())
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(DataError, match=r"has no state\.json"):
        list(Arrow(path=str(tmp_path / "one")).rows())


@pytest.mark.parametrize("write", [write_arrow, write_stream])
@pytest.mark.parametrize("cut", [1, 8, 100, 0.5, 0.99])
def test_d10_an_arrow_file_that_ends_early_is_named(cut, write, tmp_path):
    path = tmp_path / "rows.arrow"
    write(path, texts(500))
    whole = path.read_bytes()
    assert len(list(Arrow(path=str(path)).rows())) == 500  # the control
    path.write_bytes(whole[: -cut if isinstance(cut, int) else -int(len(whole) * cut)])
    with pytest.raises(DataError, match=r"rows\.arrow: is (no whole Arrow file|.*, not arrow)"):
        list(Arrow(path=str(path)).rows())


@pytest.mark.parametrize("write", [write_arrow, write_stream])
def test_d10_an_arrow_bomb_is_refused_by_what_it_says(write, tmp_path, monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr("llmkit.data.arrow.FREE", 1 << 16)
    for form in ("zstd", "lz4"):
        path = tmp_path / f"{form}.arrow"
        write(path, [{"text": "a" * (1 << 24)}], options=pa.ipc.IpcWriteOptions(compression=form))
        with pytest.raises(DataError, match=r"a batch unpacks from \d+ bytes to 0.0 GiB"):
            list(Arrow(path=str(path)).rows())
        write(path, texts(50), options=pa.ipc.IpcWriteOptions(compression=form))
        assert len(list(Arrow(path=str(path)).rows())) == 50  # the control


def test_what_an_arrow_message_claims_is_what_it_unpacks_to(tmp_path):
    import pyarrow as pa

    from llmkit.data.claims import claimed

    column = pa.array([f"value {i % 5}" for i in range(1000)])
    data = pa.table({"a": column, "b": column.dictionary_encode(), "c": list(range(1000))})
    sizes = {}
    for form in (None, "zstd"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, data.schema, options=pa.ipc.IpcWriteOptions(compression=form)) as out:
            out.write_table(data)
        messages = list(pa.ipc.MessageReader.open_stream(sink.getvalue()))
        sizes[form] = [claimed(m.metadata.to_pybytes(), memoryview(m.body)) for m in messages if m.body is not None]
    assert sizes["zstd"] == sizes[None] and max(sizes[None]) > 16_000


# compressed files

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


@pytest.mark.parametrize("suffix", [*PACK, ".zst"])
def test_a_compressed_file_is_read_where_its_name_says_so(suffix, tmp_path):
    pack = PACK.get(suffix, zstd)
    parts = [b"".join(json.dumps(row).encode() + b"\n" for row in rows) for rows in (texts(2000), texts(3, 2000))]
    source = of(tmp_path, Jsonl, b"".join(map(pack, parts)), f"rows.jsonl{suffix}")  # two streams, end to end
    whole = list(source.rows())
    assert words(whole) == [f"row {i}" for i in range(2003)]
    for index in (0, 1000, 2001, 2002):
        assert list(source.rows(whole[index].at)) == whole[index + 1 :]
    table = of(tmp_path, Csv, pack(b"text\na\nb\n"), f"rows.csv{suffix}")
    assert words(goes_on(table)) == ["a", "b"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is \w+, not jsonl; fix: name it rows\.jsonl\."):
        list(of(tmp_path, Jsonl, pack(parts[0]), "rows.jsonl").rows())
    with pytest.raises(DataError, match="is named as"):
        list(of(tmp_path, Jsonl, parts[0], f"plain.jsonl{suffix}").rows())


@pytest.mark.parametrize("suffix", [*PACK, ".zst"])
def test_d10_a_compressed_file_that_ends_early_or_is_damaged_is_named(suffix, tmp_path):
    import random

    noise = "".join(random.Random(0).choices("abcdefgh", k=60_000))
    packed = PACK.get(suffix, zstd)(b'{"text": "a"}\n' * 100 + b'{"text": "' + noise.encode() + b'"}\n')
    for cut in (packed[:-1], packed[: len(packed) // 2], packed[:30]):
        with pytest.raises(DataError, match=r"is no whole \w+ file"):
            list(of(tmp_path, Jsonl, cut, f"rows.jsonl{suffix}").rows())
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0x55
    try:
        rows = list(of(tmp_path, Jsonl, bytes(damaged), f"rows.jsonl{suffix}").rows())
    except DataError as error:
        assert "is no whole" in str(error)
    else:  # zstd without a checksum: the bytes are other ones
        assert suffix == ".zst" and rows


@pytest.mark.parametrize("suffix", [*PACK, ".zst"])
def test_d10_a_bomb_is_cut_off_at_its_ratio(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.unpack.FREE", 1 << 16)
    bomb = PACK.get(suffix, zstd)(b'{"text": "a"}\n' * (1 << 15))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        for _ in of(tmp_path, Jsonl, bomb, f"rows.jsonl{suffix}").rows():
            pass


# stores


def test_files_of_a_store_are_read_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name, rows in (("b", texts(2, 2)), ("a", texts(2))):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        store.pipe(f"/bucket/{name}.jsonl.gz", gzip.compress(text, mtime=0))
    source = Jsonl(path="memory://bucket/*.jsonl.gz")
    assert source.remote() and not Jsonl(path="a").remote() and source.here() == []
    assert words(goes_on(source)) == [f"row {i}" for i in range(4)]
    local = tmp_path / "a.jsonl.gz"
    local.write_bytes(store.cat("/bucket/a.jsonl.gz"))
    assert source.files()["memory:///bucket/a.jsonl.gz"] == Jsonl(path=str(local)).files()[str(local)]
    for write, cls in ((write_parquet, Parquet), (write_arrow, Arrow), (write_stream, Arrow)):
        write(tmp_path / "rows", texts(7))
        store.pipe("/bucket/rows", (tmp_path / "rows").read_bytes())
        assert words(goes_on(cls(path="memory://bucket/rows"))) == [f"row {i}" for i in range(7)]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("memory://bucket/none.jsonl", "cannot be read"),
        ("memory://bucket/none*", "matches no file"),
        ("nothing://bucket/rows", "cannot be read"),
        ("memory://user:secret@bucket/none*", r"memory://\*\*\*@bucket"),
    ],
)
def test_a_store_that_refuses_is_named(path, what):
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=what) as caught:
        list(Jsonl(path=path).rows())
    assert "secret" not in str(caught.value)


# the Hub


@pytest.fixture
def cached(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_a_folder_of_data_files_is_read_as_on_the_hub(cached, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts(200))
    write_jsonl(folder / "test.jsonl", texts(5, 200))
    source = Hub(name=str(folder))
    assert not source.remote() and len(source.here()) == 2
    whole = list(source.rows())
    assert words(whole) == [f"row {i}" for i in range(200)]
    for index in (0, 63, 64, 198, 199):
        assert list(source.rows(list(whole[index].at))) == whole[index + 1 :]
    assert words(replace(source, split="train[:5%]+test[-2:]").rows()) == [
        *(f"row {i}" for i in range(10)),
        "row 203",
        "row 204",
    ]
    assert len(list(replace(source, take=70).rows())) == 70
    assert [len(digest) for digest in source.files().values()] == [64]
    for more, what in (
        ({"split": "x"}, "Unknown split"),
        ({"subset": "x"}, "set subset"),
        ({"split": "train["}, "train"),
    ):
        with pytest.raises(DataError, match=what):
            list(replace(source, **more).rows())
    with pytest.raises(DataError, match="leave revision out"):
        list(replace(source, revision="main").rows())


def test_a_saved_folder_is_a_hub_data_set_too(cached, tmp_path):
    whole = cached.Dataset.from_list(texts(40))
    cached.DatasetDict(train=whole, valid=whole.select([4, 2])).save_to_disk(tmp_path / "two")
    whole.select([3, 1]).save_to_disk(tmp_path / "one")
    two = Hub(name=str(tmp_path / "two"), split="train[:5%]+valid")
    assert words(two.rows()) == ["row 0", "row 1", "row 4", "row 2"] and len(two.files()) == 2
    assert words(Hub(name=str(tmp_path / "one")).rows()) == ["row 3", "row 1"]


def test_a_data_set_of_something_else_than_rows_is_refused(cached, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.xml").write_text("<a/>")
    with pytest.raises(DataError, match="holds xml, and no plain rows"):
        list(Hub(name=str(folder)).rows())
    (folder / "train.xml").unlink()
    (folder / "set.py").write_text("raise SystemExit(99)")
    with pytest.raises(DataError, match="cannot be had"):
        list(Hub(name=str(folder)).rows())


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"name": "no/such"}, "cannot be had .*; fix: connect to the Hub, or give a folder"),
        ({"name": "no such"}, "is no folder, and no name of a data set"),
        ({"name": "json"}, "is no folder, and no name of a data set"),
        ({"name": "no/such", "revision": "main"}, "nobody can say offline which commit main is"),
    ],
)
def test_a_data_set_that_is_not_here_is_named(more, what, cached):
    with pytest.raises(DataError, match=what):
        list(Hub(**more).rows())


# what a path may be


@pytest.mark.parametrize("kind", [Jsonl, Csv, Text, Parquet, Arrow])
def test_a_file_that_may_not_be_read_is_named(kind, tmp_path, monkeypatch):
    path = tmp_path / "rows"
    path.write_text("a\n")

    def refused(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(DataError, match=r"rows: cannot be read \(Permission denied\)"):
        list(kind(path=str(path)).rows())


@pytest.mark.parametrize("kind", [Jsonl, Csv, Text])
def test_an_empty_file_holds_no_rows(kind, tmp_path, tokenizer):
    (tmp_path / "rows").write_bytes(b"")
    source = kind(path=str(tmp_path / "rows"))
    assert list(source.rows()) == []
    with pytest.raises(DataError, match=r"data\.train: holds no rows"):
        prepare((source,), Data(train=(source,)), tokenizer)


@pytest.mark.parametrize("kind", [Parquet, Arrow])
def test_an_empty_file_is_no_table(kind, tmp_path):
    (tmp_path / "rows").write_bytes(b"")
    with pytest.raises(DataError, match="is no whole"):
        list(kind(path=str(tmp_path / "rows")).rows())


def test_what_a_stage_read_is_every_file_of_a_glob_and_of_a_folder(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "b.jsonl", "set/train.csv"):
        (tmp_path / name).write_text(name)
    data = Data(train=(Jsonl(path=str(tmp_path / "*.jsonl")), Hub(name=str(tmp_path / "set"))))
    before = inputs(data)
    assert [key.split(": ")[0] for key in before] == ["train.0.path", "train.0.path", "train.1.name"]
    (tmp_path / "b.jsonl").write_text("other")
    assert {key for key in before if inputs(data)[key] != before[key]} == {f"train.0.path: {tmp_path / 'b.jsonl'}"}
    assert not remote(data)
    assert remote(Data(train=(Jsonl(path=("a.jsonl", "s3://bucket/b.jsonl")),)))
    assert remote(Data(train=(Hub(name="no/such"),)))


def test_what_a_stage_read_is_what_drafts_too(tmp_path):
    weights = tmp_path / "model.safetensors"
    for node, key in ((HeadDrafter(start=str(tmp_path)), "start"), (Ngram(corpus=str(tmp_path)), "corpus")):
        weights.write_text("one")
        before = inputs(node)
        weights.write_text("another")
        assert before.keys() == {key}
        assert inputs(node) != before
