"""Rows that are held out of training, and the system message of conversations without one."""

import json

import pytest

from llmkit.core.errors import RecipeError
from llmkit.data.node import Data, HeldOut, Jsonl, Text
from llmkit.data.prepare import prepare


def texts(rows):
    return [row.values.get("text") for row in rows]


def file_of(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Jsonl(path=str(path))


def parts(source, share=0.2, seed=0):
    data = Data(train=(source,), held_out=HeldOut(share=share, seed=seed))
    return [[row for part in data.sources(side) for row in part.rows()] for side in ("train", "valid")]


def test_about_the_share_is_held_out_and_nothing_is_lost_or_doubled(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(2000)]
    train, valid = parts(file_of(tmp_path, rows))
    assert 300 < len(valid) < 500
    assert sorted(texts(train) + texts(valid)) == sorted(row["text"] for row in rows)
    again = parts(file_of(tmp_path, rows[::-1]))[1]
    assert sorted(texts(again)) == sorted(texts(valid))  # the rows decide, and not their places
    assert sorted(texts(parts(file_of(tmp_path, rows), seed=1)[1])) != sorted(texts(valid))
    more = parts(file_of(tmp_path, rows), share=0.3)[1]
    assert set(texts(valid)) < set(texts(more))


def test_equal_rows_and_rows_of_one_cluster_stay_together(tmp_path):
    rows = [{"text": f"row {i % 50}"} for i in range(500)]
    train, valid = parts(file_of(tmp_path, rows))
    assert valid and not set(texts(train)) & set(texts(valid))
    rows = [{"text": f"row {i}", "cluster": i % 50} for i in range(500)]
    train, valid = parts(file_of(tmp_path, rows))
    assert valid and not {row.values["cluster"] for row in train} & {row.values["cluster"] for row in valid}


def test_the_pieces_of_a_document_stay_together(tmp_path, monkeypatch):
    monkeypatch.setattr("llmkit.data.text.PIECE", 20)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("a line\n" * 20)
    train, valid = parts(Text(path=str(tmp_path / "*.txt"), document="file"))
    assert valid and not {row.file for row in train} & {row.file for row in valid}


def test_a_part_goes_on_behind_a_row(tmp_path):
    data = Data(train=(file_of(tmp_path, [{"text": f"row {i}"} for i in range(60)]),), held_out=HeldOut(share=0.3))
    for side in ("train", "valid"):
        (part,) = data.sources(side)
        whole = list(part.rows())
        for index, row in enumerate(whole):
            assert list(part.rows(row.at)) == whole[index + 1 :]


def test_two_words_on_what_validates_contradict(tmp_path):
    source = file_of(tmp_path, [])
    with pytest.raises(RecipeError, match="held_out: contradicts valid: both say"):
        Data(train=(source,), valid=(source,), held_out=HeldOut(share=0.1))
    assert Data(train=(source,)).sources("valid") == ()


def test_a_default_system_message_is_put_where_there_is_none(tmp_path, tokenizer):
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one"}]
    own = [{"role": "system", "content": "own"}]
    rows = [{"messages": said}, {"messages": own + said}, {"prompt": said[:1], "completion": said[1:]}]
    rows += [{"prompt": "hello", "completion": "one"}, {"text": "hello"}]
    source = file_of(tmp_path, rows)
    plain = prepare((source,), Data(train=(source,)), tokenizer)
    made = prepare((source,), Data(train=(source,), system="two three"), tokenizer)
    seen = [tokenizer.decode(made.example(i)[0]) for i in range(5)]
    before = [tokenizer.decode(plain.example(i)[0]) for i in range(5)]
    front = "<|im_start|>system\ntwo three<|im_end|>\n"
    assert seen == [front + before[0], before[1], front + before[2], *before[3:]]
    assert [made.supervised(i) for i in range(5)] == [plain.supervised(i) for i in range(5)]


def test_a_default_system_message_leaves_what_each_message_weighs(tmp_path, tokenizer):
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one"}]
    more = [{"role": "user", "content": "world"}, {"role": "assistant", "content": "two three", "weight": 0}]
    source = file_of(tmp_path, [{"messages": [*said, *more]}, {"messages": said}])
    plain = prepare((source,), Data(train=(source,)), tokenizer)
    made = prepare((source,), Data(train=(source,), system="two"), tokenizer)
    assert [made.supervised(i) for i in range(2)] == [plain.supervised(i) for i in range(2)]
