"""`kind: distill`: what a student learns of a teacher's laws and answers, and of its own; who may not teach it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmkit import Distill, Sft, run
from llmkit.core.artifact import Artifact
from llmkit.core.console import Console
from llmkit.core.errors import ModelError, RecipeError
from llmkit.models.outline import stored
from llmkit.stages.companions import companions
from tests.conftest import make_model, make_tokenizer
from tests.stages.test_sft import metrics

WORDS = ["hello", "world", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
MADE = {"kind": "teacher", "sampling": {"max_tokens": 12, "ignore_eos": True}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose law depends on its text."""
    folder = tmp_path_factory.mktemp("teacher")
    make_model(3, num_hidden_layers=2, initializer_range=0.15).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_model(4, num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "rows.jsonl"
    texts = [" ".join(WORDS[at % len(WORDS) :][: 1 + at % 3]) for at in range(12)]
    rows = [{"prompt": text, "completion": f" {WORDS[at % 7]} {WORDS[at % 4]}"} for at, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(model: Path, asked: Path, out: Path) -> dict[str, Any]:
    source = {"kind": "jsonl", "path": str(asked)}
    return {
        "model": str(model),
        "adapter": "none",
        "data": {"train": [source], "valid": [source], "max_length": 48},
        "batch": {"rows": 4},
        "steps": 6,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "evaluate": {"samples": 0},
        "out": str(out),
    }


def node(teacher: Path, model: Path, asked: Path, out: Path, **more: Any) -> Distill:
    return Distill(**({"teacher": str(teacher), **options(model, asked, out)} | more))


def go(stage: Any) -> Artifact:
    return run(stage, console=Console(quiet=True))


def figures(made: Artifact, name: str) -> list[float]:
    return [line[name] for line in metrics(made.folder) if name in line]


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "reverse, hot, mixed": {"loss": "reverse_kl", "temperature": 2.0, "cross_entropy": 0.2},
    "lora": {"adapter": {"kind": "lora", "rank": 4}, "loss": {"kind": "jsd", "beta": 0.3}},
    "cached": {"cached": {"top_k": 16}},
    "on policy": {"on_policy": 1.0, "sampling": {"temperature": 1.0, "max_tokens": 8}},
    "answers alone": {"answers": MADE, "cross_entropy": 1.0},
    "unpacked, quantised": {"teacher_quant": "bnb_nf4"},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_comes_near_and_loads_elsewhere(way: str, teacher: Path, small: Path, asked: Path, tmp_path: Path) -> None:
    more = dict(WAYS[way])
    if way.startswith("unpacked"):
        source = {"kind": "jsonl", "path": str(asked)}
        more["data"] = {"train": [source], "valid": [source], "max_length": 48, "packing": "none"}
    made = go(node(teacher, small, asked, tmp_path / "run", **more))
    first, *_, last = figures(made, "valid.loss")
    assert last < 0.98 * first
    if way != "answers alone":
        assert figures(made, "divergence") and figures(made, "nll")
    made.verify()
    if way != "lora":
        model = AutoModelForCausalLM.from_pretrained(made.model())
        assert model.config.num_hidden_layers == 1
    if way == "cached":
        assert {"teacher", "teacher.jsonl"} <= {path.name for path in made.folder.iterdir()}


def test_a_model_that_teaches_itself_has_nothing_to_learn(teacher: Path, asked: Path, tmp_path: Path) -> None:
    made = go(node(teacher, teacher, asked, tmp_path / "run", steps=2, optim={"kind": "sgd", "lr": 0.1}))
    assert max(map(abs, figures(made, "loss"))) < 1e-6
    assert max(figures(made, "grad_norm")) < 1e-5
    assert float(figures(made, "valid.divergence")[-1]) == pytest.approx(0.0, abs=1e-6)


def test_kept_laws_of_all_words_teach_as_the_teacher_itself_does(
    teacher: Path, small: Path, asked: Path, tmp_path: Path
) -> None:
    """And a start that finds them asks the teacher no more, which may be gone."""
    whole = go(node(teacher, small, asked, tmp_path / "whole", steps=3, loss="jsd", temperature=1.5))
    more: dict[str, Any] = {"cached": {"top_k": 448}, "steps": 3, "loss": "jsd", "temperature": 1.5}
    kept = go(node(teacher, small, asked, tmp_path / "kept", **more))
    assert figures(kept, "loss") == pytest.approx(figures(whole, "loss"), rel=1e-4)
    assert figures(kept, "valid.loss") == pytest.approx(figures(whole, "valid.loss"), rel=1e-4)
    some = go(node(teacher, small, asked, tmp_path / "some", **{**more, "cached": {"top_k": 4}}))
    assert figures(some, "valid.loss")[0] < figures(whole, "valid.loss")[0]


@pytest.mark.parametrize("way", ["cached", "on policy", "answers alone"])
def test_one_that_is_stopped_goes_on_to_the_bit(
    way: str, teacher: Path, small: Path, asked: Path, tmp_path: Path
) -> None:
    more = {**WAYS[way], "checkpoint": {"every": 2, "keep": 9}, "steps": 4}
    if way == "on policy":
        more["on_policy"] = 0.6
    stage = node(teacher, small, asked, tmp_path / "run", **more)
    whole = go(stage)
    before, lines = load_file(whole.model() / "model.safetensors"), metrics(whole.folder)
    shutil.rmtree(whole.folder / "checkpoints" / "step-4")
    (whole.folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 2}))
    (whole.folder / "manifest.json").unlink()
    shutil.rmtree(whole.model())
    again = go(stage)
    after = load_file(again.model() / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert metrics(again.folder) == lines


def test_steps_are_the_students_own_by_their_share(tmp_path: Path) -> None:
    from llmkit.inference.sampling import Sampling
    from llmkit.stages.sampled import Sampled

    feed: Any = None
    made = Sampled(feed, lambda _: [], 0.3, Sampling(), 48, 7)
    assert 0.25 < sum(map(made.own, range(2000))) / 2000 < 0.35
    other = Sampled(feed, lambda _: [], 0.3, Sampling(), 48, 8)
    assert [made.own(at) for at in range(50)] != [other.own(at) for at in range(50)]
    assert all(Sampled(feed, lambda _: [], 1.0, Sampling(), 48, 7).own(at) for at in range(500))


def test_who_has_other_tokens_does_not_teach(teacher: Path, small: Path, asked: Path, tmp_path: Path) -> None:
    wide = make_tokenizer()
    wide.add_tokens(["<new>"])
    shutil.copytree(teacher, tmp_path / "wide")
    wide.save_pretrained(tmp_path / "wide")
    why = r"teacher: .*wide has another tokenizer: 365 tokens, not 364; fix: name a teacher with the tokenizer of"
    with pytest.raises(ModelError, match=why):
        go(node(tmp_path / "wide", small, asked, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ModelError, match="teacher: "):
        go(node(tmp_path / "nobody", small, asked, tmp_path / "run"))


def test_a_teacher_that_changed_is_another_run(teacher: Path, small: Path, asked: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "one")
    stage = node(tmp_path / "one", small, asked, tmp_path / "run", steps=2)
    go(stage)
    make_model(9, num_hidden_layers=2).save_pretrained(tmp_path / "one")
    with pytest.raises(RecipeError, match="teacher.name: has changed since"):
        go(stage)


def test_the_account_has_both(teacher: Path, small: Path, asked: Path, tmp_path: Path) -> None:
    shape = stored(small)

    def beside(**more: Any) -> dict[str, int]:
        return companions(node(teacher, small, asked, tmp_path, **more), shape, "cpu", 1, 0)

    plain, short = beside(), beside(teacher_quant="bnb_nf4")
    assert plain == {"teacher": 4 * stored(teacher).params} and 0 < short["teacher"] < plain["teacher"]
    assert beside(cached={"top_k": 4}) == {} == beside(answers=MADE, cross_entropy=1.0)
    assert node(teacher, small, asked, tmp_path, answers=MADE, cross_entropy=1.0).cost(shape).more == 0
    assert node(teacher, small, asked, tmp_path).cost(shape).more > 0


def test_what_contradicts_is_refused(teacher: Path, small: Path, asked: Path, tmp_path: Path) -> None:
    for more, why in (
        ({"cached": {}, "on_policy": 0.5}, "on_policy: contradicts cached: what the student will sample"),
        ({"cross_entropy": 1.0}, "cross_entropy: contradicts answers: nothing of the teacher is learned"),
        ({"cross_entropy": 1.0, "answers": MADE, "cached": {}}, "cached: contradicts cross_entropy"),
        ({"loss": {"kind": "jsd", "beta": 1.0}}, "loss.beta"),
        ({"sampling": {"n": 2}}, "sampling.n: one answer"),
        ({"parallel": {"strategy": "fsdp"}}, "parallel.strategy: contradicts kind"),
        ({"model": {"name": str(small), "add_tokens": ["x"]}}, "model.add_tokens: contradicts teacher"),
    ):
        with pytest.raises(RecipeError, match=why):
            Distill(**({"teacher": str(teacher)} | options(small, asked, tmp_path) | more))


def chatter(seed: int, rows: int) -> str:
    """Rows of a language in which three words may follow each word, more or less often."""
    draw, made = Random(seed), []
    for _ in range(rows):
        at, said = draw.randrange(10), list[str]()
        for _ in range(9):
            said.append(WORDS[at])
            at = (3 * at + draw.choices((1, 4, 6), (0.6, 0.3, 0.1))[0]) % 10
        made.append({"prompt": said[0], "completion": " " + " ".join(said[1:])})
    return "".join(json.dumps(row) + "\n" for row in made)


def test_a_student_is_better_than_one_from_scratch(small: Path, tmp_path: Path) -> None:
    """Of a few rows, laws teach more than words alone: on other rows, of the same language."""
    sources = {}
    for name, seed, count in (("many", 1, 160), ("few", 2, 8), ("valid", 3, 48)):
        (tmp_path / f"{name}.jsonl").write_text(chatter(seed, count))
        sources[name] = [{"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")}]
    make_model(3, num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    more = {"data": {"train": sources["many"], "valid": sources["valid"], "max_length": 64}, "batch": {"rows": 16}}
    large = go(Sft(**(options(tmp_path / "large", tmp_path, tmp_path / "learned") | more | {"steps": 60})))
    few = {"data": {"train": sources["few"], "valid": sources["valid"], "max_length": 64}, "batch": {"rows": 8}}
    few |= {"steps": 60}
    taught = go(Distill(**({"teacher": str(large.folder)} | options(small, tmp_path, tmp_path / "taught") | few)))
    scratch = go(Sft(**(options(small, tmp_path, tmp_path / "scratch") | few)))
    student, alone = figures(taught, "valid.nll")[-1], min(figures(scratch, "valid.loss"))
    assert student < 0.9 * alone
