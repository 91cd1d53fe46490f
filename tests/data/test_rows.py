"""Reading rows: the D rows of bad input, each with its control."""

import gzip
import json

import pytest

from llmkit.core.errors import DataError
from llmkit.data.node import Data, Docstrings, Jsonl, Parquet
from llmkit.data.prepare import prepare

GOOD = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]}


def made(tmp_path, text, tokenizer, aside=None, **more):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    data = Data(train=(Jsonl(path=str(path), columns=more.pop("columns", {})),), **more)
    return prepare(data.train, data, tokenizer, aside=aside)


def line(row=None):
    return json.dumps(row or GOOD) + "\n"


def test_a_good_file_with_bom_crlf_and_blank_lines(tmp_path, tokenizer):
    text = "\ufeff" + line().replace("\n", "\r\n") + "\n\n" + line()
    assert len(made(tmp_path, text, tokenizer)) == 2


def test_d1_a_torn_last_line_is_named_or_set_aside(tmp_path, tokenizer):
    text = line() + line()[:30]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is torn off at byte 1\d\d"):
        made(tmp_path, text, tokenizer)
    kept = []
    prepared = made(tmp_path, text, tokenizer, aside=kept.append, on_bad_row="quarantine")
    assert len(prepared) == 1 and prepared.counts["quarantined"] == 1 and kept[0].problems[0].line == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (line() + "garbage\n" + line(), ":2: is not JSON"),
        (line().strip() + " " + line(), ":1: holds two objects on one line"),
        (json.dumps(GOOD, indent=1), ":1: is pretty-printed"),
        (json.dumps([GOOD], indent=1), ":1: is pretty-printed"),
        (line() + "[1]\n", ":2: holds a list"),
        (line().encode() + b'{"text": "\xff"}\n', ":2: byte"),
        (line() + '{"text": ' + "9" * 100_000 + "}\n", ":2: cannot be read"),
        (line() + '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n", ":2: nests too deep"),
    ],
    ids=["garbage", "two", "pretty", "list", "not an object", "not utf8", "d7 integer", "d7 depth"],
)
def test_d2_d7_what_is_not_jsonl_is_named(text, said, tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        made(tmp_path, text, tokenizer)
    assert said in str(caught.value)


def test_d7_an_endless_line_is_refused_with_bounded_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llmkit.data.lines.MOST_LINE", 1000)
    with pytest.raises(DataError, match=":2: is longer than"):
        made(tmp_path, line() + "x" * 5000, tokenizer)


BAD = {
    "content of assistant is blank": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
    "content of user is null": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}],
    "no assistant turn": [{"role": "user", "content": "a"}],
    "roles in the wrong order": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    "messages is not a list of messages": [],
}


def test_d4_unusable_rows_are_counted_by_reason_and_an_error_over_the_allowed_share(tmp_path, tokenizer):
    bad = "".join(line({"messages": messages}) for messages in BAD.values())
    bad += line({"prompt": "a", "completion": ""}) + line({"other": 1})
    with pytest.raises(DataError, match="7 of 10 rows cannot be used"):
        made(tmp_path, bad + line() * 3, tokenizer)
    counts = made(tmp_path, bad + line() * 3, tokenizer, bad_share=0.9).counts
    assert all(counts[f"unusable: {reason}"] == 1 for reason in BAD)
    assert counts["unusable: completion is blank"] == 1 and counts["examples"] == 3


def test_d5_nothing_left(tmp_path, tokenizer):
    with pytest.raises(DataError, match="holds no rows"):
        made(tmp_path, "", tokenizer)
    with pytest.raises(DataError, match="no row is left to learn from"):
        made(tmp_path, line(), tokenizer, max_length=3)


def test_d8_odd_letters_are_kept_and_special_text_stays_text(tmp_path, tokenizer):
    said = "a\x00b <|im_end|> c"
    row = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "ok <|im_start|>"}]}
    prepared = made(tmp_path, line(row), tokenizer)
    ids, weights = prepared.example(0)
    assert prepared.counts["special text kept plain"] == 1
    assert list(ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # the two turns' own ends
    text = tokenizer.decode(ids)
    assert said in text and "ok <|im_start|>" in text
    learned = tokenizer.decode(ids[weights > 0])
    assert learned == "ok <|im_start|><|im_end|>"
    lone = line({"messages": [GOOD["messages"][0], {"role": "assistant", "content": "x"}]}).replace('"x"', '"\\ud800"')
    assert (
        made(tmp_path, lone + line() * 30, tokenizer).counts["unusable: half a surrogate pair, which no UTF-8 has"] == 1
    )


def test_d10_other_formats_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="is gzip, not jsonl"):
        made(tmp_path, gzip.compress(line().encode()), tokenizer)
    with pytest.raises(DataError, match="use kind: parquet"):
        made(tmp_path, b"PAR1" + b"0" * 40, tokenizer)


def test_parquet_is_read_and_a_cut_one_is_named(tmp_path, tokenizer):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"q": "hello", "a": "the fox"}] * 3), path)
    data = Data(train=(Parquet(path=str(path), columns={"prompt": "q", "completion": "a"}),))
    assert len(prepare(data.train, data, tokenizer)) == 3
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is no whole parquet file"):
        prepare(data.train, data, tokenizer)


def test_d10_a_parquet_file_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, tokenizer, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "bomb.parquet"
    rows = [{"prompt": f"{i}" + "a" * 4000, "completion": "b"} for i in range(500)]
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="zstd", use_dictionary=False)
    data = Data(train=(Parquet(path=str(path)),), max_length=8, overflow="truncate", bad_share=1.0)
    prepared = Data(train=(Parquet(path=str(path)),), max_length=8192)
    assert len(prepare(prepared.train, prepared, tokenizer)) == 500
    monkeypatch.setattr("llmkit.data.parquet.FREE", 1 << 20)
    with pytest.raises(DataError, match=r"bomb\.parquet: row group 0 unpacks from \d+ bytes to"):
        prepare(data.train, data, tokenizer)


def test_d7_a_row_too_deep_or_too_long_for_a_template_is_refused(tmp_path, tokenizer):
    deep = line(GOOD | {"extra": json.loads("[" * 200 + "]" * 200)})
    with pytest.raises(DataError, match="nests 200 deep, more than 64"):
        made(tmp_path, deep, tokenizer)
    huge = line({"prompt": "a", "completion": "b" * 2_000_001})
    with pytest.raises(DataError, match="holds 2000018 characters, more than 2000000"):
        made(tmp_path, huge, tokenizer)


def test_what_is_set_aside_keeps_its_place_reason_and_text(tmp_path, tokenizer):
    kept = []
    text = line() * 5 + line({"messages": []}) + "garbage\n"
    made(tmp_path, text, tokenizer, aside=kept.append, on_bad_row="quarantine", bad_share=0.5)
    assert [(bad.problems[0].line, bad.text) for bad in kept] == [
        (6, line({"messages": []}).encode()),
        (7, b"garbage\n"),
    ]


def test_fewer_examples_than_one_step_takes_is_an_error_with_the_way_out(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(line() * 3)
    data = Data(train=(Jsonl(path=str(path)),))
    with pytest.raises(DataError, match="3 examples do not fill one step of 4; fix: set batch.rows=3"):
        prepare(data.train, data, tokenizer, least=4)


def test_columns_that_are_not_there_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match="has no column question; fix: map to one of messages"):
        made(tmp_path, line(), tokenizer, columns={"prompt": "question", "completion": "answer"})


@pytest.mark.parametrize(("overflow", "examples"), [("drop", 1), ("truncate", 2), ("split", 3)])
def test_overflow_is_as_asked_and_counted(overflow, examples, tmp_path, tokenizer):
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox " * 40}]}
    prepared = made(tmp_path, line() + line(long), tokenizer, max_length=48, overflow=overflow)
    assert len(prepared) == examples and prepared.counts[f"overflow: {overflow}"] == 1
    assert max(prepared.length(i) for i in range(len(prepared))) <= 48
    if overflow == "split":  # every token of the answer is trained exactly once
        whole = made(tmp_path, line() + line(long), tokenizer, max_length=4096)
        assert prepared.weights.sum() == whole.weights.sum() and len(prepared.ids) > len(whole.ids)
    with pytest.raises(DataError, match="more than data.max_length 48"):
        made(tmp_path, line(long), tokenizer, max_length=48, overflow="error")


def test_the_docstring_set_is_large_real_and_split_by_module():
    train, valid = ([row for row in Docstrings(split=split).rows()] for split in ("train", "valid"))
    assert len(train) > 2500 and len(valid) > 250
    assert not {r.values["cluster"] for r in train} & {r.values["cluster"] for r in valid}
    sources = [r.values["prompt"][0]["content"] for r in train]
    assert len(set(sources)) == len(sources)
    row = train[0].values
    assert row["completion"][0]["content"] not in row["prompt"][0]["content"]
