"""`llmkit plan`: tables and JSON for a device by name, without any weights; `run` refuses what cannot fit a rank."""

import json

import pytest

from llmkit import run
from llmkit.core.errors import ResourceError
from llmkit.core.ranks import Ranks
from llmkit.models.outline import PUBLIC, tensors
from llmkit.parallel.apart import training
from llmkit.stages import sizes as sizing
from llmkit.stages.sizes import sizes, whole_model
from tests.distributed import QUIET, sft

RECIPE = """
kind: sft
model: meta-llama/Llama-3.1-8B
adapter: none
data: {train: [{kind: jsonl, path: none.jsonl}], max_length: 8192}
batch: {rows: 64}
parallel: {strategy: fsdp}
out: run
"""


@pytest.fixture
def told(call):
    """The JSON of a plan, and all that was said."""

    def made(*words):
        code, said, wrong = call("plan", *words, "--json")
        assert code == 0, wrong
        return json.loads(said.splitlines()[-1]), said

    return made


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tensor=3", "--ranks", "3"], "3 ranks cannot share 32 heads"),
        (["parallel.expert=2", "--ranks", "2"], "llama has no experts to share"),
        (["parallel.context=5", "parallel.context_method=ulysses", "--ranks", "5"], "5 ranks cannot share 32"),
    ],
)
def test_what_a_run_would_refuse_is_no_plan(words, said, recipe, call):
    code, _, wrong = call("plan", recipe, "--device", "h100-80gb", *words)
    assert code == 2 and said in wrong
    at = words.index("--ranks")
    code, _, wrong = call("launch", recipe, "--gpus", words[at + 1], "--print", *words[:at])
    assert code == 2 and said in wrong


POLICY = """stages:
- name: draw
  kind: policy
  model: {model}
  data: {{train: [{{kind: jsonl, path: rows.jsonl}}], max_length: 48}}
  reward: [{{kind: length, shape: {{kind: target, length: 4, slack: 8}}}}]
  rollout: {{group: 2, max_tokens: 6, ranks: 1}}
  batch: {{prompts: 2}}
  steps: 1
out: out
"""


@pytest.mark.parametrize(
    ("nodes", "here", "said"),
    [(2, 8, "16 ranks on hosts of 8, and those that only draw"), (1, 1, "1 of 1 ranks only draw, and none is left")],
)
def test_plan_check_and_launch_refuse_ranks_as_a_run_does(nodes, here, said, tiny, call, tmp_path, monkeypatch):
    """In the same words, of the same place. A host has eight of the device."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "question of the model"}\n' * 3)
    (tmp_path / "r.yaml").write_text(POLICY.format(model=tiny))
    found = [call("launch", "r.yaml", "--nodes", nodes, "--gpus", here, "--print")]
    found += [call("plan", "r.yaml", "--device", "h100-80gb", "--ranks", nodes * here)]
    for name, value in Ranks(0, nodes * here, 0, here).environment(9).items():
        monkeypatch.setenv(name, value)
    found += [call(verb, "r.yaml") for verb in ("check", "run")]
    assert [code for code, _, _ in found] == [2] * 4 and len({line for _, _, line in found}) == 1
    assert f"r.yaml:7:45: stages.draw.rollout.ranks: {said}" in found[0][2]


def test_a_plan_adds_up_and_says_what_fits(recipe, told):
    made, text = told(recipe, "--device", "h100-80gb", "--ranks", "8")
    assert made["fits"] and sum(made["parts"].values()) == made["peaks"]["step"] <= made["usable"]
    assert made["degrees"] == {"shard": 8} and made["recompute"] == "selective" and made["micro_batch"] == 1
    assert 0.2 < made["mfu"] < 0.7 and "largest micro-batch that fits: 1" in text


def test_what_does_not_fit_is_told_three_changes_with_their_cost(recipe, told):
    made, text = told(recipe, "memory.recompute=none", "micro_batch=4", "--device", "a100-80gb", "--ranks", "8")
    assert not made["fits"] and len(made["changes"]) == 3
    assert all(change["peak"] <= made["usable"] and change["cost"] for change in made["changes"])
    assert "micro_batch=1" in made["changes"][0]["set"] and text.count("would fit with") == 3


def test_auto_takes_copies_where_they_fit_and_parts_where_not(recipe, told):
    auto = ("parallel.strategy=auto", "--device", "h100-80gb", "--ranks", "8")
    assert told(recipe, *auto)[0]["strategy"] == "fsdp"
    assert told(recipe, "adapter=lora", *auto)[0]["strategy"] == "ddp"


def test_a_folder_with_a_configuration_is_enough(recipe, told, call, tmp_path):
    (tmp_path / "model").mkdir()
    config = dict(PUBLIC["Qwen/Qwen3-8B"])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    made, _ = told(recipe, f"model={tmp_path / 'model'}", "--device", "h100-80gb", "--ranks", "8")
    assert made["parts"]["weights"] == sum(_count(size) for size in tensors(config).values()) * 4 // 8
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "other"}))
    code, _, said = call("plan", recipe, f"model={tmp_path / 'model'}", "--device", "h100-80gb")
    assert code == 4 and "do not follow from config.json" in said


def _count(size):
    return size[0] * (size[1] if len(size) > 1 else 1)


PIPELINE = """out: runs
defaults: {data: {train: [{kind: jsonl, path: none.jsonl}], max_length: 512}, parallel: {strategy: fsdp}}
stages:
- {name: tune, kind: sft, model: meta-llama/Llama-3.1-8B, batch: {rows: 64}}
- {name: whole, kind: merge, model: "${stages.tune}"}
- {name: prefer, kind: preference, model: "${stages.whole}", batch: {pairs: 16}, parallel: {replicate: 3}}
"""

PAID = """- {name: worth, kind: reward, model: "${stages.whole}", batch: {pairs: 16}}
- {name: policy, kind: policy, model: "${stages.whole}", reward: [{kind: model, path: "${stages.worth}"}],
   rollout: {group: 2, max_tokens: 16}, loss: {kind: grpo, beta: 0}, batch: {prompts: 8}}
"""


def test_stages_of_a_pipeline_are_named_and_planned_by_what_they_begin_from(told, call, tmp_path):
    """Whose shape the model of a later one has; what is wrong is told of its stage."""
    (tmp_path / "r.yaml").write_text(PIPELINE)
    made, text = told("r.yaml", "--device", "h100-80gb", "--ranks", "6")
    assert [*made] == ["tune", "prefer"] and made["tune"]["parts"]["weights"] == made["prefer"]["parts"]["weights"] // 3
    assert {line.partition(": ")[0] for line in text.splitlines()[:-1]} == {"tune", "prefer"}
    code, _, wrong = call("plan", "r.yaml", "--device", "h100-80gb", "--ranks", "8")
    assert code == 2 and "error: r.yaml:6:" in wrong and " stages.prefer.parallel" in wrong


def test_a_reward_of_a_pipeline_is_planned_by_what_its_model_begins_from(told, tmp_path):
    (tmp_path / "r.yaml").write_text(PIPELINE[: PIPELINE.index("- {name: prefer")] + PAID)
    made, _ = told("r.yaml", "--device", "h100-80gb", "--ranks", "8")
    assert [*made] == ["tune", "worth", "policy"] and made["policy"]["parts"]["reward"] > 2**30


def test_an_unknown_device_names_those_that_are_known(recipe, call):
    code, _, said = call("plan", recipe, "--device", "h100")
    assert code == 2 and "did you mean h100-80gb" in said


def test_ranks_of_a_host_share_its_memory_and_a_step(tiny, rows, tmp_path, monkeypatch):
    node = sft(tiny, rows, tmp_path / "run", micro_batch="auto", batch={"rows": 8})
    resolved = whole_model(node.model)
    assert sizes(node, resolved, "cpu")[1].rows == 8
    assert sizes(node, resolved, "cpu", Ranks(0, 4, 0, 4))[1].rows == 2  # its share of a step
    monkeypatch.setattr(sizing, "available", lambda device: 300 << 20)
    assert sizes(node, resolved, "cpu")[1].fits
    with pytest.raises(ResourceError, match=r"on each of 4 ranks, 75 MiB are free"):
        sizes(node, resolved, "cpu", Ranks(0, 4, 0, 4))
    with pytest.raises(ResourceError, match=r"75 MiB are free"):  # those that only draw have theirs of it
        sizes(node, resolved, "cpu", training(Ranks(0, 4, 0, 4), 3))


def test_run_refuses_before_any_model_is_loaded(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "available", lambda device: 32 << 20)
    monkeypatch.setattr("llmkit.stages.build_training._built", lambda job: pytest.fail("a model was loaded"))
    with pytest.raises(ResourceError, match="training needs about"):
        run(sft(tiny, rows, tmp_path / "run"), console=QUIET)
