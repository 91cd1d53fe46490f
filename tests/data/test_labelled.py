"""Rows with labels: the tokens that carry a class, and what cannot be used."""

import json

import numpy as np
import pytest

from llmkit.core.errors import DataError
from llmkit.data.labelled import UNSEEN, Labels, class_names, class_of, labelled
from llmkit.data.node import Data, Jsonl
from llmkit.data.rows import Unusable


def read(tmp_path, rows, tokenizer, task="sequence", labels=None, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (Jsonl(path=str(path)),)
    data = Data(train=source, **{"max_length": 64, **more})
    return labelled(source, data, tokenizer, Labels(task, labels or class_names(source, data, task)))


def test_the_class_stands_at_the_last_token_of_what_plain_use_would_send(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    rows = [{"text": "the lazy dog", "label": "b"}, {"prompt": "fox <|im_end|>", "label": "a"}]
    rows += [{"messages": chat, "label": "b", "cluster": "x"}]
    made = read(tmp_path, rows, tokenizer)
    assert made.classes == ("a", "b") and made.class_of.tolist() == [1, 0, 1]
    ids, targets, weights = made.sample(0)
    assert ids.tolist() == tokenizer("the lazy dog")["input_ids"]
    assert targets.tolist() == [UNSEEN] * (len(ids) - 1) + [1] and weights.tolist() == [0] * (len(ids) - 1) + [1]
    assert tokenizer.eos_token_id not in made.sample(1)[0]  # special-token text of a row is plain text
    assert made.sample(2)[0].tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    assert [row.cluster for row in made.rows] == ["0", "1", "x"] and made.supervised(2) == 1


def test_pooling_passes_over_padding_tokens_as_transformers_does(tmp_path, tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0]['content'] }}<|endoftext|>"
    try:
        said = [{"role": "user", "content": "hello world"}]
        made = read(tmp_path, [{"messages": said, "label": i} for i in (0, 1)], tokenizer)
    finally:
        tokenizer.chat_template = template
    ids, targets, _ = made.sample(1)
    assert ids[-1] == tokenizer.pad_token_id and targets[-2:].tolist() == [1, UNSEEN]


def test_labels_are_names_or_indices(tmp_path, tokenizer):
    rows = [{"text": "a b", "label": label} for label in (0, 1, "yes", "no", "1")]
    assert read(tmp_path, rows, tokenizer, labels=("no", "yes")).class_of.tolist() == [0, 1, 1, 0, 1]
    rows = [{"text": "a b", "label": label} for label in (10, 9, 2)]
    assert read(tmp_path, rows, tokenizer).classes == ("2", "9", "10")
    rows = [{"text": "a b", "label": label} for label in (True, False)]
    assert read(tmp_path, rows, tokenizer).classes == ("false", "true")


@pytest.mark.parametrize("classes", [("1", "2", "3"), ("1", "2", "other"), ("-1", "1"), ("0.5", "1.5")])
def test_a_number_is_no_index_where_names_are_numbers(classes):
    assert [class_of(name, classes) for name in classes] == list(range(len(classes)))
    with pytest.raises(Unusable, match="label '0' is none of"):
        class_of(0, classes)


BAD = {
    "label is null": {"text": "a"},
    "none of no, yes": {"text": "a", "label": "perhaps"},
    "no index": {"text": "a", "label": 1.5},
    "blank": {"text": "  ", "label": "yes"},
    "no text": {"label": "yes"},
}


@pytest.mark.parametrize("why", BAD)
def test_rows_that_cannot_be_used_are_counted_by_their_reason(why, tmp_path, tokenizer):
    with pytest.raises(DataError, match=why):
        read(tmp_path, [{"text": "a", "label": "no"}, BAD[why]], tokenizer, labels=("no", "yes"))


def test_one_class_is_no_classification(tmp_path, tokenizer):
    with pytest.raises(DataError, match="1 different values of label"):
        read(tmp_path, [{"text": "a", "label": "no"}] * 3, tokenizer)


def test_a_words_first_token_carries_its_tag(tmp_path, tokenizer):
    words, tags = ["hello", "Xyzzy", "the", "Zürich"], ["O", "B-X", "O", "B-Y"]
    made = read(tmp_path, [{"tokens": words, "tags": tags}], tokenizer, "token")
    ids, targets, _ = made.sample(0)
    offsets = tokenizer(" ".join(words), return_offsets_mapping=True)
    assert ids.tolist() == offsets["input_ids"]
    starts = np.cumsum([0] + [len(word) + 1 for word in words])[:-1]
    for start, tag in zip(starts, tags, strict=True):
        first = next(i for i, (_, end) in enumerate(offsets["offset_mapping"]) if end > start)
        assert made.classes[targets[first]] == tag
    assert (targets != UNSEEN).sum() == 4 and len(ids) > 4
    for row in ({"tokens": words, "tags": tags[1:]}, {"tokens": ["a", " "], "tags": ["O", "O"]}):
        with pytest.raises(DataError, match="tokens"):
            read(tmp_path, [row], tokenizer, "token", ("O", "B-X"))


def test_long_rows_meet_overflow(tmp_path, tokenizer):
    rows = [{"text": "hello world " * 40, "label": "a"}, {"text": "fox", "label": "b"}]
    assert len(read(tmp_path, rows, tokenizer)) == 1  # drop
    made = read(tmp_path, rows, tokenizer, overflow="truncate")
    assert made.length(0) == 64 and made.sample(0)[1].tolist() == [UNSEEN] * 63 + [0]
