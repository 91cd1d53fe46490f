"""The shipped pipelines from end to end over a tiny model, and what one stage has of another."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmkit import run
from llmkit.core.console import Console
from llmkit.core.folder import read_status
from llmkit.recipe.load import load_recipe
from llmkit.recipe.shipped import recipes

SAID = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of small rows: answers, pairs."""
    folder = tmp_path_factory.mktemp("sources")
    asked = [[{"role": "user", "content": f"hello world {at}"}] for at in range(24)]
    said = [{"role": "assistant", "content": SAID}]
    answers = [{"prompt": one, "completion": said, "answer": str(at)} for at, one in enumerate(asked)]
    worse = [[{"role": "assistant", "content": f"what is asked {at}"}] for at in range(24)]
    pairs = [{"prompt": one, "chosen": said, "rejected": bad} for one, bad in zip(asked, worse, strict=True)]
    for name, rows in (("answers", answers), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: f"[{{kind: jsonl, path: {folder / name}.jsonl}}]" for name in ("answers", "pairs")}


def small(name, tiny, sources, out):
    """The recipe as it is written, over a tiny model, shorter, and over other rows."""
    answers, pairs = sources["answers"], sources["pairs"]
    said = [f"out={out}", f"stages.sft.model={tiny}", f"stages.sft.data.train={answers}", "stages.sft.steps=4"]
    said += ["stages.sft.optim.lr=2e-2", "stages.sft.data.max_length=96"]
    if name == "sft_dpo":
        said += [f"stages.dpo.data={{train: {pairs}, valid: {pairs}, max_length: 96}}", "stages.dpo.steps=3"]
        said += ["stages.dpo.optim.lr=1e-2", "stages.dpo.evaluate={every: 3, rows: 8}"]
    if name == "sft_grpo":
        said += [f"stages.grpo.data={{train: {answers}, valid: [], max_length: 96}}", "stages.grpo.steps=2"]
        said += ["stages.grpo.rollout={group: 2, max_tokens: 6}", "stages.grpo.evaluate=null"]
        said += ["stages.grpo.reward=[{kind: length, shape: {kind: at_most, length: 4}}]"]
    if name == "sft_reward_ppo":
        data = f"train: {pairs}, valid: {pairs}, max_length: 96"
        said += [
            f"stages.reward.data={{{data}}}",
            "stages.reward.steps=2",
            "stages.reward.evaluate={every: 2, rows: 4}",
        ]
        said += [f"stages.ppo.data={{train: {answers}, valid: [], max_length: 96}}", "stages.ppo.steps=2"]
        said += ["stages.ppo.rollout={group: 2, max_tokens: 6}", "stages.ppo.evaluate=null"]
    if name == "sft_constitutional_dpo":
        said += ["defaults.generator={kind: engine, cache: {size: 4194304}}"]
        said += [f"defaults.prompts={answers}", "defaults.sampling={temperature: 1.0, max_tokens: 8}"]
        said += ["defaults.critic={generator: {kind: rules, patterns: [e]}}", "stages.dpo.data.max_length=96"]
        said += ["stages.dpo.epochs=null", "stages.dpo.steps=2", "stages.dpo.evaluate.rows=4"]
    return load_recipe(str(recipes()[f"pipelines/{name}"]), said)


@pytest.fixture(scope="module")
def sft_dpo(tiny, sources, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("pipelines") / "all"
    run(small("sft_dpo", tiny, sources, folder), console=Console(quiet=True))
    return folder


def steps(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train"]


def summed(path, row):
    """The log-probability of the chosen answer to a row's prompt, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = [{"role": "user", "content": f"hello world {row}"}]
    begin = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(begin, add_special_tokens=False)["input_ids"]
    said = tokenizer(f"{SAID}<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
    return sum(logps[len(asked) - 1 + at, token].item() for at, token in enumerate(said))


def test_the_reference_of_dpo_is_what_sft_made_and_not_the_base(sft_dpo, tiny):
    """Beta times the log of the policy over the reference is the reward that is told: so what the reference says."""
    table = list(map(json.loads, (sft_dpo / "dpo/predictions.jsonl").read_text().splitlines()))
    for line in table[:2]:
        row = int(line["text"].partition("hello world ")[2].split("<")[0].split()[0])
        told = line["scores"]["logps_chosen"] - line["scores"]["reward_chosen"] / 0.1
        learned, base = summed(sft_dpo / "merged/model", row), summed(tiny, row)
        assert abs(learned - base) > 1
        assert told == pytest.approx(learned, abs=1e-3)
    first, *rest = steps(sft_dpo / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and rest[-1]["loss"] < first["loss"]


def test_a_pipeline_that_is_done_is_left_alone(sft_dpo, tiny, sources):
    before = {path: path.stat().st_mtime_ns for path in sft_dpo.rglob("*.safetensors")}
    run(small("sft_dpo", tiny, sources, sft_dpo), console=Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in sft_dpo.rglob("*.safetensors")} == before and len(before) >= 3


@pytest.mark.parametrize("name", ["sft_grpo", "sft_constitutional_dpo", "sft_reward_ppo"])
def test_a_pipeline_runs_from_end_to_end(name, tiny, sources, tmp_path):
    recipe = small(name, tiny, sources, tmp_path / "all")
    run(recipe, console=Console(quiet=True))
    for stage, node in recipe.stages:
        assert read_status(Path(node.out))["state"] == "done", stage
    page = (tmp_path / "all/report.html").read_text()
    assert all(f'href="{stage}/report.html"' in page for stage, node in recipe.stages if node.kind != "merge")
    last = [stage for stage, node in recipe.stages if node.kind in ("policy", "ppo", "preference")][-1]
    assert (tmp_path / "all" / last / "model/adapter_config.json").is_file()
    if name == "sft_reward_ppo":
        asked = (tmp_path / "all/ppo/rollouts.jsonl").read_text().splitlines()
        assert all("model" in json.loads(line)["rewards"] for line in asked)
        assert (tmp_path / "all/ppo/critic").is_dir()
    elif name == "sft_grpo":
        assert (tmp_path / "all/grpo/rollouts.html").is_file() and steps(tmp_path / "all/grpo")[0]["kl"] < 1e-9
    else:
        rows = (tmp_path / "all/rows/report.html").read_text()
        assert "objections" in page and "Critique and revision" in rows
        assert steps(tmp_path / "all/dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
