"""Copies, near copies and contaminated rows: what was planted is left out, and what is distinct stays."""

import json
import random
import sys

import numpy as np
import pytest

from llmkit.core.errors import DataError, RecipeError
from llmkit.data.cleaning import MinHashDedup
from llmkit.data.node import Data, Jsonl
from llmkit.data.prepare import prepare
from llmkit.data.rows import Row
from llmkit.data.sketch import KEPT, shingles, sketch
from llmkit.stages.lint_table import linted
from tests.data import clean

DRAW = random.Random(5)
WORDS = ["".join(DRAW.choice("abcdefghijklmnoprstuvw") for _ in range(6)) for _ in range(3000)]


def words(count, draw=DRAW):
    return [draw.choice(WORDS) for _ in range(count)]


def changed(said, places, draw=DRAW):
    """The same words but for some."""
    made = list(said)
    for place in draw.sample(range(len(made)), places):
        made[place] = draw.choice(WORDS)
    return made


def similarity(one, other, ngram=5):
    a, b = (set(shingles(" ".join(said), ngram).tolist()) for said in (one, other))
    return len(a & b) / len(a | b)


def made_of(tmp_path, tokenizer, rows, **how):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=(Jsonl(path=str(path)),), max_length=8192, **how)
    return data, prepare(data.train, data, tokenizer)


def assert_same(made, other):
    np.testing.assert_array_equal(made.starts, other.starts)
    np.testing.assert_array_equal(made.ids[0 : len(made.ids)], other.ids[0 : len(other.ids)])
    np.testing.assert_array_equal(made.weights[0 : len(made.ids)], other.weights[0 : len(other.ids)])


def test_planted_near_copies_are_found_at_the_stated_recall_and_distinct_rows_stay():
    """At a similarity of 0.9 at least 97 % are found with a threshold of 0.8; up to 0.72, at most 3 % are."""
    sieve, near, far = MinHashDedup().sieve(), [0, 0], [0, 0]
    for index in range(200):
        said = words(200)
        other = changed(said, 2 if index % 2 else 8)
        share = similarity(said, other)
        assert sieve(Row(2 * index, "", completion=" ".join(said)), f"a:{index}") is None  # all are distinct
        found = sieve(Row(2 * index + 1, "", completion=" ".join(other)), f"b:{index}")
        if share >= 0.9:
            near[found is not None and found.detail.endswith(f"a:{index}")] += 1
        elif share <= 0.72:
            far[found is not None] += 1
    assert sum(near) > 75 and near[1] >= 0.97 * sum(near)
    assert sum(far) > 75 and far[1] <= 0.03 * sum(far)


def test_near_copies_are_left_out_counted_and_shown_and_the_first_stays(tmp_path, tokenizer):
    base = [words(60) for _ in range(30)]
    texts = [" ".join(said) for said in [*base, changed(base[4], 1), base[7], [w.upper() for w in base[9]]]]
    rows = [{"prompt": text[:40], "completion": text[40:]} for text in texts]
    data, made = made_of(tmp_path, tokenizer, rows, dedup={"kind": "minhash", "ngram": 3, "threshold": 0.7})
    assert len(made) == 30 and [line for _, line in made.places] == list(range(1, 31))
    assert made.counts["left out: removed near copy"] == 2 and made.counts["left out: removed copy"] == 1
    found = {f.name: f for f in linted(data, made, None)["data.train"]}
    assert [place.line for place in found["removed near copy"].places] == [31, 33]
    assert found["removed near copy"].places[0].detail.endswith("train.jsonl:5") and "duplicate" not in found
    assert found["removed copy"].places[0].detail.endswith("train.jsonl:8") and found["removed copy"].level == "info"
    # what is left is what a file without them gives
    data, alone = made_of(tmp_path, tokenizer, rows[:30])
    assert_same(made, alone)
    assert made.counts["tokens"] == alone.counts["tokens"]
    assert made.rows[3] == alone.rows[3] and made.rows[1:3] == tuple(alone.rows[1:3])


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_clean_rows_all_stay_and_it_is_the_same_each_time(kind, tmp_path, tokenizer):
    rows = clean.rows("completion", 80)
    data, plain = made_of(tmp_path, tokenizer, rows)
    twice = [made_of(tmp_path, tokenizer, [*rows, rows[3]], dedup=kind)[1] for _ in range(2)]
    assert twice[0].digest == twice[1].digest
    for made in twice:
        assert_same(made, plain)
        assert made.counts["left out: removed copy"] == 1


def test_in_another_order_as_many_stay(tmp_path, tokenizer):
    base = [words(50) for _ in range(12)]
    rows = [{"text": " ".join(said)} for said in [*base, *(changed(said, 1) for said in base)]]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        _, made = made_of(tmp_path, tokenizer, rows, dedup={"kind": "minhash", "threshold": 0.6})
        assert len(made) == 12


def test_rows_that_hold_an_evaluation_s_question_are_left_out(tmp_path, tokenizer):
    rows, exam = clean.rows("completion", 40), [words(30) for _ in range(20)]
    rows[11]["completion"] += " ".join(exam[3]).upper() + "!"  # all of it
    rows[17]["prompt"] += " " + " ".join(exam[5][:24])  # 17 of 23 runs of 8
    rows[21]["prompt"] += " " + " ".join(exam[6][:14])  # 7 of 23
    rows[25]["prompt"] = "Who wrote the old letter?"  # a short one, whole
    path = tmp_path / "exam.jsonl"
    asked = [{"question": " ".join(said), "answer": "B"} for said in exam] + [{"question": "who wrote the old letter"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    exams = [{"kind": "jsonl", "path": str(path)}]
    data, made = made_of(tmp_path, tokenizer, rows, decontaminate=exams)
    assert made.counts["left out: removed contaminated"] == 3 and len(made) == 37
    (finding,) = (f for f in linted(data, made, None)["data.train"] if f.name == "removed contaminated")
    assert [(p.line, p.detail.split("/")[-1]) for p in finding.places] == [
        (12, "exam.jsonl:4"),
        (18, "exam.jsonl:6"),
        (26, "exam.jsonl:21"),
    ]
    _, strict = made_of(tmp_path, tokenizer, rows, decontaminate=exams, contamination={"share": 0.3})
    assert strict.counts["left out: removed contaminated"] == 4
    _, clear = made_of(tmp_path, tokenizer, clean.rows("completion", 40), decontaminate=exams)
    assert len(clear) == 40


def test_an_evaluation_s_chat_rows_are_compared_by_their_questions(tmp_path, tokenizer):
    rows = clean.rows("chat", 40)
    exam = [{"messages": [*rows[7]["messages"][:-1], clean.turn("assistant", "Something else.")]}]
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(exam[0]) + "\n")
    _, made = made_of(tmp_path, tokenizer, rows, decontaminate=[{"kind": "jsonl", "path": str(path)}])
    assert made.counts["left out: removed contaminated"] == 1 and 8 not in {line for _, line in made.places}


def test_nothing_left_an_empty_exam_and_no_datasketch_are_errors(tmp_path, tokenizer, monkeypatch):
    rows = [{"text": " ".join(words(20))}]
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no row is left to learn from .*left out: removed contaminated 1"):
        made_of(tmp_path, tokenizer, rows, decontaminate=[{"kind": "jsonl", "path": str(exam)}])
    exam.write_text("")
    with pytest.raises(DataError, match=r"data\.decontaminate\.0: holds no rows"):
        made_of(tmp_path, tokenizer, rows, decontaminate=[{"kind": "jsonl", "path": str(exam)}])
    with pytest.raises(RecipeError, match="contamination: contradicts decontaminate"):
        Data(train=(), contamination={"share": 0.3})
    with pytest.raises(RecipeError, match="threshold: 0 is out of range"):
        Data(train=(), dedup={"kind": "minhash", "threshold": 0})
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"data\.dedup\.kind: near copies are found by datasketch .*; fix: pip install"):
        made_of(tmp_path, tokenizer, rows, dedup="minhash")


def test_validation_rows_are_not_sifted(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(3 * (json.dumps({"text": " ".join(words(20))}) + "\n"))
    data = Data(train=(Jsonl(path=str(path)),), dedup="exact")
    assert len(prepare(data.train, data, tokenizer)) == 1
    assert len(prepare(data.train, data, tokenizer, "data.valid")) == 3


def test_runs_of_words_are_hashed_alike_whatever_stands_between_them():
    one, other = shingles("The quick, brown fox; jumps!", 3), shingles("the QUICK brown\n\nfox jumps", 3)
    assert len(one) == 3 and (one == other).all()
    assert len(shingles("こたえ", 2)) == 2 and len(shingles("one two", 5)) == 1 and not len(shingles("?!", 2))
    naive = {" ".join(said[i : i + 4]) for said in [words(300)] for i in range(297)}
    assert len({int(shingles(run, 4)[0]) for run in naive}) == len(naive)


def test_a_sketch_holds_the_smallest_hashes_of_all_windows():
    text = "Some text that is long enough to have a sketch, and then some more of it, until it is."
    made = sketch(text)
    assert len(made) == KEPT and (np.diff(made.astype(np.int64)) > 0).all()
    assert (sketch("  " + text.upper().replace(" ", "\n ")) == made).all()
    assert not len(sketch("short")) and not len(sketch("a" * 500))
    longer = sketch(text + " And this stands behind it; it is about as long as what stood there before it, or longer.")
    assert 0 < len(np.intersect1d(made, longer)) < KEPT
