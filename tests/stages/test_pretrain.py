"""Continued pretraining, whole."""

import json
from pathlib import Path

import pytest

from llmkit import Pretrain, load_recipe, run
from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError
from tests.conftest import make_tokenizer
from tests.faults import in_child, killed_after


def pretrain(tiny, folder, out, **more):
    """A stage of 6 steps over 60 documents, some of which validate."""
    path = folder / "rows.jsonl"
    texts = [" ".join(["a model is trained on rows of text"] * (1 + i % 4)) + f" {i}" for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {
        "model": str(tiny),
        "adapter": {"kind": "none"},
        "data": {"train": [{"kind": "jsonl", "path": str(path)}], "held_out": {"share": 0.2}, "max_length": 48},
        "batch": {"rows": 4},
        "micro_batch": 2,
        "steps": 6,
        "optim": {"kind": "adamw", "lr": 1e-3},
        "evaluate": {"every": 3},
        "checkpoint": {"every": 2, "keep": 9},
        "out": str(out),
    }
    return Pretrain(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def lines(folder):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in timings} for line in kept]


@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_it_learns_and_goes_on_exactly_after_a_kill(documents, tiny, tmp_path):
    made = go(pretrain(tiny, tmp_path, tmp_path / "whole", documents=documents))
    whole = lines(tmp_path / "whole")
    evaluated = [line["valid.loss"] for line in whole if line["event"] == "evaluate"]
    assert len(evaluated) == 3 and evaluated[-1] < evaluated[0]
    assert made.manifest["kind"] == "pretrain" and "rows.jsonl" in made.manifest["data_files"]
    if documents == "joined":  # every chunk is full but the last
        assert sorted(line["tokens"] for line in whole if line["event"] == "train")[1:] == [4 * 48] * 5
    killed = pretrain(tiny, tmp_path, tmp_path / "killed", documents=documents)
    assert in_child(lambda: killed_after(4, lambda: go(killed))) == -9
    go(killed)
    assert lines(tmp_path / "killed") == whole


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    """A model of a family that brings its own attention."""
    from llmkit.models.families import tiny as family

    folder = tmp_path_factory.mktemp("falcon")
    model = family("Falcon")
    model.resize_token_embeddings(448)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_family_without_packing_takes_documents_joined(falcon, tmp_path):
    plain = {"kind": "none"}
    source = pretrain(falcon, tmp_path, tmp_path / "x").data
    data = {"train": source.train, "max_length": 48, "packing": plain}
    options = {"data": data, "evaluate": {}, "steps": 2}
    with pytest.raises(DataError, match="documents: FalconForCausalLM .*; fix: set documents=joined"):
        go(pretrain(falcon, tmp_path, tmp_path / "apart", **options))
    go(pretrain(falcon, tmp_path, tmp_path / "joined", documents="joined", **options))
    assert [line["step"] for line in lines(tmp_path / "joined") if line["event"] == "train"] == [1, 2]


def test_what_documents_have_no_use_for_is_refused(tiny, tmp_path):
    good = pretrain(tiny, tmp_path, tmp_path / "x")
    for key, value in (("train_on", "last"), ("overflow", "truncate")):
        data = {"train": good.data.train, "held_out": good.data.held_out, key: value}
        with pytest.raises(RecipeError, match=f"data.{key}: contradicts kind: pretraining learns every token"):
            pretrain(tiny, tmp_path, tmp_path / "x", data=data)
    with pytest.raises(RecipeError, match=r"evaluate.samples: contradicts kind: documents ask nothing"):
        pretrain(tiny, tmp_path, tmp_path / "x", evaluate={"samples": 2})


def test_the_shipped_recipe_reads_as_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2] / "recipes")
    ((_, node),) = load_recipe("pretrain/text.yaml").stages
    assert isinstance(node, Pretrain) and node.data.held_out.share == 0.02 and node.data.train[0].document == "file"
