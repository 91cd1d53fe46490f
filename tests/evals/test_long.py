"""Long texts: perplexity by position, and one fact in a haystack."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError
from llmkit.data.node import Jsonl
from llmkit.evals import passkey as cells
from llmkit.evals.haystack import Haystacks, fact, sentences
from llmkit.evals.run import Subject, compare
from llmkit.evals.tasks import Passkey, PositionPerplexity, longest
from llmkit.evals.windows import whole
from llmkit.inference.generate import TransformersWriter
from llmkit.inference.request import Prompt
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import generate
from llmkit.models.attend import install
from llmkit.models.heads import Scored
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    made = make_model(initializer_range=0.3).eval()
    install(made, "sdpa")
    return made


def subject(model, packed=True, template=True):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if template else None
    quiet = Console(quiet=True)
    made = Subject(
        Scored(model),
        model,
        tokenizer,
        packed,
        "cpu",
        lambda: nullcontext(TransformersWriter(model, tokenizer)),
        quiet,
        lambda where: None,
    )
    return replace(made, tree=packed)


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    words = ["hello world", "the quick brown fox", "a model is trained", "one two three"]
    with path.open("w") as file:
        for i in range(5):
            text = " ".join(words[(i * j) % 4] for j in range(1, 12 + 12 * i))
            file.write(json.dumps({"text": text, "cluster": f"doc {i // 2}"}) + "\n")
    return (Jsonl(path=str(path)),)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["whole", "joined"])
def test_each_bucket_has_the_loss_of_its_positions(model, documents, kind, packed):
    seen = subject(model, packed)
    task = PositionPerplexity(data=documents, documents=kind, length=48, buckets=4)
    table, reports = task.run(seen)
    texts = [json.loads(line)["text"] for line in Path(documents[0].path).read_text().splitlines()]
    ids = [[*seen.tokenizer(text)["input_ids"], seen.tokenizer.eos_token_id] for text in texts]
    whole = [[token for part in ids for token in part]] if kind == "joined" else ids
    windows = [np.array(part[at : at + 48]) for part in whole for at in range(0, len(part) - 47, 48)]
    assert len(table) == 4 * len(windows) > 8
    with torch.no_grad():
        logps = [torch.log_softmax(model(input_ids=torch.tensor(w)[None]).logits[0], -1) for w in windows]
    nll = np.array([[-float(p[t - 1, w[t]]) for t in range(1, 48)] for p, w in zip(logps, windows, strict=True)])
    edges = [(0, 11), (11, 23), (23, 35), (35, 47)]  # positions 1-11, 12-23, ...: the first token has no prediction
    for place, (start, end) in enumerate(edges):
        report = reports[2 + place]
        assert report.slice == f"positions={12 * place}-{12 * place + 11}"
        assert report.value == pytest.approx(math.exp(nll[:, start:end].mean()), rel=1e-4)
        assert report.n == len(windows)
        assert report.low < report.value < report.high
    assert [r.metric for r in reports[:2]] == ["position_perplexity.bits_per_byte", "position_perplexity.perplexity"]
    assert reports[1].value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    if kind == "whole":
        assert {row.cluster_id for row in table} <= {"doc 0", "doc 1", "doc 2"}


def test_windows_may_be_few_and_documents_too_short(model, documents):
    task = PositionPerplexity(data=documents, length=48, buckets=4, rows=2)
    assert len(task.run(subject(model))[0]) == 8
    with pytest.raises(DataError, match=r"^tasks\.position_perplexity\.length: nothing has 4096 tokens; the longest"):
        replace(task, length=4096).run(subject(model))
    with pytest.raises(RecipeError, match=r"buckets: contradicts length: 48 positions"):
        replace(task, buckets=5)


def test_two_tables_are_compared_bucket_by_bucket(model, documents):
    task = PositionPerplexity(data=documents, documents="joined", length=48, buckets=2)
    other = make_model(seed=1, initializer_range=0.3).eval()
    install(other, "sdpa")
    (old, before), (new, after) = task.run(subject(model)), task.run(subject(other))
    found = {(r.metric, r.slice): r.value for r in compare(new, old)}
    values = [{(r.metric, r.slice): r.value for r in reports} for reports in (before, after)]
    for key in values[0]:
        assert found[key] == pytest.approx(values[1][key] - values[0][key])
    assert ("position_perplexity.perplexity", "positions=24-47") in found


@pytest.mark.parametrize("needle", ["number", "sentence"])
@pytest.mark.parametrize("template", [True, False])
def test_a_haystack_fits_its_length_and_hides_its_fact_at_its_depth(needle, template, model):
    tokenizer = subject(model, template=template).tokenizer
    hidden = fact(needle, 9, 3, 0)
    assert len(set(hidden.keys)) == 10 and hidden.keys[0] in hidden.needle
    made = Haystacks(tokenizer, hidden, 3, 0, 1024)
    places = []
    for length in (512, 1024):
        for depth in (0.0, 0.5, 1.0):
            asked = made.asked(length, depth, "tasks.x.lengths")
            longest_key = max(map(len, asked.keys))
            assert length - 40 < len(asked.prompt) + longest_key <= length
            text = tokenizer.decode(list(asked.prompt))
            assert text.count(hidden.needle) == 1 and text.rstrip().endswith(hidden.lead)
            places.append(text.index(hidden.needle) / len(text))
            for key, said in zip(asked.keys, hidden.keys, strict=True):
                assert tokenizer.decode([*asked.prompt, *key]).endswith(f"{hidden.lead} {said}")
    assert places[0] < 0.3 < places[1] < 0.7 < places[2]
    assert made.asked(512, 0.5, "") == Haystacks(tokenizer, hidden, 3, 0, 1024).asked(512, 0.5, "")
    assert fact(needle, 9, 3, 1) != hidden and sentences(3, 0, 5) == sentences(3, 0, 9)[:5] != sentences(3, 1, 5)
    assert not any(letter.isdigit() for text in sentences(3, 0, 200) for letter in text)
    with pytest.raises(RecipeError, match=r"^tasks\.x\.lengths: 40 tokens do not hold the question; fix: give \d"):
        made.asked(40, 0.5, "tasks.x.lengths")


@pytest.mark.parametrize("needle", ["number", "sentence"])
def test_marks_are_those_of_each_key_alone_with_and_without_shared_prefixes(needle, model):
    task = Passkey(needle=needle, lengths=(320,), depths=2, samples=2, distractors=4)
    whole, apart = task.run(subject(model)), task.run(subject(model, packed=False))
    for ours, theirs in zip(whole[0], apart[0], strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
        assert ours.prediction == theirs.prediction
    seen = subject(model)
    asked = Haystacks(seen.tokenizer, fact(needle, 4, 0, 0), 0, 0, 320).asked(320, 0.0, "")
    with torch.no_grad():
        for place, key in enumerate(asked.keys):
            ids = torch.tensor([[*asked.prompt, *key]])
            logps = torch.log_softmax(model(input_ids=ids).logits[0], -1)[len(asked.prompt) - 1 : -1]
            alone = float(logps.gather(1, torch.tensor(key)[:, None]).mean())
            assert whole[0][0].scores[f"choice_{place}"] == pytest.approx(alone, abs=1e-4)
    marks = [whole[0][0].scores[f"choice_{place}"] for place in range(5)]
    assert whole[0][0].scores["margin"] == pytest.approx(marks[0] - sum(marks[1:]) / 4)
    assert whole[0][0].scores["accuracy"] == float(marks[0] == max(marks))


def test_exact_match_is_what_greedy_decoding_writes(model):
    """Keys that the model writes itself, and keys that miss at each place: one forward tells what `generate` does."""
    seen = subject(model)
    asked = Haystacks(seen.tokenizer, fact("number", 2, 0, 0), 0, 0, 320).asked(320, 0.5, "")
    with seen.writer() as writer:
        made = generate(writer, [Prompt(tuple(asked.prompt))], Sampling(max_tokens=5))[0].token_ids
    for wrong in range(6):
        key = tuple((t + 1) % 440 if i == wrong else t for i, t in enumerate(made))
        with torch.no_grad():
            _, written = cells._branched(replace(asked, keys=(key, asked.keys[1])), seen)
        assert (tuple(written) == key) == (key == made)
        assert tuple(written) == made[: len(written)] and len(written) == min(wrong + 1, 5)


def test_every_cell_has_its_figures(model):
    task = Passkey(lengths=(256, 320), depths=3, samples=3, distractors=3)
    table, reports = task.run(subject(model))
    assert len(table) == 18 and cells.depths(task) == [0.0, 0.5, 1.0]
    slices = list(dict.fromkeys(report.slice for report in reports))
    assert slices[0] == "all" and len(slices) == 7
    assert slices[-1] == "length=320,depth=1"
    cell = [r.scores["margin"] for r in table if r.slices["length"] == "320" and r.slices["depth"] == "1"]
    assert reports[-1].value == pytest.approx(sum(cell) / 3) and reports[-1].n == 3
    assert longest(task) == ("lengths", 320)
    with pytest.raises(RecipeError, match="lengths"):
        Passkey(lengths=(256, 256))


class Largest(TorchDispatchMode):
    """Remembers the most numbers that one tensor held."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("kind", ["sdpa", "auto"])
def test_no_mask_is_square_and_no_more_than_a_block_of_logits_is_held(kind):
    length, words = 3072, 448
    model = make_model(max_position_embeddings=4096, head_dim=16).eval()
    install(model, kind)
    seen = subject(model)
    ids = np.arange(length) % words
    asked = Haystacks(seen.tokenizer, fact("number", 3, 0, 0), 0, 0, length).asked(length, 0.5, "")
    with torch.no_grad(), Largest() as window:
        seen.scored(whole(ids, seen))
    with torch.no_grad(), Largest() as keys:
        cells._branched(asked, seen)
    assert max(window.most, keys.most) < length * words / 2 < length * length
    with torch.no_grad(), Largest() as control:
        model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    assert control.most >= length * words
