"""Prompts with the other columns of their rows, and completions behind them."""

import json
import re

import numpy as np
import pytest

from llmkit.core.errors import DataError, RecipeError
from llmkit.data import arithmetic
from llmkit.data.asked import asked_of
from llmkit.data.node import Data
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer
from llmkit.data.rolled import figures, rolled, spread_out
from llmkit.data.rows import BadRow, bounded
from llmkit.data.source_nodes import Arithmetic, Jsonl
from tests.conftest import make_tokenizer

MESSAGES = [{"role": "user", "content": "hello world"}]


def read(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Jsonl(path=str(path))
    return asked_of([source], Data(train=(source,), **({"max_length": 64} | more)), make_tokenizer())


def test_a_prompt_is_what_the_model_is_asked_in_use(tmp_path):
    rows = [
        {"prompt": "a text", "answer": "1", "level": 3},
        {"prompt": MESSAGES, "answer": "2"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "given"}], "source": "x"},
        {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "long"}], "answer": "short"},
        {"prompt": "a text", "completion": "given"},
    ]
    made = read(tmp_path, rows)
    renderer = Renderer(make_tokenizer())
    for at, asked in enumerate(["a text", MESSAGES, MESSAGES, MESSAGES, "a text"]):
        ids, weights = made.example(at)
        assert ids.tolist() == prompt_ids(renderer, asked)
        assert not weights.any()
    assert list(made.columns) == [
        {"answer": "1", "level": 3},
        {"answer": "2"},
        {"answer": "given", "source": "x"},
        {"answer": "short"},
        {"answer": "given"},
    ]
    assert [row.question for row in made.rows][:2] == ["a text", tuple(MESSAGES)]
    assert made.places[1][1] == 2


def test_a_system_message_is_put_before(tmp_path):
    made = read(tmp_path, [{"prompt": MESSAGES}], system="be brief")
    assert made.rows[0].question[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize("prompt", [5, {}, [], ["a"]])
def test_a_prompt_that_is_none_is_called_so(tmp_path, prompt):
    with pytest.raises(DataError, match="prompt is no text and no list of messages 1"):
        read(tmp_path, [{"prompt": prompt}])


def test_a_share_that_leaves_no_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    file = Jsonl(path=str(tmp_path / "rows.jsonl"))
    most, few = (Data(train=(file,), held_out={"share": share}) for share in (0.999, 0.0001))
    with pytest.raises(DataError, match=r"data.train: holds no rows: data.held_out=0.999 takes them all; fix: lower"):
        asked_of(most.sources("train"), most, make_tokenizer())
    with pytest.raises(DataError, match=r"data.valid: holds no rows: data.held_out=0.0001 takes none of them; fix: r"):
        asked_of(few.sources("valid"), few, make_tokenizer(), "data.valid")
    (tmp_path / "rows.jsonl").write_text("")
    for key in ("data.train", "data.valid", "data"):
        with pytest.raises(DataError, match=rf"rows.jsonl: {key}: holds no rows; fix: give a file"):
            asked_of(few.sources("valid"), few, make_tokenizer(), key)


def test_what_asks_nothing_is_counted_and_too_many_are_refused(tmp_path):
    bad = [{"prompt": " "}, {"text": "only a text"}, {"prompt": [{"role": "assistant", "content": "x"}]}]
    with pytest.raises(DataError, match="3 of 4 rows cannot be used"):
        read(tmp_path, [{"prompt": "a"}, *bad])
    made = read(tmp_path, [{"prompt": "a"}, *bad], bad_share=0.9)
    assert len(made) == 1
    assert made.columns == [{}]
    short = read(tmp_path, [{"prompt": "a"}, {"prompt": "hello " * 99}])
    assert short.counts["too long: no room for an answer"] == 1


def test_a_prompt_of_another_name_is_asked_for_alone(tmp_path):
    way = r"no prompt or messages, and its columns are question, solution\); fix: map it: columns: \{prompt: question\}"
    with pytest.raises(DataError, match=way):
        read(tmp_path, [{"question": "hello world", "solution": "x"}])


def test_completions_lie_behind_their_prompts(tmp_path):
    asked = read(tmp_path, [{"prompt": "one"}, {"prompt": "two three"}])
    made = rolled(asked, [1, 0], [[(5, 6), (7,)], [(8, 9, 2)]], [[[1.0, 1.0], [0.0]], [[1.0, 1.0, 1.0]]], [2.0, 1.0])
    made = type(made)(
        **{name: getattr(made, name) for name in made.__dataclass_fields__}
        | {"each": {"old": spread_out(made, [[0.5, 0.6], [0.7], [1.0, 2.0, 3.0]])}, "per": figures({"x": [1, 2, 3]})}
    )
    ids = np.asarray(made.ids)
    assert [ids[a:b].tolist() for i in range(2) for a, b in made.completions(i)] == [[5, 6], [7], [8, 9, 2]]
    first = made.completions(0)[0][0]
    assert ids[:first].tolist() == asked.example(1)[0].tolist()
    assert made.each["old"][first : first + 3].tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert [made.supervised(i) for i in range(2)] == [2.0, 1.0]
    assert np.asarray(made.weights)[first : first + 3].tolist() == [1.0, 1.0, 0.0]


def test_sums_are_right_and_splits_share_none():
    found = {}
    for split in ("train", "valid"):
        rows = list(arithmetic.read(split, 300, 20))
        assert rows == list(arithmetic.read(split, 300, 20))
        found[split] = {row.values["prompt"][0]["content"] for row in rows}
        for row in rows:
            asked = row.values["prompt"][0]["content"].removeprefix("What is ").split("?")[0]
            left, sign, right = asked.split()
            result = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert row.values["answer"] == str(result)
            assert row.values["completion"][0]["content"] == f"<answer>{result}</answer>"
    assert not found["train"] & found["valid"]
    assert len(found["train"]) > 150
    whole = list(Arithmetic(take=20).rows())
    assert list(Arithmetic(take=20).rows(whole[7].at)) == whole[8:]


def test_pairs_of_sums_have_a_right_side_and_wrong_ones_of_three_kinds():
    rows, pairs = (list(Arithmetic(take=60, most=20, pairs=pairs).rows()) for pairs in (False, True))
    seen = set()
    for row, pair in zip(rows, pairs, strict=True):
        (chosen,), (rejected,) = pair.values["chosen"], pair.values["rejected"]
        assert pair.values["prompt"] == row.values["prompt"] and [chosen] == row.values["completion"]
        said, right = rejected["content"], row.values["answer"]
        kind = "number" if said.startswith("<answer>") else "tags" if said == right else "words"
        seen.add(kind)
        assert said != chosen["content"] and (kind == "tags" or right not in re.findall(r"-?\d+", said))
    assert seen == {"number", "tags", "words"}
    assert next(iter(Arithmetic(take=20, pairs=True).rows(pairs[7].at))).at == (9,)


def test_no_more_sums_are_shown_than_a_row_holds():
    (row,) = Arithmetic(take=1, shown=511).rows()
    assert bounded(row) is row
    with pytest.raises(RecipeError, match="shown: 512 .* at most 511"):
        Arithmetic(take=1, shown=512)
    assert isinstance(bounded(next(arithmetic.read("train", 1, 20, shown=512))), BadRow)


def test_sums_that_are_shown_are_the_same_before_each_and_none_is_held_out():
    shown, plain = (list(arithmetic.read("valid", 100, 20, shown=shown)) for shown in (2, 0))
    before = shown[0].values["prompt"][:4]
    taught = {row.values["prompt"][0]["content"] for row in arithmetic.read("train", 2, 20)}
    assert {turn["content"] for turn in before[::2]} == taught
    assert not taught & {row.values["prompt"][0]["content"] for row in plain}
    for row, alone in zip(shown, plain, strict=True):
        assert row.values == alone.values | {"prompt": before + alone.values["prompt"]}
