"""`LLM` with each that drafts: the same text, sooner; and what cannot draft is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llmkit.build.llm import LLM
from llmkit.build.opened import Opened
from llmkit.build.opening import load
from llmkit.cli.flags import speculation_of
from llmkit.cli.serve import _node
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.node import OwnEngine
from llmkit.inference.sampling import Sampling
from llmkit.inference.speculation.node import DraftModel, Ngram
from llmkit.models.draft_files import save_head
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.drafts import identity
from llmkit.models.load import How
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
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
    draft, early = {"kind": "draft", "model": str(tiny)}, {"kind": "early_exit", "layers": 1}
    alone: dict[str, Any] = {"lookup": False, "width": 1}
    for speculation in ({"kind": "ngram"}, {"kind": "ngram", "recycle": 0}, draft, draft | alone, early, early | alone):
        with with_(tiny, **speculation) as llm:
            assert [llm.generate(TEXTS, how) for how in WAYS] == plain, speculation
            stats = llm.engine.stats()
            assert 0 < stats.accepted <= stats.drafted and stats.steps < stats.made / 2, speculation
            if speculation == draft | alone:  # it drafts for itself: what it says is always right
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


def headed(tiny: Any, folder: Any) -> str:
    """A head for the tiny model that nobody trained."""
    loaded = load(resolve(ModelRef(name=str(tiny))), ModelRef(name=str(tiny)), How("cpu"))
    head = DraftHead(shape_for(loaded.model, 100), loaded.model.get_input_embeddings())
    save_head(head, folder, identity(loaded.resolved, loaded.tokenizer))
    return str(folder)


def test_a_head_leaves_the_text_as_it_is(tiny: Any, plain: list[Any], tmp_path: Any) -> None:
    with with_(tiny, kind="head", path=headed(tiny, tmp_path / "head")) as llm:
        assert [llm.generate(TEXTS, how) for how in WAYS] == plain
        assert llm.engine.stats().drafted > 100


def test_a_head_of_another_model_is_refused(tiny: Any, tmp_path: Any) -> None:
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    path = headed(tiny, tmp_path / "head")
    with pytest.raises(ModelError, match="was made for .* run kind: draft with drafter.start to refresh it"):
        with_(tmp_path / "other", kind="head", path=path)
    with pytest.raises(ModelError, match="holds nothing that drafts"):
        with_(tiny, kind="head", path=str(tiny))


def test_an_llm_takes_who_drafts_in_short(tiny: Any, plain: list[Any]) -> None:
    with LLM(str(tiny), speculation={"early_exit": 1, "tokens": 3}) as llm:
        assert llm.generate(TEXTS, WAYS[0]) == plain[0]
        assert llm.engine.speculator is not None and llm.engine.speculator.sources[-1].most == 3
    twice = Opened(model="m", generator={"kind": "engine", "speculation": "ngram"}, speculation="ngram")
    assert twice.made.speculation == Opened(model="m", speculation={"ngram": None}).made.speculation == Ngram()
    assert Opened(model="m", speculation={"draft": "n"}).made.speculation == DraftModel(model="n")


WRONG = {
    "oracle": "speculation: 'oracle' is no kind of speculation; fix: use ngram",
    "draft": "speculation.model: is missing; fix: add model",
    "early_exit": "speculation.layers: is missing; fix: add layers",
}


@pytest.mark.parametrize(
    ("speculation", "more", "why"),
    [
        *((name, {}, why) for name, why in WRONG.items()),
        ({"draft": ""}, {}, "speculation.model: is empty"),
        ({"draft": "a", "model": "b"}, {}, "speculation.kind: is missing"),
        ({"early_exit": -1}, {}, "speculation.layers: -1 is out of range; fix: give a value at least 1"),
        ({"kind": "ngram", "tokens": 64}, {}, "speculation.tokens: 64 is out of range; fix: give a value at most 63"),
        ({"ngram": "f", "drafts": 3}, {}, "speculation.drafts: unknown key"),
        (4, {}, "speculation: 4 is not ngram"),
        ("ngram", {"generator": "transformers"}, "contradicts generator: generator transformers has no speculation"),
        ("ngram", {"generator": {"kind": "engine", "speculation": {"early_exit": 1}}}, "has another speculation"),
        ({"early_exit": 1}, {"tensor": 2}, "contradicts tensor: early_exit runs layers of which each of 2 processes"),
    ],
)
def test_what_drafts_is_refused_before_the_model_is_read(speculation: Any, more: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(why)):
        LLM("/nowhere", speculation=speculation, **more)


def test_a_model_that_is_not_there_cannot_draft(tiny: Any, tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"speculation.model: .*nowhere is no alias"):
        LLM(str(tiny), speculation={"draft": str(tmp_path / "nowhere")})


def test_what_drafts_reads_as_a_flag_of_one_word() -> None:
    known = {
        "ngram": {"kind": "ngram"},
        "ngram:some/folder": {"kind": "ngram", "corpus": "some/folder"},
        "draft:/a/b: c": {"kind": "draft", "model": "/a/b: c"},
        "early_exit:8": {"kind": "early_exit", "layers": 8},
        "{draft: m, tokens: 2}": {"kind": "draft", "model": "m", "tokens": 2},
    }
    for said, meant in known.items():
        assert OwnEngine(speculation=speculation_of(said)) == OwnEngine(speculation=meant), said
    assert OwnEngine(speculation=speculation_of("null")).speculation is None
    for said, why in (("foo:1", "foo is no kind"), ("early_exit:x", "x is not a whole number"), ("draft:", "is empty")):
        with pytest.raises(RecipeError, match=why):
            OwnEngine(speculation=speculation_of(said))


def test_a_flag_of_the_server_takes_the_place_of_its_recipe_s(tmp_path: Any) -> None:
    recipe = tmp_path / "serve.yaml"
    recipe.write_text("kind: serve\nmodel: m\nout: o\nengine: {speculation: {kind: ngram, tokens: 3}}\n")
    for path in ("", str(recipe)):
        for said in ("draft:other", "early_exit:2", "ngram", "null"):
            node = _node("m", path, {"engine.speculation": speculation_of(said)} | ({} if path else {"out": "o"}))
            assert node.engine.speculation == OwnEngine(speculation=speculation_of(said)).speculation, said
    assert _node("m", str(recipe), {}).engine.speculation == Ngram(tokens=3)


@pytest.mark.parametrize("kind", ["draft", "early_exit", "head"])
def test_the_size_of_the_cache_is_given_once(kind: str, tiny: Any, tmp_path: Any) -> None:
    """A drafter's cache is of the same budget as the model's."""
    own = {"draft": {"model": str(tiny)}, "early_exit": {"layers": 1}}.get(kind) or {"path": headed(tiny, tmp_path)}
    cache = {"size": 1 << 20, "block": 4}
    given = {"kind": "engine", "cache": cache, "speculation": {"kind": kind, **own}}
    with LLM(str(tiny), generator=given) as llm:
        drafter: Any = llm.engine.speculator.sources[1].drafter
        stores = [llm.engine.runner.store, drafter.store]
        assert sum(sum(store.bytes.values()) for store in stores) <= 1 << 20
        assert stores[0].blocks == stores[1].blocks == llm.engine.scheduler.blocks.count


def test_what_says_no_more_than_half_is_refused() -> None:
    for said, why in (
        ("", "--speculation: is empty"),
        (" ", "--speculation: is empty"),
        ("ngram:", "--speculation: ngram: is empty after its colon"),
        ("{head: null}", "path: is missing; fix: add path"),
    ):
        with pytest.raises(RecipeError, match=why):
            OwnEngine(speculation=speculation_of(said))


def test_in_a_recipe_the_short_way_of_the_command_line_is_told_as_a_mapping() -> None:
    with pytest.raises(
        RecipeError, match=r"'head:runs/head' is no kind of speculation; fix: write \{head: runs/head\}"
    ):
        OwnEngine(speculation="head:runs/head")
