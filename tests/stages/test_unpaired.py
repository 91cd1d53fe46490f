"""Whole KTO stages on a tiny model: they learn, and neither micro-batches nor a stop change what a step does."""

import json
import re
import signal

import numpy as np
import pytest

from llmkit import Preference, run
from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError, Stopped
from tests.stages.test_sft import metrics

FILLERS = ["the", "quick", "fox", "jumps", "over", "lazy", "model", "text"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Rows whose good answers say hello, and whose bad ones say world."""
    path, dice = tmp_path_factory.mktemp("labelled") / "rows.jsonl", np.random.default_rng(0)
    with path.open("w") as file:
        for at in range(24):
            asked, said = (" ".join(dice.choice(FILLERS, dice.integers(1, n))) for n in (6, 5))
            label = bool(at % 3)
            row = {"prompt": [{"role": "user", "content": asked}]}
            row |= {"completion": [{"role": "assistant", "content": f"{'hello' if label else 'world'} {said}"}]}
            file.write(json.dumps(row | {"label": label}) + "\n")
    return path


def kto(model, rows, out, **more):
    source = [{"kind": "jsonl", "path": str(rows)}]
    options = {
        "model": str(model),
        "loss": {"kind": "kto", "beta": 0.5},
        "data": {"train": source, "valid": source, "max_length": 48},
        "batch": {"rows": 8},
        "steps": 4,
        "optim": {"kind": "adamw", "lr": 5e-3},
        "evaluate": {"samples": 1, "max_tokens": 3},
        "out": str(out),
    }
    return Preference(**(options | more))


def go(node, **more):
    return run(node, console=Console(quiet=True), **more)


def trained(folder):
    return [line for line in metrics(folder) if line["event"] == "train"]


@pytest.fixture(scope="module")
def done(tiny, labelled, tmp_path_factory):
    return go(kto(tiny, labelled, tmp_path_factory.mktemp("kto") / "run"))


def test_rows_of_one_label_are_told(tiny, labelled, tmp_path, capsys):
    alike = tmp_path / "rows.jsonl"
    alike.write_text("".join(line + "\n" for line in labelled.read_text().splitlines() if '"label": true' in line))
    source = [{"kind": "jsonl", "path": str(alike)}]
    more = {"data": {"train": source, "max_length": 48}, "steps": 1, "evaluate": {}}
    run(kto(tiny, alike, tmp_path / "run", **more))
    said = capsys.readouterr().err
    assert "data.train: label is true in every row: kto tells good" in said
    assert re.search(r"training 1/1 loss -?[\d.]+, accuracy [\d.]+, \d+ tokens/s", said)


def test_a_last_step_of_one_row_has_no_baseline(tiny, labelled, tmp_path):
    """It has no other prompt: its own completion is no mismatched one."""
    source = [{"kind": "jsonl", "path": str(labelled), "take": 9}]
    more = {"data": {"train": source, "max_length": 48}, "steps": None, "epochs": 1, "evaluate": {}}
    node = kto(tiny, labelled, tmp_path / "run", **more)
    lines = trained(go(node).folder)
    assert [line["samples"] for line in lines] == [8, 1]
    assert lines[-1]["baseline"] == 0.0


def test_it_learns_which_answers_are_good(done):
    lines, seen = trained(done.folder), [line for line in metrics(done.folder) if line["event"] == "evaluate"]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # policy and reference are one
    assert lines[0]["baseline"] == 0 and all(line["baseline"] >= 0 for line in lines)
    assert seen[0]["valid.loss"] == pytest.approx(0.5, abs=1e-6) and seen[-1]["valid.loss"] < 0.45
    assert seen[-1]["valid.accuracy"] > 0.8 and seen[-1]["valid.reward_margin"] > 0.2
    assert {"reward_chosen", "reward_rejected", "logps_chosen", "length", "accuracy"} <= set(lines[-1])


def test_micro_batches_do_not_change_it(done, tiny, labelled, tmp_path):
    """Also where z is not 0: bad answers alone push the policy away from the reference."""
    parts = go(kto(tiny, labelled, tmp_path / "run", micro_batch=1, data={**data(labelled), "packing": "none"}))
    for one, other in zip(trained(parts.folder), trained(done.folder), strict=True):
        for name in ("loss", "grad_norm", "baseline", "accuracy", "reward_chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (name, one["step"])


def data(rows):
    source = [{"kind": "jsonl", "path": str(rows)}]
    return {"train": source, "valid": source, "max_length": 48}


def test_the_baseline_is_that_of_the_steps_mismatched_completions(tiny, labelled, tmp_path):
    """Good answers alone: what makes them likelier makes them so after any prompt."""
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({**row, "label": True}) + "\n" for row in rows))
    made = go(kto(tiny, tmp_path / "good.jsonl", tmp_path / "run"))
    lines = trained(made.folder)
    assert lines[0]["baseline"] == 0 and lines[-1]["baseline"] > 0.05
    assert "valid.reward_margin" not in metrics(made.folder)[0]  # there is nothing to compare with


def test_a_second_model_as_reference_is_the_same_training(done, tiny, labelled, tmp_path):
    made = go(kto(tiny, labelled, tmp_path / "run", reference="model"))
    for one, other in zip(trained(made.folder), trained(done.folder), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(done, tiny, labelled, tmp_path, monkeypatch):
    from llmkit.stages import build_training

    plain = build_training._log

    def log(job, metrics, more, pulse, line):
        plain(job, metrics, more, pulse, line)
        if line["event"] == "train" and line["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    node = kto(tiny, labelled, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(build_training, "_log", log)
        with pytest.raises(Stopped):
            go(node)
    go(node)
    keep = ("step", "loss", "grad_norm", "baseline", "reward_chosen")
    ours, theirs = ([{n: line[n] for n in keep} for line in trained(f)] for f in (tmp_path / "run", done.folder))
    assert ours == theirs


def test_its_name_is_short_for_the_stage(tiny, labelled, tmp_path):
    from llmkit import load_recipe

    said = {"kind": "kto", "model": str(tiny), "data": data(labelled), "out": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(json.dumps(said))
    ((_, node),) = load_recipe(str(tmp_path / "r.yaml")).stages
    assert isinstance(node, Preference) and node.loss.kind == "kto"


def test_what_it_cannot_be_made_of_is_refused(tiny, labelled, tmp_path):
    for more, word in (
        ({"batch": {"rows": 1}}, "2 or more"),
        ({"batch": {"pairs": 4}}, "batch.rows"),
        ({"reference": "precomputed"}, "reference: model"),
    ):
        with pytest.raises(RecipeError, match=word):
            kto(tiny, labelled, tmp_path / "run", **more)
    with pytest.raises(DataError, match="chosen and rejected"):
        go(kto(tiny, labelled, tmp_path / "run", loss="dpo", batch={"pairs": 4}))
    pairs = {"prompt": "hello", "chosen": " world", "rejected": " fox"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pairs) + "\n") * 8)
    with pytest.raises(DataError, match="completion and label"):
        go(kto(tiny, tmp_path / "pairs.jsonl", tmp_path / "run"))


def test_the_loss_is_named_by_which_rows_are_counted(tiny, labelled, tmp_path):
    with pytest.raises(RecipeError, match=r"batch.pairs: contradicts loss.kind: loss kto counts rows"):
        kto(tiny, labelled, tmp_path / "run", batch={"pairs": 4})


def test_without_a_baseline_the_reference_may_be_asked_before(tiny, labelled, tmp_path):
    loss = {"kind": "kto", "beta": 0.5, "variant": "apo_zero"}
    one, other = (
        trained(go(kto(tiny, labelled, tmp_path / name, loss=loss, reference=name)).folder)
        for name in ("adapter_off", "precomputed")
    )
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-5)
