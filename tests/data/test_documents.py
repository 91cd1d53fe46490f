"""Documents cut to chunks: nothing lost, nothing twice, and documents that are apart see nothing of one another."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.core.errors import DataError, ModelError
from llmkit.data.batches import micro_batches
from llmkit.data.documents import Cutter, chunked
from llmkit.data.node import Data, FirstFit, Jsonl, NoPacking, Text
from tests.conftest import make_model, make_tokenizer


def cut(documents, size, apart, pieces=1):
    """The chunks of documents, each of them handed over in so many pieces."""
    cutter, made = Cutter(size, apart), []
    for number, document in enumerate(documents):
        step = -(-len(document) // pieces)
        for at in range(0, len(document), step):
            made += cutter.add(np.array(document[at : at + step]), number, rest=at > 0)
    return made + list(cutter.end())


def segments(chunk):
    return [chunk.ids[a:b].tolist() for a, b in itertools.pairwise([0, *chunk.breaks, len(chunk.ids)])]


def learned(parts):
    """Each (token, its target) of stretches that see themselves alone."""
    return [pair for part in parts for pair in itertools.pairwise(part)]


@st.composite
def corpora(draw):
    """Documents of unlike tokens, of two at least: a token and the end."""
    lengths = draw(st.lists(st.integers(2, 23), min_size=1, max_size=12))
    ends = list(itertools.accumulate(lengths))
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


@settings(max_examples=200, deadline=None)
@given(corpora(), st.integers(2, 9), st.integers(1, 3))
@example([[0, 1], [2, 3], [4, 5]], 2, 1)
@example([[0, 1, 2, 3], [4, 5, 6, 7]], 4, 1)
def test_every_token_is_learned_once(documents, size, pieces):
    whole = list(itertools.chain(*documents))
    joined = cut(documents, size, apart=False, pieces=pieces)
    assert learned(chunk.ids.tolist() for chunk in joined) == learned([whole])
    assert all(len(chunk.ids) == size and not chunk.breaks for chunk in joined[:-1])
    assert 2 <= len(joined[-1].ids) <= size
    apart = cut(documents, size, apart=True, pieces=pieces)
    stretches = [part for chunk in apart for part in segments(chunk)]
    assert learned(stretches) == learned(documents) and min(map(len, stretches)) >= 2
    assert all(size - 1 <= len(chunk.ids) <= size for chunk in apart[:-1])
    assert all(chunk.ids[0] in documents[chunk.first] for chunk in joined + apart)


def corpus(tmp_path, texts, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Data(train=(Jsonl(path=str(path)),), **more)


TEXTS = [" ".join(["the quick brown fox"] * (1 + i % 5)) + f" {i}" for i in range(40)]


@pytest.mark.parametrize("apart", [True, False])
def test_documents_are_those_of_the_tokenizer_with_an_end(apart, tmp_path, tokenizer):
    data = corpus(tmp_path, TEXTS, max_length=48)
    made = chunked(data.train, data, tokenizer, apart)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    parts = [made.example(i)[0][a:b].tolist() for i in range(len(made)) for a, b in made.segments(i)]
    assert learned(parts) == learned(expected if apart else [list(itertools.chain(*expected))])
    assert made.counts["documents"] == len(TEXTS) == made.counts["rows"]
    assert made.counts["supervised tokens"] == len(learned(parts)) == sum(made.supervised(i) for i in range(len(made)))
    again = chunked(data.train, data, tokenizer, not apart)
    assert made.digest != again.digest


def test_a_document_in_pieces_is_one(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("the quick fox\n" * 50)
    (tmp_path / "b.txt").write_text("hello world\n" * 3)
    data = Data(train=(Text(path=str(tmp_path / "*.txt"), document="file"),), max_length=64)
    whole = chunked(data.train, data, tokenizer, True)
    monkeypatch.setattr("llmkit.data.text.PIECE", 100)
    pieces = chunked(data.train, data, tokenizer, True)
    assert (pieces.ids == whole.ids).all() and (pieces.breaks == whole.breaks).all()
    assert pieces.counts["rows"] > whole.counts["rows"] == 2 == pieces.counts["documents"]


def test_the_end_is_the_token_that_was_asked_for(tmp_path, tokenizer):
    data = corpus(tmp_path, TEXTS[:1])
    made = chunked(data.train, data, tokenizer, True, "<|endoftext|>")
    assert made.ids[-1] == 0
    with pytest.raises(ModelError, match="end: <end> is no special token .*; fix: set end to one of <|endoftext|>"):
        chunked(data.train, data, tokenizer, True, "<end>")
    bare = make_tokenizer()
    bare.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end token"):
        chunked(data.train, data, bare, True)


def test_unusable_rows_are_counted_and_too_few_chunks_are_an_error(tmp_path, tokenizer):
    data = corpus(tmp_path, [*TEXTS, " "], max_length=48)
    made = chunked(data.train, data, tokenizer, True)
    assert made.counts["unusable: text is blank"] == 1
    with pytest.raises(DataError, match=r"data\.train: \d+ chunks of 48 tokens do not fill one step of 1000"):
        chunked(data.train, data, tokenizer, True, least=1000)


@pytest.mark.parametrize("packing", [FirstFit(), NoPacking()])
def test_documents_apart_give_the_scores_and_gradients_that_each_gives_alone(packing, tmp_path, tokenizer):
    from llmkit.models.attend import install
    from llmkit.models.heads import Scored

    data = corpus(tmp_path, TEXTS[:9], max_length=32)
    made = chunked(data.train, data, tokenizer, True)
    assert len(made.breaks) > 3
    model = make_model().double()
    install(model, "auto")
    scored, chunks = Scored(model), range(len(made))

    def gradients(batches):
        model.zero_grad()
        total = sum((scored(batch) * batch.weights[batch.weights != 0]).sum() for batch in batches)
        total.backward()
        return total.item(), [p.grad.clone() for p in model.parameters()]

    together = gradients(micro_batches(made, chunks, packing, 32, 2, True, "cpu"))
    stretches = [(made.starts[i] + a, made.starts[i] + b) for i in chunks for a, b in made.segments(i)]
    alone = [
        type(made)(made.ids[a:b], made.weights[a:b], np.array([0, b - a], dtype=np.int64), ()) for a, b in stretches
    ]
    apart = gradients([micro_batches(one, [0], NoPacking(), 32, 1, True, "cpu")[0] for one in alone])
    assert together[0] == pytest.approx(apart[0], rel=1e-9)
    for ours, theirs in zip(together[1], apart[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    joined = chunked(data.train, data, tokenizer, False)
    other = gradients(micro_batches(joined, range(len(joined)), packing, 32, 2, True, "cpu"))
    assert other[0] != pytest.approx(together[0], rel=1e-4)  # the control: what is before does matter


def test_a_model_that_takes_no_contexts_is_not_given_documents_apart(tmp_path, tokenizer):
    data = corpus(tmp_path, TEXTS[:9], max_length=32)
    made = chunked(data.train, data, tokenizer, True)
    with pytest.raises(DataError, match="documents: the model cannot keep documents apart"):
        micro_batches(made, range(len(made)), NoPacking(), 32, 2, False, "cpu")
    joined = chunked(data.train, data, tokenizer, False)
    batches = micro_batches(joined, range(len(joined)), NoPacking(), 32, 2, False, "cpu")
    assert sum(int((batch.weights > 0).sum()) for batch in batches) == joined.counts["supervised tokens"]


def test_a_conversation_is_a_document_as_its_template_shows_it(tmp_path, tokenizer):
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(3)))
    data = Data(train=(Jsonl(path=str(path)),), lint={"level": "off"})
    made = chunked(data.train, data, tokenizer, True)
    shown = tokenizer.apply_chat_template(said, tokenize=False)
    assert tokenizer.decode(made.ids) == (shown + tokenizer.eos_token) * 3 and made.counts["documents"] == 3
    ended = make_tokenizer(tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>"))
    assert ended.decode(chunked(data.train, data, ended, True).ids) == shown.replace("<|im_end|>\n", "<|im_end|>") * 3


def test_copies_are_left_out_where_that_is_asked(tmp_path, tokenizer):
    data = corpus(tmp_path, TEXTS[:4] * 2, dedup={"kind": "exact"})
    made = chunked(data.train, data, tokenizer, True)
    assert made.counts["left out: removed copy"] == 4 and made.counts["documents"] == 4
