"""`kind: draft`, a small model: it learns what the model says, drafts in the engine, and is refused for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkit import LLM, Draft, Sampling, run
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.errors import DataError, LlmkitError, ModelError, RecipeError
from llmkit.models import drafts
from llmkit.stages.draft_distilled import Distilled
from llmkit.stages.draft_students import leave
from tests.conftest import make_model, make_tokenizer
from tests.stages.test_sft import metrics

HOW = Sampling(max_tokens=24, ignore_eos=True)
SMALL = {"size": 1 << 22}
"""A cache of the default size takes a second to lay out."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose law depends on its text, and that is not to be had by one of its layers alone."""
    folder = tmp_path_factory.mktemp("teacher")
    make_model(3, num_hidden_layers=3, initializer_range=0.15).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "rows.jsonl"
    words = ["hello", "world", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    texts = [" ".join(words[at % len(words) :][: 1 + at % 3]) for at in range(16)]
    path.write_text("".join(json.dumps({"prompt": text, "completion": "x"}) + "\n" for text in texts))
    return path


def node(teacher: Path, asked: Path, out: Path, **more: Any) -> Draft:
    source = {"kind": "jsonl", "path": str(asked)}
    own = {"kind": "own", "sampling": {"max_tokens": 24, "ignore_eos": True}}
    options: dict[str, Any] = {
        "model": str(teacher),
        "drafter": {"kind": "distilled", "layers": 2, "answers": own},
        "data": {"train": [source], "valid": [source], "max_length": 64},
        "batch": {"rows": 4},
        "steps": 40,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "out": str(out),
    }
    return Draft(**(options | more))


def go(stage: Draft) -> Artifact:
    return run(stage, console=Console(quiet=True))


@pytest.fixture(scope="module")
def made(teacher: Path, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return go(node(teacher, asked, tmp_path_factory.mktemp("made") / "run"))


def with_(model: Path, drafter: Path) -> LLM:
    speculation = {"kind": "draft", "model": str(drafter), "tokens": 4, "width": 1, "fixed": True, "lookup": False}
    return LLM(str(model), generator={"kind": "engine", "cache": SMALL, "speculation": speculation})


def test_it_comes_near_and_leaves_a_folder_as_any(made: Artifact, teacher: Path) -> None:
    lines = metrics(made.folder)
    evaluated = [line for line in lines if line["event"] == "evaluate"]
    first, last = evaluated[0], evaluated[-1]
    assert last["valid.loss"] < 0.2 * first["valid.loss"]
    assert last["valid.kept_1"] > max(0.8, first["valid.kept_1"])
    assert last["valid.tokens_per_step"] > 1.3 * first["valid.tokens_per_step"]
    trained = [line for line in lines if line["event"] == "train"]
    assert trained[-1]["kept_1"] > trained[0]["kept_1"]
    said = json.loads((made.model() / "draft.json").read_text())
    assert (said["kind"], said["target"]["name"]) == ("distilled", str(teacher))
    assert said["settings"]["layers"] == 2
    assert {"model/draft.json", "model/model.safetensors", "model/tokenizer.json"} <= made.manifest["files"].keys()
    model = AutoModelForCausalLM.from_pretrained(made.model())
    assert model.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(made.model()).get_vocab()) == len(make_tokenizer().get_vocab())
    assert "kept_1" in (made.folder / "report.html").read_text()


def test_its_folder_is_seen_when_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, write = list[bool](), drafts.write
    monkeypatch.setattr(drafts, "identity", lambda *_: drafts.Target("", "", "", ""))
    monkeypatch.setattr(drafts, "write", lambda *given: (seen.append((tmp_path / "model").exists()), write(*given)))
    built: Any = SimpleNamespace(loaded=SimpleNamespace(resolved=None, tokenizer=None))
    leave(Distilled(), built, tmp_path / "model", lambda folder: make_tokenizer().save_pretrained(folder))
    assert seen == [False] and {"draft.json", "tokenizer.json"} <= {one.name for one in (tmp_path / "model").iterdir()}


def test_what_it_drafts_is_kept_as_often_as_was_measured(made: Artifact, teacher: Path, asked: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in asked.read_text().splitlines()]
    with with_(teacher, made.folder) as llm:
        said = llm.generate(prompts, HOW)
        stats = llm.engine.stats()
    lines = [json.loads(line) for line in (made.folder / "answers.data.train.jsonl").read_text().splitlines()[1:]]
    assert [list(one.token_ids) for one in said] == [line["ids"] for line in lines]  # those of the model alone
    measured = [line for line in metrics(made.folder) if line["event"] == "evaluate"][-1]
    right = [measured[f"valid.right_{at}"] for at in range(1, 5)]  # of a chain of six, without the ends of answers
    assert stats.accepted / (stats.drafted / 4) == pytest.approx(sum(right), rel=0.15)


def test_it_is_refused_for_another_model(made: Artifact, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "tuned")
    tensors = load_file(teacher / "model.safetensors")
    tensors[sorted(tensors)[0]].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    names = rf"speculation.model: .* was made for {teacher} \(\w+\), and not for {tmp_path}/tuned \(\w+\)"
    with pytest.raises(ModelError, match=names + "; fix: run kind: draft for it"):
        with_(tmp_path / "tuned", made.folder)


@pytest.mark.slow
def test_one_that_is_stopped_goes_on_to_the_bit(made: Artifact, teacher: Path, asked: Path, tmp_path: Path) -> None:
    """The answers that it made are there, and are not made again."""
    stage = node(teacher, asked, tmp_path / "run", checkpoint={"every": 20, "keep": 9})
    whole = go(stage)
    kept = (whole.folder / "answers.data.train.jsonl").read_bytes()
    before = load_file(whole.model() / "model.safetensors")
    for later in (40,):
        shutil.rmtree(whole.folder / "checkpoints" / f"step-{later}", ignore_errors=True)
    (whole.folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 20}))
    (whole.folder / "manifest.json").unlink()
    shutil.rmtree(whole.model())
    again = load_file(go(stage).model() / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert (whole.folder / "answers.data.train.jsonl").read_bytes() == kept
    first = load_file(made.model() / "model.safetensors")
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_a_given_one_goes_on_and_one_of_other_tokens_is_refused(
    made: Artifact, teacher: Path, asked: Path, tmp_path: Path
) -> None:
    own = {"kind": "own", "sampling": {"max_tokens": 24, "ignore_eos": True}}
    start = {"kind": "distilled", "start": str(made.folder), "answers": own}
    again = go(node(teacher, asked, tmp_path / "again", drafter=start, steps=1))
    first = next(line for line in metrics(again.folder) if line["event"] == "evaluate")
    last = [line for line in metrics(made.folder) if line["event"] == "evaluate"][-1]
    assert first["valid.loss"] == pytest.approx(last["valid.loss"], rel=1e-3)
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    shutil.copytree(made.model(), tmp_path / "wide")
    wide.save_pretrained(tmp_path / "wide")
    start["start"] = str(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"drafter.start: .* has another vocabulary: 365 tokens, not 364"):
        go(node(teacher, asked, tmp_path / "other", drafter=start, steps=1))
    assert not (tmp_path / "other" / "model").exists()


def test_what_contradicts_is_refused(teacher: Path, asked: Path, tmp_path: Path) -> None:
    source = {"kind": "jsonl", "path": str(asked)}
    for more, why in (
        ({"quant": "bnb_nf4"}, "quant.kind: contradicts kind: .* weights as they are; fix: drop quant"),
        ({"drafter": {"kind": "distilled", "layers": 2, "start": "x"}}, "drafter.layers: contradicts drafter.start"),
        ({"drafter": {"kind": "distilled", "layers": []}}, "drafter.layers: names no layer"),
        ({"drafter": {"kind": "distilled", "layers": [0, 0]}}, "drafter.layers: names a layer twice"),
        ({"data": {"train": [source], "packing": "none"}}, "data.packing: contradicts drafter.kind"),
    ):
        with pytest.raises(RecipeError, match=why):
            node(teacher, asked, tmp_path, **more)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="data.train: holds no rows"):
        go(node(teacher, tmp_path / "empty.jsonl", tmp_path / "run"))


def test_what_its_model_has_not_is_refused_before_anything_is_answered(
    teacher: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any) -> None:
        raise AssertionError("the model is asked")

    monkeypatch.setattr("llmkit.stages.answers.own_answers", answer)
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    shutil.copytree(teacher, tmp_path / "wide")
    wide.save_pretrained(tmp_path / "wide")
    for more, why in (
        ({"layers": 3}, "drafter.layers: 3 layers are not fewer than the 3 of the model"),
        ({"layers": [-1]}, "drafter.layers: -1 is none of the 3 layers of the model"),
        ({"width": 4096}, "drafter.width: 4096 is no width between"),
        ({"start": str(tmp_path / "wide")}, r"drafter.start: .* has another vocabulary: 365 tokens, not 364"),
        ({"kind": "head", "taps": [9]}, "drafter.taps: 9 is none of the model's 3 layers"),
    ):
        layers = {} if "start" in more or "kind" in more else {"layers": 2}
        stage = node(teacher, asked, tmp_path / "run", drafter={"kind": "distilled"} | layers | more)
        for refused in (lambda stage=stage: stage.needs("cpu"), lambda stage=stage: stage.drafter.fits(stage, True)):
            with pytest.raises(LlmkitError, match=why):
                refused()
