"""Recipes for clusters carry their plan in their header: `python -m tests.recipe.test_cluster_recipes` writes it."""

import re
from pathlib import Path

import pytest

from llmkit.recipe.load import load_recipe
from llmkit.recipe.shipped import recipes
from llmkit.stages.planned import planned

NAMES = [name for name in recipes() if name.startswith("cluster/")]
ASKED = re.compile(r"^# llmkit plan (\S+) --device (\S+) --ranks (\d+):$", re.M)


def header(path):
    """The comment that a recipe should begin with, and its plan."""
    text = path.read_text()
    _, device, ranks = ASKED.search(text).groups()
    ((_, node),) = load_recipe(str(path)).stages
    made = planned(node, device, int(ranks))
    said = text[: ASKED.search(text).end()]
    return "\n".join([said, *(f"#   {line}" for line in made.lines())]) + "\n", made


def body(path):
    return re.sub(r"\A(#.*\n)+", "", path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_its_header_says_its_plan_and_it_fits(name):
    path = recipes()[name]
    wanted, made = header(path)
    assert path.read_text() == wanted + body(path)
    assert made.choice.fits and made.times.tokens > 0
    assert ASKED.search(path.read_text())[1] == path.name


def test_there_is_one_of_each_kind_and_size():
    for size in ("8b", "70b"):
        for way in ("full", "lora", "qlora", "grpo", "ppo"):
            assert any(f"{size}-{way}-" in name for name in NAMES)
        assert any(f"llama3.1-{size}" in name and re.search(r"\dx8gpu", name) for name in NAMES)


if __name__ == "__main__":
    for each in NAMES:
        place = Path(recipes()[each])
        place.write_text(header(place)[0] + body(place))
