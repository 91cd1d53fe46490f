"""Whole preference stages on a tiny model: they learn, references agree, and a run that was cut short ends alike."""

import json
import math
import shutil

import numpy as np
import pytest

from llmkit import Preference, run
from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError
from llmkit.core.shape import Shape
from llmkit.stages.planned import planned
from tests.stages.test_sft import metrics

FILLERS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows whose chosen answers say hello; some are longer than the rejected ones, some shorter."""
    path, dice = tmp_path_factory.mktemp("pairs") / "rows.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(24):
            asked, good, bad = (" ".join(dice.choice(FILLERS, dice.integers(1, n))) for n in (6, 5, 5))
            row = {"prompt": [{"role": "user", "content": asked}]}
            row |= {"chosen": [{"role": "assistant", "content": f"hello {good}"}]}
            row |= {"rejected": [{"role": "assistant", "content": f"world {bad}"}]}
            file.write(json.dumps(row) + "\n")
    return path


def preference(model, rows, out, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "data": {"train": source, "valid": source, "max_length": 48, **more.pop("data", {})},
        "batch": {"pairs": 8},
        "steps": 4,
        "optim": {"kind": "adamw", "lr": 5e-3},
        "evaluate": {"samples": 1, "max_tokens": 3},
        "out": str(out),
    }
    return Preference(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def evaluated(folder):
    return [line for line in metrics(folder) if line["event"] == "evaluate"]


WAYS = {
    "adapter off": {},
    "a prompt each": {"share_prompts": False},
    "unpacked": {"data": {"packing": "none"}},
    "a second model": {"reference": "model"},
    "precomputed": {"reference": "precomputed"},
}
FULL = {"adapter": "none", "optim": {"kind": "adamw", "lr": 1e-3}}


def test_every_way_is_the_same_training(tiny, pairs, tmp_path):
    seen = {}
    for name, more in WAYS.items():
        folder = tmp_path / name.replace(" ", "_")
        go(preference(tiny, pairs, folder, **json.loads(json.dumps(more))))
        seen[name] = metrics(folder)
    for name, lines in seen.items():
        for line, plain in zip(lines, seen["adapter off"], strict=True):
            for key in ("loss", "reward_margin", "grad_norm", "valid.loss", "valid.accuracy", "logps_chosen"):
                if key in plain:
                    assert line[key] == pytest.approx(plain[key], rel=2e-4, abs=1e-5), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"quant": "bnb_nf4"}, {"memory": {"recompute": "full"}}], ids=["nf4", "recompute"])
def test_a_prompt_each_is_the_same_training_however_it_is_held(more, tiny, pairs, tmp_path):
    shared, apart = (
        metrics(go(preference(tiny, pairs, tmp_path / str(share), share_prompts=share, **more)).folder)
        for share in (True, False)
    )
    for ours, theirs in zip(shared, apart, strict=True):
        for key in ("loss", "grad_norm", "valid.loss"):
            assert key not in theirs or ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6)
    assert [line for line in shared if line["event"] == "evaluate"][-1]["valid.accuracy"] > 0.9


def test_a_loss_over_a_whole_step_is_measured_over_all_rows(tiny, pairs, tmp_path, monkeypatch):
    """However few of them lie in a forward: sorted margins of some are not those of all."""
    seen = []
    for tokens in (96, 4096):
        monkeypatch.setattr("llmkit.evals.preferences.FORWARD_TOKENS", tokens)
        go(preference(tiny, pairs, tmp_path / str(tokens), steps=2, loss={"kind": "aot"}))
        seen.append(evaluated(tmp_path / str(tokens))[-1])
    assert seen[0]["valid.loss"] == pytest.approx(seen[1]["valid.loss"], rel=1e-6)
    assert seen[0]["valid.reward_margin"] == pytest.approx(seen[1]["valid.reward_margin"], rel=1e-4)


@pytest.mark.parametrize("reference", ["model", "precomputed"])
def test_every_weight_is_trained_beside_a_reference(reference, tiny, pairs, tmp_path):
    made = go(preference(tiny, pairs, tmp_path / "run", reference=reference, steps=6, **FULL))
    before, after = evaluated(made.folder)
    assert before["valid.loss"] == pytest.approx(math.log(2), abs=1e-6) and before["valid.reward_margin"] == 0
    assert after["valid.accuracy"] > 0.9 and after["valid.loss"] < 0.65
    made.verify()


def test_what_a_run_leaves(tiny, pairs, tmp_path):
    made = go(
        preference(
            tiny,
            pairs,
            tmp_path / "run",
            steps=6,
            checkpoint={"every": 3, "best": "valid.accuracy"},
            evaluate={"every": 3, "samples": 1, "max_tokens": 3},
        )
    )
    lines = metrics(made.folder)
    train = [line for line in lines if line["event"] == "train"]
    figures = ("reward_margin", "accuracy", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected")
    assert all(name in train[0] for name in (*figures, "length_chosen", "length_rejected"))
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and train[0]["samples"] == 8
    table = [json.loads(line) for line in (made.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(table) == 24 and {row["slices"]["kind"] for row in table} == {"preference"}
    right = [row["prediction"] == row["label"] for row in table]
    reports = {line["metric"]: line for line in map(json.loads, (made.folder / "evals.jsonl").read_text().splitlines())}
    assert reports["valid.accuracy"]["value"] == pytest.approx(np.mean(right))
    assert reports["valid.accuracy"]["low"] <= reports["valid.accuracy"]["value"] <= reports["valid.accuracy"]["high"]
    assert "valid.length_controlled_accuracy" in reports and evaluated(made.folder)[-1]["valid.accuracy"] > 0.9
    page = (made.folder / "report.html").read_text()
    assert "reward_margin" in page and "Pairs" in page


def test_a_run_that_was_cut_short_ends_alike(tiny, pairs, tmp_path):
    more = {"steps": 6, "checkpoint": {"every": 2, "keep": 9}, "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(preference(tiny, pairs, whole, **more))
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step-{step}")
    go(preference(tiny, pairs, cut, **more))
    assert metrics(cut) == metrics(whole)
    adapters = [(folder / "model" / "adapter_model.safetensors").read_bytes() for folder in (cut, whole)]
    assert adapters[0] == adapters[1]


def test_plans_count_what_a_reference_takes():
    def plan(reference, loss="dpo"):
        data = {"train": [{"kind": "docstrings", "pairs": True}], "max_length": 512}
        node = Preference(model="smollm2-135m-instruct-q4", loss=loss, reference=reference, data=data, out="x")
        return planned(node, "h100-80gb", 1, shape=Shape(1 << 27, 30, 576, 1536, 49152, 10**6, 192, 1 << 24))

    off, second, kept = (plan(name) for name in ("adapter_off", "model", "precomputed"))
    beside = [dict(made.choice.account.beside) for made in (off, second, kept)]
    assert beside == [{}, {"reference": 2 * (1 << 27)}, {}]
    assert 1.2 < off.times.compute / kept.times.compute < 1.5 and off.times.compute == second.times.compute
    assert plan("adapter_off", "simpo").times.compute == kept.times.compute


LOSSES = {
    "ipo": {},
    "simpo": {},
    "orpo": {"adapter": "none"},
    "aot": {},
    "mixture": {"loss": {"kind": "mixture", "parts": [{"loss": "dpo"}, {"loss": "nll", "weight": 0.1}]}},
    "tail": {"loss": {"kind": "dpo", "tail": 0.5}},
}


@pytest.mark.parametrize("kind", ["simpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in LOSSES)])
def test_every_loss_learns(kind, tiny, pairs, tmp_path):
    more = {"loss": kind} | LOSSES[kind]
    before, after = evaluated(go(preference(tiny, pairs, tmp_path / "run", **more)).folder)
    assert after["valid.loss"] < before["valid.loss"] and after["valid.accuracy"] > 0.9


REFUSED = {
    "reference": {"loss": "simpo", "reference": "model"},
    "micro_batch": {"loss": "aot", "micro_batch": 2},
    "reference.kind": {"adapter": "none"},
    "data.overflow": {"data": {"overflow": "split"}},
    "batch.rows": {"batch": {"rows": 3}},
    "parallel.context": {"parallel": {"context": 2}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_contradicts_is_refused(key, tiny, pairs, tmp_path):
    with pytest.raises(RecipeError, match=key):
        preference(tiny, pairs, tmp_path / "run", **json.loads(json.dumps(REFUSED[key])))


def test_labels_that_are_even_teach_nothing_and_losses_that_take_all_as_certain_refuse_them(tiny, pairs, tmp_path):
    """At a margin of 0 a label that is as likely wrong as right pulls no way; a certain one pulls."""
    own = [json.loads(line) for line in pairs.read_text().splitlines()]
    even = tmp_path / "even.jsonl"
    even.write_text("".join(json.dumps({**row, "probability": 0.5}) + "\n" for row in own))
    soft, hard = (
        [
            line
            for line in metrics(go(preference(tiny, rows, tmp_path / rows.stem, steps=1)).folder)
            if "grad_norm" in line
        ]
        for rows in (even, pairs)
    )
    assert soft[0]["grad_norm"] < 1e-6 < 1e-3 < hard[0]["grad_norm"]
    with pytest.raises(DataError, match="loss ipo takes all as certain"):
        go(preference(tiny, even, tmp_path / "ipo", loss={"kind": "ipo"}))
