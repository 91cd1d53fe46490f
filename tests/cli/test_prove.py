"""`llmkit prove recipe`: it finds what agrees, and what does not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llmkit.cli import prove
from llmkit.cli.prove import Way, ways
from llmkit.core.errors import RecipeError
from tests.distributed import sft

RECIPE = """
kind: sft
model: {model}
adapter: {{kind: lora, rank: 4, dropout: 0.1}}
data: {{train: [{{kind: jsonl, path: {rows}}}], valid: [{{kind: jsonl, path: {rows}}}], max_length: 64}}
batch: {{rows: 12}}
epochs: 2
out: {out}
"""


@pytest.fixture
def recipe(tiny, rows, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(model=tiny, rows=rows, out=tmp_path / "out"))
    return path


def stood_in(monkeypatch, wrong=()):
    """Runs that come to the same, but for those of `wrong`; what each was told."""
    told = []

    def run(path, overrides, way, folder):
        made, off = folder / f"{way.ranks}-{way.micro_batch}", 1 + 1e-4 * (way in wrong)
        (made / "model").mkdir(parents=True)
        told.append((way, overrides))
        line = {"event": "train", "loss": 2.0 * off, "grad_norm": 1.0}
        (made / "metrics.jsonl").write_text("\n".join(map(json.dumps, [{"event": "evaluate"}, line, line])))
        save_file({"w": torch.ones(3) * off}, made / "model" / "model.safetensors")
        return made

    monkeypatch.setattr(prove, "_run", run)
    return told


def test_ways_that_agree_and_one_that_does_not(recipe, monkeypatch, capsys):
    told = stood_in(monkeypatch)
    assert prove.recipe(str(recipe), [], 2, 2, False) == 0
    assert "5 ways to cut up a step agree: 0.0e+00 at most" in capsys.readouterr().out
    assert {"epochs=null", "steps=2", "adapter.dropout=0", "evaluate.rows=1"} <= set(told[0][1])
    stood_in(monkeypatch, [Way(2, 1)])
    assert prove.recipe(str(recipe), [], 2, 2, True) == 6
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not said["agreed"] and [way["gap"] > 1e-5 for way in said["ways"]].count(True) == 1


def test_the_ways_are_those_that_fit(tiny, rows, tmp_path):
    found = ways(sft(tiny, rows, tmp_path), 4)
    assert found[0] == Way(1, 4) and {way.ranks for way in found} == {1, 2, 4}
    assert {way.micro_batch for way in ways(sft(tiny, rows, tmp_path, batch={"rows": 1}), 2)} == {1}


def test_a_cut_recipe_is_not_run_on_ranks_that_it_does_not_go_with(tiny, rows, tmp_path):
    assert {way.ranks for way in ways(sft(tiny, rows, tmp_path, parallel={"shard": 2, "strategy": "fsdp"}), 4)} == {
        2,
        4,
    }
    assert {way.ranks for way in ways(sft(tiny, rows, tmp_path, parallel={"tensor": 4}), 8)} == {4, 8}
    assert not ways(sft(tiny, rows, tmp_path, parallel={"tensor": 4}), 2)


def test_nothing_that_is_compared_proves_nothing(recipe, monkeypatch):
    stood_in(monkeypatch)
    with pytest.raises(RecipeError, match="up to 2 ranks there are 0 ways .*; fix: give more --ranks"):
        prove.recipe(str(recipe), ["parallel.tensor=4", "adapter.dropout=0"], 2, 2, False)


@pytest.mark.parametrize("at", [0, 1])
def test_what_is_no_number_does_not_agree(at, tmp_path):
    for name, losses in (("a", ["1.0", "1.0"]), ("b", ["NaN" if at == n else "1.0" for n in range(2)])):
        (tmp_path / name / "model").mkdir(parents=True)
        lines = [f'{{"event": "train", "loss": {loss}, "grad_norm": 1.0}}' for loss in losses]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        save_file({"w": torch.ones(1)}, tmp_path / name / "model" / "model.safetensors")
    assert prove._seen(Way(2, 1), tmp_path / "b", tmp_path / "a").gap == float("inf")


def test_a_pipeline_is_refused(recipe, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        f"out: {tmp_path / 'o'}\nstages:\n  - {{name: a, extends: r.yaml}}\n  - {{name: b, extends: r.yaml}}\n"
    )
    with pytest.raises(RecipeError):
        prove.recipe(str(path), [], 2, 2, False)


@pytest.mark.slow
def test_real_runs_agree(recipe, capsys):
    assert prove.recipe(str(recipe), [], 2, 2, False) == 0
    assert "ways to cut up a step agree" in capsys.readouterr().out
