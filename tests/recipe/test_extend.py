"""`extends`: order, and the ends of the rope."""

import pytest

from llmkit.core.errors import RecipeError
from llmkit.recipe.load import load_recipe


def test_a_list_of_files_is_laid_over_from_left_to_right(write, good):
    write(good, "base.yaml")
    write("seed: 1\nsteps: 5\n", "one.yaml")
    write("seed: 2\n", "two.yaml")
    node = load_recipe(write("extends: [base.yaml, one.yaml, two.yaml]\nout: z\n")).stages[0][1]
    assert (node.seed, node.steps, node.out) == (2, 5, "z")


def test_files_are_found_from_the_file_that_names_them(write, good, tmp_path):
    (tmp_path / "deep").mkdir()
    write(good, "base.yaml")
    write("extends: ../base.yaml\nseed: 4\n", "deep/middle.yaml")
    recipe = load_recipe(write("extends: deep/middle.yaml\n"))
    assert recipe.stages[0][1].seed == 4 and str(recipe.origins["seed"]) == "deep/middle.yaml:2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: r.yaml\n", "r.yaml:1:10: extends: goes in a circle: r.yaml -> r.yaml"),
        ("extends:\n", "extends: is not a file or a list of files"),
        ("extends: [[a]]\n", "extends: is not a file or a list of files"),
        ("extends: nothing.yaml\n", "nothing.yaml does not exist (r.yaml -> nothing.yaml)"),
        ("extends: ../x.yaml\n", "lies outside"),
    ],
)
def test_r8_what_cannot_be_extended_is_told_with_the_chain(text, said, problems):
    assert said in problems(text)[0]


def test_r8_a_recipe_elsewhere_must_stay_in_its_own_folder(write, good, tmp_path, monkeypatch):
    write(good, "base.yaml")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write("extends: ../base.yaml\n", "a/child.yaml")
    assert load_recipe(tmp_path / "a" / "child.yaml").stages[0][1].kind == "sft"
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(RecipeError, match="lies outside a"):
        load_recipe(tmp_path / "a" / "child.yaml")


def test_r4_files_that_extend_each_other_twice_over_end(write, problems):
    for index in range(12):
        write(f"extends: [f{index + 1}.yaml, f{index + 1}.yaml]\n", f"f{index}.yaml")
    write("seed: 1\n", "f12.yaml")
    assert "more than 100 files are read" in problems("extends: f0.yaml\n")[0]


def test_r7_a_contradiction_over_two_files_names_both(write, good, problems):
    write(good + "steps: 5\n", "base.yaml")
    assert problems("extends: base.yaml\n\nepochs: 2\n")[0].startswith(
        "r.yaml:3:9: epochs: contradicts steps (base.yaml:7): "
    )
    write("extends: base.yaml\n", "r.yaml")
    assert problems("extends: base.yaml\n", ["epochs=2"])[0].startswith("epochs: contradicts steps (base.yaml:7): ")


def test_another_kind_than_the_one_extended_is_told_as_such(write, good, problems):
    write(good, "base.yaml")
    assert problems("extends: base.yaml\nkind: merge\n") == [
        "r.yaml:2:7: kind: is merge, and what it extends is sft (base.yaml:2); fix: extend a recipe of the same kind"
    ]
