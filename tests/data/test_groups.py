"""Rows of preferences: where their prompt ends, what of them counts, and what cannot be used."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmkit.core.errors import DataError
from llmkit.data.groups import MOVED, grouped
from llmkit.data.node import Data, Jsonl
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
HH = Path(os.environ.get("LLMKIT_TEST_DATA", "")) / "hh-rlhf" / "harmless-base-test.jsonl.gz"
USER = {"role": "user", "content": "the lazy dog"}


def said(text):
    return {"role": "assistant", "content": text}


def read(tmp_path, *rows, tokenizer=TOKENIZER, aside=None, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=(Jsonl(path=str(path)),), **{"max_length": 64, "bad_share": 1.0} | more)
    return grouped(data.train, data, tokenizer, aside=aside)


def parts(made, index=0):
    """The prompt and the completions of an example, as text, and the weights of the latter."""
    begin, spans = int(made.starts[index]), made.completions(index)
    texts = [TOKENIZER.decode(made.ids[a:b]) for a, b in [(begin, spans[0][0]), *spans]]
    return texts, [made.weights[a:b].tolist() for a, b in spans]


FORMATS = {
    "messages": {"prompt": [USER], "chosen": [said("hello")], "rejected": [said("world")]},
    "whole conversations": {"chosen": [USER, said("hello")], "rejected": [USER, said("world")]},
    "a prompt of text": {"prompt": "the lazy dog", "chosen": [said("hello")], "rejected": [said("world")]},
    "a prompt beside whole conversations": {
        "prompt": "the lazy dog",
        "chosen": [USER, said("hello")],
        "rejected": [USER, said("world")],
    },
    "answers of text": {"prompt": [USER], "chosen": "hello", "rejected": "world"},
    "transcripts": {
        "chosen": "\n\nHuman: the lazy dog\n\nAssistant: hello",
        "rejected": "\n\nHuman: the lazy dog\n\nAssistant: world",
    },
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_every_format_is_the_same_pair(tmp_path, row):
    made = read(tmp_path, row)
    texts, weights = parts(made)
    assert texts[0] == TOKENIZER.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert texts[1:] == ["hello<|im_end|>", "world<|im_end|>"] and all(all(w) for w in weights)
    assert made.per["label"].tolist() == [1.0, 0.0] and MOVED not in made.counts
    assert made.length(0) == len(made.ids) - 1 and made.supervised(0) == 1.0


def test_text_is_parted_at_tokens_and_begins_once(tmp_path):
    row = {"chosen": "the quick brown fox is lazy", "rejected": "the quick brown fix"}
    made = read(tmp_path, row, {"prompt": "the quick", "chosen": " fox", "rejected": " dog"})
    (prompt, *both), _ = parts(made)
    assert [prompt + text for text in both] == [row["chosen"] + "<|im_end|>", row["rejected"] + "<|im_end|>"]
    first = made.ids[: made.completions(0)[0][0]]
    apart = [TOKENIZER(row[side])["input_ids"] for side in ("chosen", "rejected")]
    common = next(at for at, (a, b) in enumerate(zip(*apart, strict=False)) if a != b)
    assert first.tolist() == apart[0][:common]
    assert parts(made, 1)[0] == ["the quick", " fox<|im_end|>", " dog<|im_end|>"]


def test_a_token_over_the_border_is_the_completions(tmp_path):
    """A template without a break before the answer: the tokenizer joins both."""
    joined = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    row = {"prompt": [{"role": "user", "content": "a mod"}], "chosen": [said("el")], "rejected": [said("x")]}
    made = read(tmp_path, row, tokenizer=joined)
    assert made.counts[MOVED] == 1
    (prompt, chosen, rejected), weights = parts(made)
    assert "a mod".startswith(prompt) and (prompt + chosen, prompt + rejected) == (
        "a model<|im_end|>",
        "a modx<|im_end|>",
    )
    assert weights[1][-1] == 1.0 and len(prompt) < len("a mod")


def test_a_completion_of_several_turns_trains_its_answers(tmp_path):
    more = [said("hello"), {"role": "user", "content": "question"}, said("answer")]
    made = read(tmp_path, {"prompt": [USER], "chosen": more, "rejected": [said("world")]})
    (_, chosen, _), (weights, _) = parts(made)
    ids = made.ids[slice(*made.completions(0)[0])]
    trained = TOKENIZER.decode([i for i, w in zip(ids, weights, strict=True) if w])
    assert trained == "hello<|im_end|>answer<|im_end|>" and "question" in chosen


def test_a_single_answer_has_its_label_and_a_pair_its_margin(tmp_path):
    rows = [{"prompt": [USER], "completion": [said("hello")], "label": good} for good in (True, False)]
    made = read(tmp_path, *rows)
    assert made.per["label"].tolist() == [1.0, 0.0] and parts(made)[0][1:] == ["hello<|im_end|>"]
    assert read(tmp_path, FORMATS["messages"] | {"margin": 2}).per["margin"].tolist() == [2.0, 2.0]


BAD = {
    "chosen equals rejected": {"prompt": "the", "chosen": " fox", "rejected": " fox"},
    "chosen is null": {"prompt": "the", "chosen": None, "rejected": " fox"},
    "chosen is blank": {"prompt": "the", "chosen": "  ", "rejected": " fox"},
    "prompt is null": {"prompt": None, "chosen": "a", "rejected": "b"},
    "no chosen and rejected, or prompt, completion and label": {"prompt": "the", "chosen": " fox"},
    "chosen and rejected are neither both text nor both messages": {"chosen": "a", "rejected": [said("b")]},
    "label is not true or false": {"prompt": "the", "completion": " fox", "label": "yes"},
    "margin is not a number": {"prompt": "the", "chosen": " fox", "rejected": " dog", "margin": "x"},
    "no prompt: the completions begin with different tokens": {"chosen": "fox", "rejected": "dog"},
    "content of assistant is blank": {
        "chosen": "\n\nHuman: the\n\nAssistant: fox",
        "rejected": "\n\nHuman: the\n\nAssistant: ",
    },
}


@pytest.mark.parametrize("margin", [10**400, 1e39, float("nan"), True])
def test_a_margin_that_no_float_holds_is_a_fault_of_its_row(tmp_path, margin):
    with pytest.raises(DataError, match=r"rows.jsonl:1: margin is not a number"):
        read(tmp_path, BAD["margin is not a number"] | {"margin": margin}, bad_share=0.0)


def test_where_every_row_is_bad_nothing_is_raised(tmp_path):
    row = BAD["chosen is null"]
    with pytest.raises(DataError, match=r"2 of 2 rows .*; fix: mend them$"):
        read(tmp_path, row, row, bad_share=0.05)
    with pytest.raises(DataError, match=r"1 of 2 rows .*; fix: mend them, or raise data.bad_share$"):
        read(tmp_path, row, FORMATS["messages"], bad_share=0.05)


def test_a_prompt_of_another_name_is_asked_for_by_ours(tmp_path):
    row = {"question": "the lazy dog", "chosen": " hello", "rejected": " world"}
    named = r"its columns are question, chosen, rejected\); fix: map it: columns: \{prompt: question\}"
    with pytest.raises(DataError, match=named):
        read(tmp_path, row, row, bad_share=0.05)


def test_a_file_without_rows_is_named(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl: data.train: holds no rows"):
        read(tmp_path)


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_used_is_counted_by_its_reason(tmp_path, reason):
    made = read(tmp_path, BAD[reason], FORMATS["messages"])
    assert made.counts[f"unusable: {reason}"] == 1 and len(made) == 1
    kept = []
    read(tmp_path, BAD[reason], FORMATS["messages"], aside=kept.append, on_bad_row="quarantine")
    assert reason in str(kept[0])


def test_what_is_too_long_is_dropped_cut_or_refused(tmp_path):
    long = {"prompt": [USER], "chosen": [said("the quick brown fox " * 30)], "rejected": [said("world")]}
    assert read(tmp_path, long, FORMATS["messages"]).counts["overflow: drop"] == 1
    cut = read(tmp_path, long, overflow="truncate")
    (begin, end), _ = cut.completions(0)
    assert end == 64 and begin > 0 and cut.weights[end - 1] == 1.0
    with pytest.raises(DataError, match="more than data.max_length 64"):
        read(tmp_path, long, overflow="error")
    same = long | {"rejected": [said("the quick brown fox " * 30 + "dog")]}
    assert (
        read(tmp_path, same, FORMATS["messages"], overflow="truncate").counts["unusable: chosen equals rejected"] == 1
    )


def test_lint_sees_pairs_and_a_digest_follows_what_is_read(tmp_path):
    one = read(tmp_path, FORMATS["messages"], FORMATS["messages"])
    assert one.lint.sizes["rows"] == 2 and [row.cluster for row in one.rows] == ["0", "1"]
    other = read(tmp_path, FORMATS["messages"], FORMATS["messages"] | {"margin": 1})
    assert one.digest != other.digest != ""
    assert np.array_equal(one.ids, other.ids) and set(one.files) == {"rows.jsonl"}


@pytest.mark.skipif(not HH.is_file(), reason="LLMKIT_TEST_DATA names no folder with it")
def test_hh_rlhf_is_read_as_conversations(tmp_path):
    path = tmp_path / "hh.jsonl"
    with gzip.open(HH, "rt") as file:
        path.write_text("".join(line for line, _ in zip(file, range(300), strict=False)))
    data = Data(train=(Jsonl(path=str(path)),), max_length=4096)
    made = grouped(data.train, data, TOKENIZER)
    assert len(made) > 285 and made.counts["rows"] == 300 and MOVED not in made.counts
    for index in range(20):
        (prompt, *_), _ = parts(made, index)
        assert "<|im_start|>user" in prompt


def test_a_step_that_is_not_filled_names_the_key_that_says_how_large_it_is(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "hello", "rejected": "world"}) + "\n")
    data = Data(train=({"kind": "jsonl", "path": str(path)},))
    with pytest.raises(DataError, match=r"1 examples do not fill one step of 4; fix: set batch\.pairs=1"):
        grouped(data.train, data, TOKENIZER, least=4, counted="pairs")


def test_columns_of_other_names_are_mapped_and_asked_for_by_ours(tmp_path):
    theirs = {"question": "the lazy dog", "good": " hello", "bad": " world", "by": 2.0}
    with pytest.raises(
        DataError, match=r"question, good, bad, by\); fix: map them: columns: \{prompt: question, chosen: ..."
    ):
        read(tmp_path, *[theirs] * 4, bad_share=0.05)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "by"}
    source = Jsonl(path=str(tmp_path / "rows.jsonl"), columns=names)
    made = grouped((source,), Data(train=(source,), max_length=64), TOKENIZER)
    ours = read(tmp_path, *[{name: theirs[column] for name, column in names.items()}] * 4)
    assert parts(made) == parts(ours) and made.per["margin"].tolist() == ours.per["margin"].tolist() == [2.0] * 8


def test_how_likely_a_label_is_comes_along_and_a_row_that_says_nothing_is_certain(tmp_path):
    pair = {"prompt": "the ", "chosen": "quick", "rejected": "lazy"}
    made = read(tmp_path, {**pair, "probability": 0.75}, pair, {**pair, "probability": 1})
    assert made.per["doubt"].tolist() == [0.25, 0.25, 0, 0, 0, 0]
    with pytest.raises(DataError, match="probability of their labels, and loss ipo takes all as certain"):
        made.check_doubts(False, "ipo", "train")
    read(tmp_path, pair, {**pair, "probability": 1}).check_doubts(False, "ipo", "train")
    with pytest.raises(DataError, match="probability is not a number from 0 to 1"):
        read(tmp_path, {**pair, "probability": 1.5})
