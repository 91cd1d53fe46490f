"""The resolved recipe: what is shown reads back as the same, whatever text it holds."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.recipe.load import Recipe, load_recipe
from llmkit.recipe.show import resolved
from llmkit.stages.sft import Sft

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf", "Zl", "Zp", "Cn"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(["no", "1e-5", "012", "~", "2024-01-02", "a: b", "# c", "'", '"', "- x", " a ", "{", "y"])
    | TEXT.filter(lambda text: "${" not in text),
    column=st.text("abc ~#:-'\"0", min_size=1, max_size=6),
    lr=st.floats(1e-30, 1e30),
    steps=st.none() | st.integers(1, 10**9),
)
def test_any_text_and_number_reads_back(text, column, lr, steps, tmp_path_factory):
    train = [{"kind": "jsonl", "path": text, "columns": {"text": column}}]
    node = Sft(model=text, data={"train": train}, optim={"kind": "adamw", "lr": lr}, steps=steps, out="x")
    path = tmp_path_factory.mktemp("show") / "r.yaml"
    path.write_text(resolved(Recipe((("", node),), {})), "utf-8")
    assert load_recipe(path).stages[0][1] == node


def test_every_line_with_a_value_says_where_it_came_from(write, good):
    text = resolved(load_recipe(write(good + "log: [tensorboard]\n"), ["seed=4"]))
    assert all(re.search(r":$|  # (default|command line|r\.yaml:\d+)$", line) for line in text.splitlines())
    assert "seed: 4  # command line" in text and "    - kind: jsonl  # r.yaml:5" in text
