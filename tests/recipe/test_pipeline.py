"""Pipelines: what stages share, how they link, and what is not theirs to say."""

from pathlib import Path

import pytest

from llmkit.recipe.load import load_recipe
from llmkit.recipe.show import resolved


def test_a_pipeline_without_faults_is_the_control(write, pipe):
    recipe = load_recipe(write(pipe))
    assert [(name, node.kind, node.out) for name, node in recipe.stages] == [
        ("tune", "sft", "runs/p/tune"),
        ("fold", "merge", "runs/p/fold"),
    ]
    assert recipe.stages[1][1].model.name == "runs/p/tune" and str(recipe.out) == "runs/p"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: tune", "name: tune, out: q", "r.yaml:5:18: stages.tune.out: is not for a stage to say"),
        ("seed: 3", "seed: 3, out: q", "r.yaml:3:34: defaults.out: is not for defaults to say"),
        ("out: runs/p\n", "", "out: is missing"),
        ("seed: 3", "sed: 3", "defaults.sed: unknown key, did you mean seed?"),
        ("defaults: {model: tiny, seed: 3}", "defaults: 3", "defaults: is not a mapping"),
        ("stages:", "steps: 3\nstages:", "steps: is not for the pipeline to say; fix: write defaults.steps"),
        ("stages:", "stagess: 3\nstages:", "stagess: unknown key, did you mean stages?"),
        ("name: tune", "name: a b", "stages.0: has no plain name"),
        ("{name: fold", "{nam: fold", "stages.1: has no plain name"),
        ("name: fold", "name: tune", "stages.1.name: a second stage is called tune"),
        ("stages.tune}", "stages.nobody}", "stages.fold.model: no earlier stage is called nobody; fix: use one of the"),
        ("stages.tune}", "stages.fold}", "no earlier stage is called fold"),
        (
            "stages.tune}",
            "stages.tune}/../model",
            "stages.fold.model: ${stages.tune}/../model refers",
        ),
        (
            "model: tiny",
            "model: '${stages.tune}'",
            "called tune; fix: use one of the earlier stages (none",
        ),
    ],
)
def test_r8_what_a_pipeline_must_not_say_is_told_with_its_place(old, new, said, problems, pipe):
    assert old in pipe
    assert any(said in line for line in problems(pipe.replace(old, new)))


def test_defaults_reach_the_stages_that_have_them_and_merge(write, pipe):
    text = pipe.replace("seed: 3", "optim: {kind: adamw, lr: 1e-4, clip: 0.5}").replace(
        "name: tune", "name: tune, optim: {lr: 1e-5}"
    )
    tune = load_recipe(write(text)).stages[0][1]
    assert (tune.optim.lr, tune.optim.clip) == (1e-5, 0.5)
    shared = pipe.replace("seed: 3", "kind: sft").replace("name: tune, kind: sft", "name: tune")
    assert [node.kind for _, node in load_recipe(write(shared)).stages] == ["sft", "merge"]


def test_the_resolved_pipeline_reads_back_as_itself(write, pipe):
    first = load_recipe(write(pipe), ["stages.tune.steps=7"])
    again = load_recipe(write(resolved(first), "again.yaml"))
    assert first.digest == again.digest
    assert [node.out for _, node in first.stages] == [node.out for _, node in again.stages]
    alone = load_recipe(write(resolved(first, "tune"), "alone.yaml"))
    assert alone.stages[0][1] == first.stages[0][1]


def test_r8_what_the_environment_holds_is_not_shown_in_any_stage(write, pipe, monkeypatch):
    monkeypatch.setenv("BASE", "s3cret")
    text = pipe.replace("model: tiny", "model: '${env:BASE}'").replace("runs/p", "runs/${env:BASE}")
    recipe = load_recipe(write(text))
    assert recipe.stages[0][1].model.name == "s3cret" and recipe.stages[1][1].model.name == "runs/s3cret/tune"
    whole, one = resolved(recipe), resolved(recipe, "fold")
    assert "s3cret" not in whole + one and 'name: "${env:BASE}"  # r.yaml:3' in whole
    assert load_recipe(write(whole, "again.yaml")).digest == recipe.digest
    assert load_recipe(write(one, "one.yaml")).stages[0][1].out == "runs/s3cret/fold"


def test_the_example_of_the_docs_is_sound(write):
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    recipe = load_recipe(write(page.split("```yaml\n")[1].split("```")[0]), ["stages.tune.steps=10"])
    assert [name for name, _ in recipe.stages] == ["before", "tune", "after", "merged"]
    _, tune, after, merged = (node for _, node in recipe.stages)
    assert (tune.steps, tune.seed, after.model.name, merged.model.name) == (10, 1, tune.out, tune.out)


def test_stages_of_which_not_all_have_ranks_that_only_draw_are_refused_by_the_first_of_these(write, problems, pipe):
    data = "data: {train: [{kind: jsonl, path: a.jsonl}]}, reward: [{kind: exact}], batch: {prompts: 2}"
    drawn = f"  - {{name: draw, kind: policy, {data}, rollout: {{ranks: 1}}}}\n"
    (said,) = problems(pipe + drawn)
    assert "stages.draw.rollout.ranks: the ranks of all stages that train are the same" in said
    assert said.startswith("r.yaml:7:")
    load_recipe(
        write(
            pipe.replace("kind: sft", "kind: merge").replace(", data: {train: [{kind: jsonl, path: a.jsonl}]}", "")
            + drawn
        )
    )


@pytest.mark.parametrize("adapter", ["{kind: bottleneck}", "none", "{kind: prompt_tuning}"])
def test_a_merge_of_what_cannot_be_folded_is_refused_before_it_is_trained(adapter, write, problems, pipe):
    made = pipe.replace("kind: sft,", f"kind: sft, adapter: {adapter},").replace(
        "a.jsonl}]", "a.jsonl}], packing: none"
    )
    (said,) = problems(made)
    assert said.startswith("r.yaml:6:") and "stages.fold.model: cannot be merged: " in said
    load_recipe(write(made.replace(f"adapter: {adapter}", "adapter: {kind: ia3}")))
