"""`kind: draft`, a corpus: what it leaves, that it drafts in the engine, and that it is refused for another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmkit import LLM, Draft, Sampling, run
from llmkit.build.cache import Caches, measured
from llmkit.build.drafting import Drafting
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.errors import DataError, ModelError, RecipeError
from llmkit.inference.cache import Cache
from llmkit.inference.speculation.corpus import Corpus
from llmkit.inference.speculation.ngram import Lookup
from llmkit.models.decoder import Decoder
from llmkit.models.load import Loaded
from llmkit.models.node import ModelRef
from llmkit.models.probe import Support
from llmkit.models.resolve import resolve
from llmkit.models.tokenizer import read_tokenizer
from tests.conftest import make_model, make_tokenizer

HOW = Sampling(max_tokens=24, temperature=0.7, seed=5, ignore_eos=True)
SMALL = {"size": 1 << 22}
"""A cache of the default size takes a second to lay out."""


def draft(tiny: Path, rows: Path, out: Path, **more: Any) -> Draft:
    source = {"kind": "jsonl", "path": str(rows)}
    data = {"train": [source], "valid": [source]}
    return Draft(**{"model": str(tiny), "data": data, "drafter": {"kind": "ngram"}, "out": str(out)} | more)


def go(node: Draft) -> Artifact:
    return run(node, console=Console(quiet=True))


@pytest.fixture(scope="module")
def corpus(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over texts that the model itself says."""
    place = tmp_path_factory.mktemp("corpus")
    asked = [{"prompt": text, "completion": "x"} for text in ("hello world", "the quick", "a model is", "rows of text")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    own = {"kind": "own", "sampling": {"max_tokens": 24, "ignore_eos": True, "temperature": 0.7, "seed": 5}}
    return go(draft(tiny, place / "rows.jsonl", place / "run", drafter={"kind": "ngram", "answers": own})).folder


def with_(model: Path, **speculation: Any) -> LLM:
    return LLM(
        str(model),
        generator={"kind": "engine", "cache": SMALL, "speculation": {"kind": "ngram", "tokens": 6} | speculation},
    )


def test_what_it_leaves(tiny: Path, rows: Path, tmp_path: Path) -> None:
    made = go(draft(tiny, rows, tmp_path / "run"))
    said = json.loads((made.model() / "draft.json").read_text())
    manifest = made.manifest
    assert (said["version"], said["kind"], said["target"]["name"]) == (1, "ngram", str(tiny))
    assert manifest["kind"] == "draft"
    assert {"model/draft.json", "model/backwards.npy", "model/order.npy", "report.html"} <= manifest["files"].keys()
    settings = said["settings"]
    assert settings["tokens"] == manifest["counts"]["tokens"] + 24  # and the mark after each text
    assert settings["bytes"] == 6 * settings["tokens"]
    sizes = sum((made.model() / name).stat().st_size for name in ("backwards.npy", "order.npy"))
    assert sizes - 256 == settings["bytes"]  # but for the two headers
    figures = [json.loads(line) for line in (made.folder / "evals.jsonl").read_text().splitlines()]
    assert [one["metric"] for one in figures] == ["tokens_per_step"]
    assert figures[0]["value"] > 4  # of texts that it has seen, at eight drafts
    assert "tokens_per_step" in (made.folder / "report.html").read_text()


def test_it_drafts_what_was_said_before_and_changes_no_text(tiny: Path, corpus: Path) -> None:
    prompts = ["hello world", "the quick", "a model is", "rows of text"]
    with LLM(str(tiny), generator={"kind": "engine", "cache": SMALL}) as llm:
        plain = [llm.generate([prompt], HOW) for prompt in prompts]
    with with_(tiny, fixed=True, recycle=0) as llm:
        assert [llm.generate([prompt], HOW) for prompt in prompts] == plain
        alone = llm.engine.stats()
    with with_(tiny, fixed=True, recycle=0, corpus=str(corpus)) as llm:
        assert [llm.generate([prompt], HOW) for prompt in prompts] == plain
        stats = llm.engine.stats()
        assert stats.accepted > 0.7 * stats.drafted > alone.accepted
        assert stats.steps < stats.made / 3


def making(folder: Path) -> Drafting:
    """What makes drafters for the model of a folder."""
    ref = ModelRef(name=str(folder))
    resolved, kept = resolve(ref), make_model()
    loaded = Loaded(kept, read_tokenizer(resolved, ref), "", Support(True, True, True), resolved)
    return Drafting(Decoder(kept), loaded, Caches(measured(Decoder(kept), Cache()), Cache(), most=64))


def test_another_model_is_refused(tiny: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    own = Lookup(448)
    assert making(tmp_path / "copy").retrieved(str(corpus), own).classes > own.classes
    tensors = load_file(tiny / "model.safetensors")
    tensors[sorted(tensors)[-1]].view(-1)[0] += 1e-3
    shutil.copytree(tiny, tmp_path / "tuned")
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    names = rf"speculation.corpus: .* was made for {tiny} \(\w+\), and not for {tmp_path}/tuned \(\w+\)"
    with pytest.raises(ModelError, match=names + "; fix: run kind: draft for it"):
        with_(tmp_path / "tuned", corpus=str(corpus))
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    wide.save_pretrained(tmp_path / "copy")
    with pytest.raises(ModelError, match="whose tokens are others than those of"):
        making(tmp_path / "copy").retrieved(str(corpus), own)


def test_what_is_no_corpus_is_refused(tiny: Path, corpus: Path, tmp_path: Path) -> None:
    made, own = making(tiny), Lookup(448)
    with pytest.raises(ModelError, match=r"holds nothing that drafts; fix: give a folder that kind: draft made"):
        made.retrieved(str(tiny), own)
    with pytest.raises(ModelError, match=r"nowhere holds nothing that drafts: it is no folder"):
        made.retrieved(str(tmp_path / "nowhere"), own)
    shutil.copytree(corpus, tmp_path / "changed")
    with (tmp_path / "changed" / "model" / "order.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ModelError, match="has changed since the run ended"):
        made.retrieved(str(tmp_path / "changed"), own)
    with pytest.raises(ModelError, match="its corpus names places that it has not"):
        made.retrieved(str(tmp_path / "changed" / "model"), own)
    with pytest.raises(ModelError, match="cannot be read"):
        Corpus.load(tmp_path, {})


def test_a_recipe_that_asks_a_corpus_to_be_trained_is_refused(tiny: Path, rows: Path, tmp_path: Path) -> None:
    for more, why in (
        ({"steps": 3}, "steps: contradicts drafter.kind: drafter ngram trains nothing; fix: drop steps"),
        ({"optim": {"kind": "adamw", "lr": 1.0}}, "optim: contradicts drafter.kind: drafter ngram trains nothing"),
        (
            {"adapter": {"kind": "lora"}},
            "adapter: contradicts kind: what drafts is made by one process",
        ),
    ):
        with pytest.raises(RecipeError, match=why):
            draft(tiny, rows, tmp_path, **more)
    data = {"train": [{"kind": "jsonl", "path": str(rows)}], "max_length": 64}
    with pytest.raises(RecipeError, match="data.max_length: contradicts .* texts of a corpus have any length"):
        draft(tiny, rows, tmp_path, data=data)


def test_no_rows_make_no_corpus(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"data.train: holds no rows"):
        go(draft(tiny, tmp_path / "empty.jsonl", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
