"""Losses and environments of the user's own in whole runs: the examples of the pages are our own losses to the bit."""

import re
from pathlib import Path

import pytest

from llmkit import run
from llmkit.core.console import Console
from llmkit.core.errors import RecipeError
from llmkit.core.own import OwnError
from llmkit.core.run import Grants
from llmkit.recipe.load import load_recipe
from tests.stages.drawn import go, lines_of, policy, steps_of
from tests.stages.test_preference import pairs, preference

__all__ = ["pairs"]
DOCS = Path(__file__).parents[2] / "docs"
ALLOWED = Grants(python=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()  # of what is allowed alone: kernels are compiled into the other one
    monkeypatch.setattr("llmkit.core.usercode.cache", lambda: tmp_path / "cache")


def shown(page, name):
    """The example of a page that defines this name, as it stands."""
    blocks = re.findall(r"```python\n# my.py\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    return next(block for block in blocks if f"def {name}(" in block or f"class {name}:" in block)


def written(place, page, name):
    (place / "my.py").write_text(shown(page, name))
    return {"kind": "python", "ref": f"{place}/my.py:{name}"}


def weights(artifact):
    return (artifact.model() / "adapter_model.safetensors").read_bytes()


def test_the_pages_dpo_is_ours_to_the_bit(tiny, pairs, tmp_path):
    loss = written(tmp_path, "preference.md", "dpo")
    own, ours = (
        go(preference(tiny, pairs, tmp_path / name, loss=loss, steps=2, micro_batch=2), grants=ALLOWED)
        for name, loss in (("own", loss), ("ours", {"kind": "dpo", "beta": 0.1}))
    )
    assert lines_of(own.folder) == lines_of(ours.folder) and weights(own) == weights(ours)
    assert "reward_margin" in steps_of(own.folder)[0]


def test_the_pages_grpo_is_ours_to_the_bit(tiny, asked, tmp_path):
    loss = written(tmp_path, "policy.md", "grpo")
    more = {"rollout": {"group": 4, "max_tokens": 6, "reuse": 2}, "steps": 2}
    own, ours = (
        go(policy(tiny, asked, tmp_path / name, loss={**loss, "beta": 0.1}, **more), grants=ALLOWED)
        for name, loss in (("own", loss), ("ours", {"kind": "grpo"}))
    )
    for one, other in zip(steps_of(own.folder), steps_of(ours.folder), strict=True):
        assert {**one, "clipped": 0} == {**other, "clipped": 0, "held": one["held"]} and one["held"] >= other["clipped"]
    assert weights(own) == weights(ours) and steps_of(own.folder)[1]["ratio"] != 1
    assert lines_of(own.folder, "rollouts.jsonl") == lines_of(ours.folder, "rollouts.jsonl")


LATER = "\nplain, seen = {name}, []\ndef {name}(*said):\n    seen.append(1)\n"
LATER += "    if len(seen) > {calls}:\n        raise ValueError('no')\n    return plain(*said)\n"


def test_what_is_raised_later_names_the_step_and_going_on_with_another_file_is_refused(tiny, pairs, tmp_path):
    loss, file = written(tmp_path, "preference.md", "dpo"), tmp_path / "my.py"
    file.write_text(file.read_text() + LATER.format(name="dpo", calls=3))  # tried, evaluated, a step
    node = preference(tiny, pairs, tmp_path / "run", loss=loss, steps=3, checkpoint={"every": 1}, micro_batch=8)
    with pytest.raises(
        OwnError, match=r"loss.ref: step 2: .*my.py:dpo raised ValueError: no \(.*my.py:\d+\); fix: mend"
    ):
        go(node, grants=ALLOWED)
    assert len(steps_of(tmp_path / "run")) == 1
    file.write_text(shown("preference.md", "dpo"))
    with pytest.raises(RecipeError, match="my.py:dpo runs code of yours .* nobody allowed yet"):
        go(node)
    with pytest.raises(RecipeError, match="--accept loss.ref.sha256"):
        go(node, grants=ALLOWED)
    assert go(node, grants=Grants(accept=("loss.ref",))).manifest["step"] == 3  # allowed by now


RECIPE = """model: {model}
out: out
defaults:
  data: {{train: [{{kind: jsonl, path: {rows}}}], max_length: 48}}
  steps: 1
stages:
- name: first
  kind: sft
- name: second
  kind: preference
  loss:
    kind: mixture
    parts:
    - loss: dpo
    - {{loss: {{kind: python, ref: ./my.py:dpo}}, weight: 0.5}}
  model: ${{stages.first}}
"""


def test_a_pipeline_is_told_of_a_broken_part_before_its_first_stage(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("def dpo(policy, reference):\n    return policy.chosen.mean()\n")
    text = RECIPE.format(model=tiny, rows=pairs).replace(f"model: {tiny}\nout", "out", 1)
    Path("r.yaml").write_text(text.replace("  kind: sft", f"  kind: sft\n  model: {tiny}"))
    with pytest.raises(OwnError) as caught:
        run(load_recipe("r.yaml"), console=Console(quiet=True), grants=ALLOWED)
    said = str(caught.value)
    assert re.match(r"r.yaml:15:\d+: stages.second.loss.parts.1.loss.ref: ./my.py:dpo gave losses of shape", said), said
    assert not Path("out").exists()
