"""Multiple choice on a tiny model, against likelihoods by hand."""

import json

import pytest
import torch

from llmkit.core.errors import DataError
from llmkit.data.node import Jsonl
from llmkit.evals.tasks import MultipleChoice
from llmkit.models.attend import install
from tests.conftest import make_model, make_tokenizer
from tests.evals.test_evals import subject

CHOICES = ["fox", "lazy dog over", "x"]
GOOD = {"prompt": "a", "choices": CHOICES, "label": 0}
ASKED = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def model():
    made = make_model().eval()
    install(made, "sdpa")
    return made


def run(model, tmp_path, *rows, **more):
    path = tmp_path / "mc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MultipleChoice(data=(Jsonl(path=str(path)),), **more).run(subject(model))


def test_the_likeliest_choice_wins(model, tmp_path):
    rows = [{"prompt": f"hello {i}", "choices": CHOICES, "label": i % 3} for i in range(6)]
    table, (report,) = run(model, tmp_path, *rows, length="sum")
    for row in table:
        marks = [row.scores[f"choice_{k}"] for k in range(3)]
        assert row.prediction == CHOICES[marks.index(max(marks))]
        assert row.scores["accuracy"] == float(row.prediction == row.label)
    assert report.value == sum(row.scores["accuracy"] for row in table) / 6


@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_choice_s_mark_is_the_likelihood_of_what_it_says_without_an_end_token(prompt, model, tmp_path):
    tokenizer = make_tokenizer()
    ((row,), _) = run(model, tmp_path, {"prompt": prompt, "choices": CHOICES, "label": 0}, length="sum")
    asked = tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert row.text == (
        "hello"
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    )
    for k, choice in enumerate(CHOICES):
        said = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=torch.tensor([asked + said])).logits[0], -1)
        by_hand = sum(float(logps[len(asked) - 1 + i, token]) for i, token in enumerate(said))
        assert row.scores[f"choice_{k}"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"choices": ["b"]}, "choices is not a list of two or more"),
        ({"choices": ["b", " "]}, "a choice is blank or not text"),
        ({"label": True}, "label is no index of choices"),
        ({"label": 3}, "label is no index of choices"),
        ({"label": -1}, "label is no index of choices"),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": ["a"]}, "messages is not a list of messages"),
        ({"prompt": [{"role": "user"}]}, "content of user is null"),
        ({"prompt": [*ASKED, *ASKED]}, "roles in the wrong order"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt": ASKED, "tools": [{}]}, "the chat template does not show the row's tools"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_with_its_line_and_the_reason(row, why, model, tmp_path):
    with pytest.raises(DataError, match=rf"mc\.jsonl:2: needs `prompt`.*: {why}"):
        run(model, tmp_path, GOOD, GOOD | row)
