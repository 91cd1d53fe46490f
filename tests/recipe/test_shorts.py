"""Kinds that are short for a stage with a loss."""

import pytest

from llmkit.core.errors import RecipeError
from llmkit.recipe.kinds import SHORT
from llmkit.recipe.load import digest, load_recipe

BODY = """
model: smollm2-135m-instruct-q4
data: {train: [{kind: docstrings, pairs: true}]}
out: runs/x
"""


def read(tmp_path, text, overrides=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides).stages


REWARD = "reward: [{kind: format}]\n"


@pytest.mark.parametrize("kind", SHORT)
def test_a_loss_names_its_stage(kind, tmp_path):
    stage = SHORT[kind].kind
    body = BODY + (REWARD if stage == "policy" else "")
    ((_, node),) = read(tmp_path, f"kind: {kind}" + body)
    assert (node.kind, node.loss.kind) == (stage, kind)
    ((_, whole),) = read(tmp_path, f"kind: {stage}\nloss: {kind}" + body)
    assert digest(node) == digest(whole)


def test_the_loss_keeps_its_keys_and_overrides(tmp_path):
    ((_, node),) = read(tmp_path, "kind: dpo\nloss: {label_smoothing: 0.1}" + BODY, ["loss.beta=0.3"])
    assert (node.loss.beta, node.loss.label_smoothing) == (0.3, 0.1)
    staged = (
        "out: runs/x\ndefaults: {seed: 3}\nstages:\n- {name: a, kind: simpo, model: m, data: {train: [docstrings]}}"
    )
    ((_, node),) = read(tmp_path, staged)
    assert (node.kind, node.loss.kind, node.seed) == ("preference", "simpo", 3)


def test_two_losses_are_one_too_many(tmp_path):
    with pytest.raises(RecipeError, match="loss: is ipo, and kind dpo names the loss already") as caught:
        read(tmp_path, "kind: dpo\nloss: ipo" + BODY)
    assert len(caught.value.problems) == 1
