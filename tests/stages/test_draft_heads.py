"""`kind: draft`, a head: it learns what its model says, goes on exactly, is refreshed, and is refused for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import Draft, run
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.errors import LlmkitError, ModelError, RecipeError
from llmkit.models import drafts
from llmkit.models.draft_files import load_head
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from tests.conftest import make_model, make_tokenizer

OWN = {"kind": "own", "sampling": {"max_tokens": 24, "ignore_eos": True}}
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")


def saved(folder: Path, seed: int, spread: float = 0.0) -> Path:
    """A model whose texts are not one word again and again."""
    model = make_model(seed, num_hidden_layers=3, tie_word_embeddings=False)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=made)
        model.lm_head.weight.mul_(4)
        if spread:
            noise = torch.Generator().manual_seed(seed + 1)
            for parameter in model.model.layers.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * spread)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), 0)


def head(model: Path, rows: Path, out: Path, take: int = 4, drafter: Any = None, **more: Any) -> Draft:
    source = {"kind": "jsonl", "path": str(rows), "take": take}
    options = {"data": {"train": [source], "valid": [source], "max_length": 96}, "batch": {"rows": 2}, "steps": 4}
    options |= {"optim": {"kind": "adamw", "lr": 1e-2}, "model": str(model), "out": str(out)}
    said = {"kind": "head", "vocabulary": 448, "depth": 3, "answers": OWN}
    return Draft(**(options | {"drafter": said | (drafter or {})} | more))


def go(node: Draft, **more: Any) -> Artifact:
    return run(node, console=Console(quiet=True), **more)


def lines(folder: Path, event: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found if not event or line["event"] == event]


def test_it_learns_by_heart_what_its_model_says(model: Path, rows: Path, tmp_path: Path) -> None:
    made = go(head(model, rows, tmp_path / "run", steps=100))
    before, after = lines(made.folder, "evaluate")
    assert before["valid.tokens_per_step"] < 1.5
    assert after["valid.tokens_per_step"] > 3.0  # of 4
    assert after["valid.right_1"] > 0.85
    assert after["valid.kept_1"] > 0.6 > before["valid.kept_1"]
    said = drafts.read(made.model(), "head", "path")
    assert said.target == drafts.identity(resolve(ModelRef(name=str(model))), make_tokenizer())
    loaded = load_head(made.model(), make_model(num_hidden_layers=3).get_input_embeddings())
    assert loaded.taps == (1, 2, 3)
    assert sorted(path.name for path in made.model().iterdir()) == ["draft.json", "model.safetensors"]
    assert not list(made.folder.glob("features*"))
    page = (made.folder / "report.html").read_text()
    assert "valid.right_3" in page
    assert "drafts that are right" in page


def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(model: Path, rows: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"checkpoint": {"every": 2, "keep": 9}, "evaluate": {"every": 2}}
    whole = go(head(model, rows, tmp_path / "whole", **more))
    again = tmp_path / "again"
    again.mkdir()
    for name in ("recipe.yaml", "resolved.yaml", "metrics.jsonl", "answers.data.train.jsonl"):
        if (whole.folder / name).exists():
            shutil.copy(whole.folder / name, again / name)
    shutil.copytree(whole.folder / "checkpoints/step-2", again / "checkpoints/step-2")
    made = go(head(model, rows, again, **more))
    assert lines(again) == lines(whole.folder)
    weights = [(one / "model/model.safetensors").read_bytes() for one in (made.folder, whole.folder)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16"])
def test_it_learns_the_answers_of_the_rows_where_they_are_given(
    precision: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    given = {"answers": "given", "loss": {"kind": "overlap"}, "taps": [2], "vocabulary": 40}
    made = go(head(model, rows, tmp_path / "run", drafter=given, steps=30, precision=precision))
    losses = [line["loss"] for line in lines(made.folder, "train")]
    assert losses[-1] < losses[0] - 0.1
    assert drafts.read(made.model(), "head", "path").settings["taps"] == [2]
    assert not list(made.folder.glob("answers*"))


def test_one_that_begins_from_another_is_refreshed(model: Path, rows: Path, tmp_path: Path) -> None:
    given = {"answers": "given"}  # the models are of random weights: of their own answers nothing would be left
    first = go(head(model, rows, tmp_path / "first", drafter=given, steps=40))
    tuned = saved(tmp_path / "tuned", 0, spread=0.003)
    start = {"start": str(first.folder), "vocabulary": 8192} | given
    made = go(head(tuned, rows, tmp_path / "again", drafter=start, steps=6))
    anew = go(head(tuned, rows, tmp_path / "anew", drafter=given, steps=6))
    again, afresh = ([line["valid.loss"] for line in lines(one.folder, "evaluate")] for one in (made, anew))
    assert again[0] < afresh[0] and again[1] < afresh[1]
    targets = [drafts.read(one.model(), "head", "path").target.files for one in (first, made)]
    assert targets[0] != targets[1]
    with pytest.raises(ModelError, match="was made for .*, and not for .*; fix: run kind: draft for it"):
        said, found = drafts.read(first.model(), "head", "path"), resolve(ModelRef(name=str(tuned)))
        drafts.check(first.model(), said, found, make_tokenizer(), "path")


def test_what_cannot_be_is_refused(model: Path, tiny: Path, rows: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": {"train": [{"kind": "jsonl", "path": str(rows)}], "packing": "none"}}, "learns from packed rows"),
        ({"drafter": {"start": "x", "taps": [1]}}, "drafter.taps: .*is that of the head"),
        ({"adapter": {"kind": "lora"}}, "adapter"),
    ]
    for more, why in cases:
        with pytest.raises(RecipeError, match=why):
            head(model, rows, tmp_path / "run", **more)
    with pytest.raises(RecipeError, match="7 is none of the model's 3 layers"):
        go(head(model, rows, tmp_path / "taps", drafter={"taps": [7], "answers": "given"}))
    with pytest.raises(LlmkitError, match=r"drafter.start: .* holds nothing that drafts"):
        go(head(model, rows, tmp_path / "none", drafter={"start": str(tiny), "vocabulary": 8192, "answers": "given"}))
