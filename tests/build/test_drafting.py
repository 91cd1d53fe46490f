"""`LLM` with each that drafts: the same text, sooner; and what cannot draft is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.build.llm import LLM
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.sampling import Sampling
from tests.conftest import make_model, make_tokenizer

TEXTS = ["hello world hello world hello", "the quick brown fox", "a", "rows of text and rows of text and"]
WAYS = (Sampling(max_tokens=24), Sampling(max_tokens=24, temperature=0.8, seed=2, logprobs=2))


@pytest.fixture(scope="module")
def plain(tiny: Any) -> list[Any]:
    with LLM(str(tiny)) as llm:
        return [llm.generate(TEXTS, how) for how in WAYS]


def with_(tiny: Any, **speculation: Any) -> LLM:
    return LLM(str(tiny), generator={"kind": "engine", "speculation": {"tokens": 4, "fixed": True} | speculation})


def test_all_that_draft_leave_the_text_as_it_is(tiny: Any, plain: list[Any]) -> None:
    for speculation in ({"kind": "ngram"}, {"kind": "draft", "model": str(tiny)}, {"kind": "early_exit", "layers": 1}):
        with with_(tiny, **speculation) as llm:
            assert [llm.generate(TEXTS, how) for how in WAYS] == plain, speculation
            stats = llm.engine.stats()
            assert 0 < stats.accepted <= stats.drafted and stats.steps < stats.made / 2, speculation
            if speculation["kind"] == "draft":  # it drafts for itself: what it says is always right
                assert stats.accepted >= 0.9 * stats.drafted


def test_who_cannot_draft_is_refused_by_name(tiny: Any, tmp_path: Any) -> None:
    make_model(vocab_size=500).save_pretrained(tmp_path / "other")
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    wide.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="has another vocabulary: 365 tokens, not 364; fix: name a model of the same"):
        with_(tiny, kind="draft", model=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"2 layers are not fewer than the 2 of the model; fix: give 1 to 1"):
        with_(tiny, kind="early_exit", layers=2)
    with pytest.raises(RecipeError, match="speculation"):
        with_(tiny, kind="oracle")
