"""Whole stages of reward models on tiny models: they learn, and plain libraries give the same scores."""

import json
import signal

import numpy as np
import pytest
import torch

from llmkit import Evaluate, Merge, Reward, run
from llmkit.core.console import Console
from llmkit.core.errors import DataError, ModelError, RecipeError
from tests import faults

FILLERS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]


def said(dice, word):
    words = dice.choice(FILLERS, dice.integers(1, 9)).tolist()
    words.insert(int(dice.integers(0, len(words) + 1)), word)
    return " ".join(words)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Conversations of which the answer with `dog` is the better one; a half of them has a margin."""
    path, dice = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(32):
            asked = [{"role": "user", "content": f"{said(dice, 'hello')} {i}"}]
            sides = [[{"role": "assistant", "content": said(dice, word)}] for word in ("dog", "brown")]
            row = {"prompt": asked, "chosen": sides[0], "rejected": sides[1], "cluster": str(i // 2)}
            file.write(json.dumps(row | ({"margin": 0.2} if i % 2 else {})) + "\n")
    return path


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    """Solutions in steps, of which those with `brown` are wrong."""
    path, dice = tmp_path_factory.mktemp("steps") / "steps.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(32):
            right = dice.random(int(dice.integers(1, 4))) < 0.7
            steps = [said(dice, "dog" if one else "brown") for one in right]
            row = {"prompt": f"hello {i}\n", "completions": steps, "labels": right.tolist()}
            file.write(json.dumps(row) + "\n")
    return path


def reward(model, rows, out, data=(), **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "data": {"train": source, "valid": source, "max_length": 96, **dict(data)},
        "batch": {"rows" if more.get("task") == "process" else "pairs": 8},
        "steps": 12,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "out": str(out),
    }
    return Reward(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def evaluations(folder):
    return [line for line in lines(folder, "metrics.jsonl") if line["event"] == "evaluate"]


def elsewhere(artifact, kind="Sequence", labels=1):
    """The result as plain transformers or peft loads it."""
    import peft
    import transformers

    if (artifact.model() / "adapter_config.json").exists():
        made = getattr(peft, f"AutoPeftModelFor{kind}Classification")
        return made.from_pretrained(artifact.model(), num_labels=labels).eval()
    return getattr(transformers, f"AutoModelFor{kind}Classification").from_pretrained(artifact.model()).eval()


def same_scores(artifact, rows, close=2e-4, model=None):
    """Whether plain libraries give to whole conversations the scores of our table, which come from shared prompts."""
    from transformers import AutoTokenizer

    model, tokenizer = model or elsewhere(artifact), AutoTokenizer.from_pretrained(artifact.model())
    table = lines(artifact.folder, "predictions.jsonl")
    for row, ours in zip(lines(rows.parent, rows.name), table, strict=True):
        for side in ("chosen", "rejected"):
            made = tokenizer.apply_chat_template(row["prompt"] + row[side], return_tensors="pt", return_dict=True)
            with torch.no_grad():
                theirs = float(model(**made).logits[0, 0])
            assert ours["scores"][side] == pytest.approx(theirs, abs=close)


FULL = {"adapter": "none", "optim": {"kind": "adamw", "lr": 3e-3}}
METHODS = {
    "lora": {"loss": {"kind": "bradley_terry", "center": 0.01}},
    "full": {**FULL, "memory": {"recompute": "full"}, "loss": {"kind": "bradley_terry", "label_smoothing": 0.05}},
    "unpacked": {"data": {"packing": "none"}},
    "alone": {"share_prompts": False, "micro_batch": 1},
    "bf16_mixed": {"precision": "bf16_mixed"},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_plain_libraries_say_the_same(method, tiny, pairs, tmp_path):
    artifact = go(reward(tiny, pairs, tmp_path / "run", **METHODS[method]))
    before, after = evaluations(artifact.folder)
    assert after["valid.loss"] < before["valid.loss"] - 0.1 and after["valid.accuracy"] > 0.8
    trained = [line for line in lines(artifact.folder, "metrics.jsonl") if line["event"] == "train"]
    assert {"accuracy", "reward_margin", "reward_chosen", "reward_rejected"} <= trained[-1].keys()
    assert artifact.manifest["labels"] == ["reward"]
    artifact.verify()
    if method != "bf16_mixed":  # which computes in other types there
        same_scores(artifact, pairs)


def test_steps_are_judged_and_plain_libraries_say_the_same(tiny, solutions, tmp_path):
    from transformers import AutoTokenizer

    artifact = go(reward(tiny, solutions, tmp_path / "run", task="process", loss="focal", steps=20))
    before, after = evaluations(artifact.folder)
    assert after["valid.loss"] < before["valid.loss"] and after["valid.first_error"] > before["valid.first_error"]
    assert artifact.manifest["labels"] == ["wrong", "right"]
    model, tokenizer = elsewhere(artifact, "Token", 2), AutoTokenizer.from_pretrained(artifact.model())
    table, plain = iter(lines(artifact.folder, "predictions.jsonl")), lambda text: tokenizer(text)["input_ids"]
    for row in lines(solutions.parent, solutions.name):
        ids, ends = plain(row["prompt"]), []
        for step in row["completions"]:
            ids = ids + plain(step) + plain("\n")
            ends.append(len(ids) - 1)
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        for end in ends:
            assert next(table)["scores"]["right"] == pytest.approx(float(chances[end, 1]), abs=2e-4)
    reports = {(r["metric"], r["slice"]) for r in lines(artifact.folder, "evals.jsonl")}
    assert {("valid.accuracy", "wrong"), ("valid.first_error", "flawed"), ("valid.first_error_f1", "all")} <= reports
    assert "Confusion: valid" in (artifact.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def trained(tiny, pairs, tmp_path_factory):
    best = {"checkpoint": {"best": "valid.accuracy", "every": 4}, "evaluate": {"every": 4}}
    return go(reward(tiny, pairs, tmp_path_factory.mktemp("trained") / "run", **best))


def test_a_result_says_how_much_of_its_accuracy_is_length(trained, pairs):
    reports = {r["metric"]: r for r in lines(trained.folder, "evals.jsonl")}
    table, rows = lines(trained.folder, "predictions.jsonl"), lines(pairs.parent, pairs.name)
    right = np.mean([row["scores"]["accuracy"] for row in table])
    longer = np.mean([np.sign(r["scores"]["tokens_chosen"] - r["scores"]["tokens_rejected"]) / 2 + 0.5 for r in table])
    assert reports["valid.accuracy"]["value"] == pytest.approx(right)
    assert reports["valid.length_accuracy"]["value"] == pytest.approx(longer)
    assert reports["valid.accuracy_beyond_length"]["value"] == pytest.approx(right - longer)
    assert {"valid.ece", "valid.brier", "valid.length_correlation", "valid.length_controlled_accuracy"} <= set(reports)
    assert all(r["low"] <= r["value"] <= r["high"] for r in reports.values())
    assert [row["cluster_id"] for row in table] == [row["cluster"] for row in rows]
    for row, line in zip(rows, table, strict=True):
        assert row["chosen"][0]["content"] in line["label"] and row["prompt"][0]["content"] in line["text"]
        assert (line["prediction"] == line["label"]) == (line["scores"]["accuracy"] == 1.0)
    page = (trained.folder / "report.html").read_text()
    assert "valid.length_controlled_accuracy" in page and "valid.ece" in page
    evaluated = evaluations(trained.folder)
    assert trained.manifest["best_step"] == max(evaluated[1:], key=lambda x: (x["valid.accuracy"], -x["step"]))["step"]


CONFLICTS = {
    "checkpoint.best": {"checkpoint": {"best": "valid.first_error"}, "evaluate": {"every": 2}},
    "loss.kind": {"task": "process", "loss": "bradley_terry"},
    "adapter.kind": {"adapter": {"kind": "p_tuning"}, "data": {"packing": "none"}},
    "data.overflow": {"data": {"overflow": "split"}},
    "data.train_on": {"data": {"train_on": "all"}},
    "data.dedup": {"data": {"dedup": {"kind": "exact"}}},
    "evaluate.samples": {"evaluate": {"samples": 9}},
    "separator": {"separator": "<sep>"},
    "threshold": {"threshold": 0.2},
    "parallel.context": {"parallel": {"context": 2}},
    "batch.rows": {"batch": {"rows": 8}},
    "share_prompts": {"task": "process", "share_prompts": False},
    "data.lint.level": {"task": "process", "data": {"lint": "error"}},
}


@pytest.mark.parametrize("key", CONFLICTS)
def test_contradictions_name_their_key(key, tiny, pairs, tmp_path):
    with pytest.raises(RecipeError) as caught:
        reward(tiny, pairs, tmp_path / "run", **CONFLICTS[key])
    assert [p.key for p in caught.value.problems] == [key]


def test_an_answer_has_no_classes(tiny, pairs, tmp_path):
    with pytest.raises(RecipeError, match="over classes, and an answer has none"):
        reward(tiny, pairs, tmp_path / "run", loss="cross_entropy")


def test_rows_of_another_task_are_refused_by_what_they_lack(tiny, pairs, solutions, tmp_path):
    with pytest.raises(DataError, match="no chosen and rejected"):
        go(reward(tiny, solutions, tmp_path / "a"))
    with pytest.raises(DataError, match="completions is not a list of texts"):
        go(reward(tiny, pairs, tmp_path / "b", task="process"))


def test_a_reward_model_is_trained_further_by_any_name_of_its_number(tiny, pairs, tmp_path):
    """A folder whose one output has transformers' name for it goes on from its head; other classes are refused."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for labels in (1, 3):
        model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=labels)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(tmp_path / str(labels))
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / str(labels))
    on = go(reward(tmp_path / "1", pairs, tmp_path / "on", steps=1, optim={"kind": "adamw", "lr": 1e-9}))
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1").eval()
    same_scores(on, pairs, model=before)
    with pytest.raises(ModelError, match="classifier of LABEL_0, LABEL_1, LABEL_2 already"):
        go(reward(tmp_path / "3", pairs, tmp_path / "no", steps=1))


def outcome(folder):
    timings = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    weights = (folder / "model" / "adapter_model.safetensors").read_bytes()
    return weights, [{k: v for k, v in line.items() if k not in timings} for line in lines(folder, "metrics.jsonl")]


def test_a_killed_run_ends_as_if_it_had_not_been(tiny, pairs, tmp_path):
    def node(out):
        more = {"steps": 6, "checkpoint": {"every": 2, "best": "valid.accuracy"}, "evaluate": {"every": 3}}
        return reward(tiny, pairs, out, adapter={"kind": "lora", "rank": 2, "dropout": 0.1}, **more)

    go(node(tmp_path / "whole"))
    killed = faults.in_child(lambda: faults.killed_after(4, lambda: go(node(tmp_path / "killed"))))
    assert killed == -signal.SIGKILL
    go(node(tmp_path / "killed"))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_result_is_asked_from_python(trained, pairs, tiny, tmp_path):
    from llmkit.build.reward_model import scores_of

    rows, table = lines(pairs.parent, pairs.name), lines(trained.folder, "predictions.jsonl")
    given = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    ours = scores_of(str(trained.folder), given)
    want = [line["scores"][side] for line in table for side in ("chosen", "rejected")]
    np.testing.assert_allclose(ours, want, atol=2e-5)
    alone = [scores_of(str(trained.folder), [one])[0] for one in given[:2]]
    np.testing.assert_allclose(ours[:2], alone, atol=1e-5)
    texts = scores_of(str(trained.folder), [("hello ", "the dog"), "the dog"])
    assert texts[0] != texts[1]
    with pytest.raises(DataError, match="number 1 is no text and no conversation"):
        scores_of(str(trained.folder), [given[0], rows[0]["prompt"]])
    with pytest.raises(DataError, match="of at most 512"):
        scores_of(str(trained.folder), ["hello world " * 400])
    with pytest.raises(ModelError, match="is a language model"):
        scores_of(str(tiny), given)


def test_steps_are_asked_from_python(tiny, solutions, tmp_path):
    from llmkit.build.reward_model import RewardModel
    from llmkit.models.node import ModelRef

    artifact = go(reward(tiny, solutions, tmp_path / "run", task="process", separator=" <end>", steps=2))
    asked = RewardModel(ModelRef(name=str(artifact.folder)))
    rows = lines(solutions.parent, solutions.name)
    chances = asked.steps([(row["prompt"], row["completions"]) for row in rows], separator=" <end>")
    table = [line["scores"]["right"] for line in lines(artifact.folder, "predictions.jsonl")]
    np.testing.assert_allclose([one for row in chances for one in row], table, atol=2e-5)
    with pytest.raises(DataError, match="completions is not a list of texts"):
        asked.steps([("hello", [])])
    with pytest.raises(ModelError, match="judges steps"):
        asked.scores(["hello"])


def test_other_pairs_are_judged_by_what_was_trained_and_by_what_was_merged(trained, tiny, pairs, solutions, tmp_path):
    task = {"kind": "pairs", "data": [{"kind": "jsonl", "path": str(pairs)}], "max_length": 96}
    merged = go(Merge(model=str(trained.folder), out=str(tmp_path / "merged")))
    want = {r["metric"].partition(".")[2]: r["value"] for r in lines(trained.folder, "evals.jsonl")}
    for model in (trained, merged):
        made = go(Evaluate(model=str(model.folder), tasks=[task], out=str(tmp_path / f"of-{model.folder.name}")))
        found = {r["metric"].partition(".")[2]: r["value"] for r in lines(made.folder, "evals.jsonl")}
        assert found == pytest.approx(want, abs=1e-3)
    with pytest.raises(ModelError, match="is no model that judges steps"):
        task = {"kind": "steps", "data": [{"kind": "jsonl", "path": str(solutions)}]}
        go(Evaluate(model=str(trained.folder), tasks=[task], out=str(tmp_path / "steps")))
    with pytest.raises(ModelError, match="is no model that scores answers"):
        task = {"kind": "pairs", "data": [{"kind": "jsonl", "path": str(pairs)}]}
        go(Evaluate(model=str(tiny), tasks=[task], out=str(tmp_path / "pairs")))


def test_steps_of_other_solutions_are_judged(tiny, solutions, tmp_path):
    artifact = go(reward(tiny, solutions, tmp_path / "run", task="process", steps=2))
    task = {"kind": "steps", "data": [{"kind": "jsonl", "path": str(solutions)}]}
    made = go(Evaluate(model=str(artifact.folder), tasks=[task], out=str(tmp_path / "steps")))
    want = {(r["metric"].partition(".")[2], r["slice"]): r["value"] for r in lines(artifact.folder, "evals.jsonl")}
    found = {(r["metric"].partition(".")[2], r["slice"]): r["value"] for r in lines(made.folder, "evals.jsonl")}
    assert found == pytest.approx(want, abs=1e-4)


def test_a_reward_model_begins_with_what_supervision_left(tiny, rows, pairs, tmp_path):
    """Supervised training, its adapter merged, and a head on that: one recipe of three stages."""
    from llmkit.recipe.load import load_recipe

    source = lambda path: [{"kind": "jsonl", "path": str(path)}]  # noqa: E731
    small = {"steps": 2}
    stages = [
        {
            "name": "sft",
            "kind": "sft",
            "model": str(tiny),
            "data": {"train": source(rows)},
            "batch": {"rows": 4},
            **small,
        },
        {"name": "merged", "kind": "merge", "model": "${stages.sft}"},
        {
            "name": "reward",
            "kind": "reward",
            "model": "${stages.merged}",
            "data": {"train": source(pairs)},
            **small,
            "batch": {"pairs": 4},
        },
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"out": str(tmp_path / "run"), "stages": stages}))
    run(load_recipe(str(tmp_path / "recipe.yaml")), console=Console(quiet=True))
    made = json.loads((tmp_path / "run" / "reward" / "manifest.json").read_text())
    assert made["kind"] == "reward" and made["labels"] == ["reward"] and "merged" in json.dumps(made["base"])
