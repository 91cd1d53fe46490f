"""Rows of solutions in steps: where a step ends, what its label says, and what cannot be used."""

import json

import pytest

from llmkit.core.errors import DataError
from llmkit.data.labelled import UNSEEN
from llmkit.data.node import Data, Jsonl
from llmkit.data.stepwise import Steps, stepwise

PROMPT, STEPS = "hello world", ["the quick fox", "jumps over", "the lazy dog"]


def read(tmp_path, rows, tokenizer, steps=Steps(), **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (Jsonl(path=str(path)),)
    return stepwise(source, Data(train=source, **{"max_length": 64, **more}), tokenizer, steps)


def row(labels=(True, True, False), steps=STEPS, prompt=PROMPT, **more):
    return {"prompt": prompt, "completions": list(steps), "labels": list(labels), **more}


def test_a_step_is_judged_at_the_last_token_of_what_ends_it(tmp_path, tokenizer):
    made = read(tmp_path, [row(), row(cluster="x")], tokenizer)
    ids, targets, weights = made.sample(0)
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    want = plain(PROMPT) + [token for step in STEPS for token in [*plain(step), *plain("\n")]]
    assert ids.tolist() == want and targets[targets != UNSEEN].tolist() == [1, 1, 0]
    ends = [at for at, target in enumerate(targets) if target != UNSEEN]
    assert [ids[at] for at in ends] == plain("\n") * 3 and ends[-1] == len(ids) - 1
    assert weights.tolist() == [float(t != UNSEEN) for t in targets] and made.supervised(0) == 3
    assert made.classes == ("wrong", "right") and made.counts["label wrong"] == 2
    assert [one.cluster for one in made.rows] == ["0", "x"]


def test_rows_are_laid_out_as_trl_did(tmp_path, tokenizer):
    """By its former process-reward trainer: prompt, then steps with the separator, a label at its last token."""
    made = read(tmp_path, [row(labels=(True, False, False))], tokenizer, Steps(separator=" <sep>\n"))
    between = tokenizer.encode(" <sep>\n", add_special_tokens=False)
    want = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    labels = [UNSEEN] * len(want)
    for step, label in zip(STEPS, (1, 0, 0), strict=True):
        tokens = tokenizer(step, add_special_tokens=False)["input_ids"] + between
        want, labels = want + tokens, labels + [UNSEEN] * (len(tokens) - 1) + [label]
    ids, targets, _ = made.sample(0)
    assert ids.tolist() == want and targets.tolist() == labels


def test_a_prompt_of_messages_ends_where_the_answer_begins(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "hello"}]
    made = read(tmp_path, [row(prompt=chat)], tokenizer)
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert made.sample(0)[0][: len(asked)].tolist() == asked


def test_numbers_are_right_from_the_threshold_on_and_null_is_nothing(tmp_path, tokenizer):
    made = read(tmp_path, [row(labels=(0.9, 0.4, None)), row(labels=(1, 0, -1))], tokenizer)
    assert made.class_of.tolist() == [1, 0, 1, 0, 0]
    made = read(tmp_path, [row(labels=(0.9, 0.4, None))], tokenizer, Steps(threshold=0.3))
    assert made.class_of.tolist() == [1, 1]


UNUSABLE = {
    "labels is not a list as long as completions": row(labels=(True,)),
    "a label is neither true nor false": row(labels=("yes", True, True)),
    "first is .*:1: a label is neither true nor false nor a number": row(labels=(10**400, True, True)),
    "completions is not a list of texts": row(steps=["a", " ", "b"]),
    "special-token text in completions": row(steps=["a", "b <|im_end|>", "c"]),
    "no prompt": row(prompt=" "),
    "prompt is not a list of messages": row(prompt=["hello"]),
    "no step with a label is left": row(labels=(None, None, None)),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_what_cannot_be_used_is_counted_by_its_reason(reason, tmp_path, tokenizer):
    with pytest.raises(DataError, match=reason):
        read(tmp_path, [UNUSABLE[reason]], tokenizer)


def test_too_long_a_row_loses_whole_steps_or_is_left_out(tmp_path, tokenizer):
    whole = read(tmp_path, [row()], tokenizer)
    size, ends = whole.length(0), [at for at, t in enumerate(whole.sample(0)[1]) if t != UNSEEN]
    cut = read(tmp_path, [row()], tokenizer, max_length=size - 1, overflow="truncate")
    assert cut.length(0) == ends[1] + 1 and cut.class_of.tolist() == [1, 1]
    assert cut.sample(0)[0].tolist() == whole.sample(0)[0][: ends[1] + 1].tolist()
    kept = read(tmp_path, [row(), row(steps=STEPS[:1], labels=(True,))], tokenizer, max_length=size - 1)
    assert len(kept) == 1 and kept.counts["overflow: drop"] == 1
    with pytest.raises(DataError, match="more than data.max_length"):
        read(tmp_path, [row()], tokenizer, max_length=size - 1, overflow="error")
    with pytest.raises(DataError, match="no step is left"):
        read(tmp_path, [row()], tokenizer, max_length=3, overflow="truncate")


def test_a_separator_that_is_no_token_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no token of the separator"):
        read(tmp_path, [row()], tokenizer, Steps(separator=""))
