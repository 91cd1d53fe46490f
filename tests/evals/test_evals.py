"""Tasks on a tiny model: perplexity by hand, choices, and text that does not depend on its batch."""

import json
import math

import pytest
import torch

from llmkit.core.console import Console
from llmkit.core.errors import DataError
from llmkit.data.node import Data, Jsonl
from llmkit.data.prepare import prepare
from llmkit.evals.run import Subject, compare, losses
from llmkit.evals.tasks import Generation, MultipleChoice, Perplexity
from llmkit.inference.generate import generate
from llmkit.inference.node import Sampling, Transformers
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    made = make_model().eval()
    install(made, "sdpa")
    return made


def subject(model, packed=True):
    return Subject(
        Scored(model), model, make_tokenizer(), packed, "cpu", Transformers(), Console(quiet=True), lambda where: None
    )


def by_hand(model, tokenizer, text_ids, weights):
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=torch.tensor([text_ids])).logits[0], -1)
    return -sum(w * float(logps[i, t]) for i, (t, w) in enumerate(zip(text_ids[1:], weights[1:], strict=True)))


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_each_example_is_what_the_model_says(model, rows, packed):
    data = Data(train=(Jsonl(path=str(rows)),), max_length=96)
    prepared = prepare(data.train, data, make_tokenizer())
    nll, weight = losses(subject(model, packed), prepared, range(9), 96)
    for i in range(9):
        ids, weights = (part.tolist() for part in prepared.example(i))
        assert nll[i] == pytest.approx(by_hand(model, None, ids, weights), rel=1e-5)
        assert weight[i] == sum(weights[1:])


def test_perplexity_is_the_exponential_of_the_mean(model, rows):
    table, reports = Perplexity(data=(Jsonl(path=str(rows)),)).run(subject(model))
    total, tokens = (sum(row.scores[key] for row in table) for key in ("nll", "tokens"))
    assert reports[0].value == pytest.approx(math.exp(total / tokens))
    assert reports[0].low < reports[0].value < reports[0].high
    assert [report.metric for report in reports] == ["perplexity.perplexity", "perplexity.bits_per_byte"]


def test_generation_scores_against_the_reference(model, rows):
    table, reports = Generation(data=(Jsonl(path=str(rows)),), rows=3, max_tokens=4).run(subject(model))
    assert len(table) == 3 and {r.metric.split(".")[1] for r in reports} == {
        "exact_match",
        "rouge_1",
        "rouge_2",
        "rouge_l",
    }
    assert compare(table, table)[0].value == 0.0
    with pytest.raises(DataError, match="not of the same examples"):
        compare(table, table[:2])


def test_exact_match_compares_what_is_extracted():
    from llmkit.evals.run import _scores

    pattern = r"#### (-?\d+)"
    assert _scores("so\n#### 42", "thus #### 7, no: #### 42", pattern)["exact_match"] == 1.0
    assert _scores("#### 42", "#### 43", pattern)["exact_match"] == 0.0
    assert _scores("the fox runs", "the fox  runs", None)["exact_match"] == 1.0
    assert _scores("the fox runs", "the fox runs", None)["rouge_l"] == 1.0


def test_the_likeliest_choice_wins_and_bad_rows_are_named(model, tmp_path):
    path = tmp_path / "mc.jsonl"
    choices = ["fox", "lazy dog over", "x"]
    path.write_text(
        "".join(json.dumps({"prompt": f"hello {i}", "choices": choices, "label": i % 3}) + "\n" for i in range(6))
    )
    table, (report,) = MultipleChoice(data=(Jsonl(path=str(path)),), length="sum").run(subject(model))
    for row in table:
        marks = [row.scores[f"choice_{k}"] for k in range(3)]
        assert row.prediction == choices[marks.index(max(marks))]
        assert row.scores["accuracy"] == float(row.prediction == row.label)
    assert report.value == sum(row.scores["accuracy"] for row in table) / 6
    path.write_text('{"prompt": "a", "choices": ["b"], "label": 0}\n')
    with pytest.raises(DataError, match=r"mc\.jsonl:1: needs `prompt`"):
        MultipleChoice(data=(Jsonl(path=str(path)),)).run(subject(model))


def test_greedy_text_does_not_depend_on_its_batch_and_samples_repeat(model):
    tokenizer = make_tokenizer()
    prompts = ["hello world", "the quick brown fox jumps", "a", [{"role": "user", "content": "hi"}]]
    together = generate(model, tokenizer, prompts, Sampling(max_tokens=6), batch=4)
    alone = [generate(model, tokenizer, [p], Sampling(max_tokens=6))[0] for p in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    drawn = Sampling(max_tokens=6, temperature=1.0, top_k=20, seed=3)
    assert generate(model, tokenizer, prompts, drawn) == generate(model, tokenizer, prompts, drawn)


def test_a_broken_pattern_is_a_recipe_error():
    from llmkit.core.errors import RecipeError

    with pytest.raises(RecipeError, match="extract"):
        Generation(data=(Jsonl(path="x"),), extract="(")
