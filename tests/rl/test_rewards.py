"""What answers are worth: values by hand, and what a hostile answer or a broken reward comes to."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import ClassVar

import pytest
from rated import sample

from llmkit.core.errors import DataError, RecipeError
from llmkit.rl.bench import Bench
from llmkit.rl.format import sections
from llmkit.rl.maths import boxed
from llmkit.rl.rewards_node import Exact, Format, Length, Maths, Pattern, Schema, names
from llmkit.rl.sample import Fault
from llmkit.rl.scoring import score
from llmkit.rl.shapes_node import AtMost, Overlong, Target
from llmkit.rl.workers import Workers


def test_mathematics_is_compared_by_its_worth(bench):
    cases = [
        ("72", "so there are 72 of them.", 1),
        (72, r"\boxed{72}", 1),
        ("Natalia sold 48 / 2 = 24 clips.\n#### 72", "The answer is 72", 1),
        ("1/2", r"$\frac{1}{2}$", 1),
        (r"\frac{1}{2}", "0.5", 1),
        (r"$\frac{2\pi}{3}$", r"\boxed{\frac{2 \pi}{3}}", 1),
        ("x=3", r"\boxed{3}", 1),
        ("[0, 1)", r"\boxed{[0,1)}", 1),
        ("[0, 1)", r"\boxed{[0,1]}", 0),
        ("72", r"first \boxed{72}, no: \boxed{73}", 0),
        ("72", "I do not know", 0),
        ("72", "", 0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1),
    ]
    found = score([Maths()], [sample(said, answer) for answer, said, _ in cases], bench)
    assert list(found.total) == [right for *_, right in cases]


def test_only_what_is_boxed_counts_where_that_is_asked(bench):
    said = [
        sample(text, "7") for text in ("it is 7", r"it is 8, \boxed{7}", r"\boxed{\text{is } 7", r"7 and \boxed{8}")
    ]
    assert score([Maths(where="boxed")], said, bench).total == (0, 1, 0, 0)
    assert boxed(r"a \boxed{\frac{1}{2}} b") == r"\frac{1}{2}" and boxed("{}") is None


def test_a_row_without_a_reference_is_an_error_that_names_it(bench):
    for row, why in (({}, "no column answer"), ({"answer": None}, "is empty"), ({"answer": [1]}, "holds no text")):
        with pytest.raises(DataError, match=f"rows.jsonl:9: reward \\(math\\): answer 1 .*{why}"):
            score([Maths(failed=0.0)], [sample("1", "1"), sample("1", line=9, row=row)], bench)
    with pytest.raises(DataError, match="holds no mathematics: 'none at all'"):
        score([Maths(failed=0.0)], [sample("1", "none at all")], bench)


def test_an_answer_that_takes_for_ever_is_an_error_with_its_row_and_the_others_are_scored():
    said = [sample("3", "3"), sample("9^9^9^9", "3", prompt="what is it?", line=2), sample("3", "3")]
    with Bench() as bench:
        began = time.monotonic()
        with pytest.raises(DataError) as caught:
            score([Maths(timeout=1.0)], said, bench)
        assert str(caught.value).startswith(
            "rows.jsonl:2: reward (math): answer 1 (to 'what is it?'): took more than 1 s"
        )
        found = score([Maths(timeout=1.0, failed=-1.0)], said, bench)
        assert found.total == (1, -1, 1) and found.failed == {"math": 1}
        assert found.figures()["reward.math.failed"] == pytest.approx(1 / 3)
        assert time.monotonic() - began < 60


def test_a_pattern_that_backtracks_for_ever_is_ended():
    hostile = [sample("a" * 64 + "!"), sample("aaa")]
    with Bench() as bench:
        began = time.monotonic()
        found = score([Pattern(pattern="(a+)+$", timeout=0.5, failed=0.0)], hostile, bench)
        assert found.total == (0, 1) and found.failed == {"regex": 1}
        with pytest.raises(DataError, match="took more than 0.5 s"):
            score([Exact(extract="(a+)+$", timeout=0.5)], [sample("a" * 64 + "!", "x")], bench)
        assert time.monotonic() - began < 20


def test_a_pattern_is_found_or_matches_all(bench):
    said = [sample("it is 42."), sample("42"), sample("none")]
    assert score([Pattern(pattern=r"\d+")], said, bench).total == (1, 1, 0)
    assert score([Pattern(pattern=r"\d+", whole=True)], said, bench).total == (0, 1, 0)
    with pytest.raises(RecipeError, match="pattern: '\\(' is no regular expression"):
        Pattern(pattern="(")


def test_a_text_is_compared_with_a_column(bench):
    said = [sample(text, "New York") for text in ("New  York\n", "new york", "New York!", "York")]
    assert score([Exact()], said, bench).total == (1, 0, 0, 0)
    loose = Exact(ignore=("space", "case", "punctuation"))
    assert score([loose], said, bench).total == (1, 1, 1, 0)
    assert score([Exact(ignore=())], said, bench).total == (0, 0, 0, 0)
    last = [sample("A: 3. No, A: 4", "A: 4"), sample("A: 4. No, A: 3", "4"), sample("four", "4")]
    assert score([Exact(extract=r"A: (\d)")], last, bench).total == (1, 0, 0)


SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}'
)


def test_json_is_held_to_a_schema(bench):
    texts = ['{"n": 1}', ' {"n": 1}\n', '{"n": 1.5}', '{"n": 1, "m": 2}', '{"n": 1, "n": 2}', '{"n": NaN}', "n", ""]
    texts += ["[" * 100_000, '{"n": ' + "9" * 10_000 + "}", '```json\n{"n": 1}\n```']
    found = score([Schema(schema=SCHEMA)], [sample(text) for text in texts], bench)
    assert found.total == (1, 1, *[0] * 9)
    fenced = ['so:\n```json\n{"n": 1}\n```', '{"n": 1}', '```\n{"n": 1}\n```\n```\n{}\n```']
    assert score([Schema(schema=SCHEMA, where="fenced")], [sample(t) for t in fenced], bench).total == (1, 0, 0)


def test_a_schema_is_read_from_a_file_fetches_nothing_and_is_checked(bench, tmp_path):
    (tmp_path / "s.json").write_text(SCHEMA)
    assert score([Schema(path=str(tmp_path / "s.json"))], [sample('{"n": 1}')], bench).total == (1,)
    with pytest.raises(DataError, match="answer 0 .*Unresolvable"):
        score([Schema(schema='{"$ref": "http://127.0.0.1:9/s.json"}')], [sample("1")], bench)
    with pytest.raises(RecipeError, match="reward.schema: is no JSON schema \\('no' is not valid"):
        score([Schema(schema='{"type": "no"}')], [], bench)
    with pytest.raises(RecipeError, match="reward.path: .* cannot be read"):
        score([Schema(path=str(tmp_path / "none.json"))], [], bench)
    with pytest.raises(RecipeError, match="neither schema nor path"):
        Schema()


def test_a_hostile_pattern_in_a_schema_is_ended():
    with Bench() as bench, pytest.raises(DataError, match="took more than 0.5 s"):
        schema = Schema(schema='{"pattern": "^(a+)+$"}', timeout=0.5)
        score([schema], [sample('"' + "a" * 64 + '!"')], bench)


def test_lengths_by_hand():
    assert [Target(length=10, slack=5).worth(n) for n in (10, 8, 12, 5, 15, 0, 99)] == [1, 0.6, 0.6, 0, 0, 0, 0]
    assert [AtMost(length=3).worth(n) for n in (0, 3, 4)] == [1, 1, 0]
    assert [Overlong(length=100, soft=20).worth(n) for n in (0, 80, 81, 90, 100, 101)] == [0, 0, -0.05, -0.5, -1, -1]
    assert [Overlong(length=100, soft=0).worth(n) for n in (100, 101)] == [0, -1]
    with pytest.raises(RecipeError, match="soft: contradicts length"):
        Overlong(length=3, soft=4)


@pytest.mark.slow
def test_overlong_is_trls():
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(64, 16)
    lengths = range(0, 80)
    assert theirs([[1] * n for n in lengths]) == [Overlong(length=64, soft=16).worth(n) for n in lengths]


def test_units_of_length(bench):
    said = [sample("two words", token_ids=(1, 2, 3, 4, 5))]
    for unit, right in (("tokens", 5), ("characters", 9), ("words", 2)):
        assert score([Length(shape=Target(length=right, slack=1), unit=unit)], said, bench).total == (1,)
    with pytest.raises(DataError, match="tells no tokens"):
        score([Length(shape=AtMost(length=3))], [sample("two words")], bench)


@pytest.mark.parametrize(
    "text, right",
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a</think>\n <answer>b</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think><answer>b</answer> more", 0),
        ("hm <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> and <answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("", 0),
    ],
)
def test_sections(text, right):
    assert sections(text, ("think", "answer"), rest=False) == right


def test_sections_may_be_begun_by_the_prompt_and_be_followed_by_text(bench):
    assert sections("a</think> b", ("think",), rest=True, begun=True) == 1
    assert sections("<think>a</think> b", ("think",), rest=True, begun=True) == 0
    assert score([Format(tags=("think",), rest=True)], [sample("<think>a</think> b")], bench).total == (1,)
    with pytest.raises(RecipeError, match="tags: is no list of different names"):
        Format(tags=("a", "a"))


def test_sections_take_a_time_in_proportion_to_the_length():
    began = time.monotonic()
    for text in ("<think>" * 200_000, "<think>" + "</think" * 200_000, " " * 2_000_000):
        assert sections(text, ("think", "answer"), rest=False) == 0
    assert time.monotonic() - began < 2


def test_a_weighted_sum_with_its_parts_under_names_of_their_own(bench):
    rewards = [Pattern(pattern="a", weight=2.0), Pattern(pattern="b", weight=-0.5), Pattern(pattern="c", name="sea")]
    assert names(rewards) == ["regex", "regex_2", "sea"]
    found = score(rewards, [sample("ab"), sample("c"), sample("abc")], bench)
    assert found.total == (1.5, 1.0, 2.5) and found.each["regex_2"] == (1, 0, 1)
    told = found.figures()
    assert told["reward"] == pytest.approx(5 / 3) and told["reward.sea"] == pytest.approx(2 / 3)


def test_scores_that_are_no_finite_number_are_errors_whatever_is_said_of_failures(bench):
    class Broken(Pattern):
        value: ClassVar[float]

        def score(self, samples, bench):
            return [1.0, self.value, Fault("is odd")]

    for Broken.value in (math.nan, math.inf):
        with pytest.raises(DataError, match=f"answer 1 .*: has the score {Broken.value}"):
            score([Broken(pattern="a", failed=0.0)], [sample("a")] * 3, bench)
    Broken.value = -1e308
    with pytest.raises(DataError, match="reward .*: answer 1 .*: has the score -1e\\+308, of which no loss"):
        score([Broken(pattern="a", failed=0.0)], [sample("a")] * 3, bench)
    Broken.value = 0.0
    assert score([Broken(pattern="a", failed=-2.0)], [sample("a")] * 3, bench).total == (1, 0, -2)


def test_nothing_to_score_opens_what_is_needed_and_is_no_sum(bench):
    found = score([Pattern(pattern="a")], [], bench)
    assert found.total == () and found.each == {"regex": ()}
    assert score([], [sample("a")], bench).total == ()


def test_several_processes_score_in_order_and_each_outlives_its_answers():
    node = Pattern(pattern="(a+)+$", timeout=0.5, failed=-1.0)
    workers = Workers(asdict(node), node.timeout, node.sent, 3)
    try:
        said = [sample(text) for text in ("a", "b", "a" * 64 + "!", "aa", "c", "aaa", "a" * 64 + "!", "d")]
        for _ in range(2):
            found = workers.each(said, stop=False)
            assert [one if isinstance(one, float) else "late" for one in found] == [1, 0, "late", 1, 0, 1, "late", 0]
        assert [worker.process is not None for worker in workers.workers] == [False, True, True]  # the first ended
    finally:
        workers.close()
    assert not any(worker.process for worker in workers.workers)


def test_many_answers_take_little_time(bench):
    said = [sample(f"the answer is {n}", str(n)) for n in range(512)]
    score([Maths(), Pattern(pattern="answer")], said[:1], bench)
    began = time.monotonic()
    assert score([Maths(), Pattern(pattern="answer")], said, bench).total == (2.0,) * 512
    assert time.monotonic() - began < 20  # 0.4 s on two idle cores


def test_threads_that_share_a_bench_score_in_turn():
    """Their answers come by the same lines of one process."""

    class Slow:
        name, kind, weight, failed = "slow", "slow", 1.0, None
        inside, most = 0, 0

        def score(self, samples, bench):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.02)
            self.inside -= 1
            bench.told = {"of": float(len(samples))}
            return [1.0] * len(samples)

    slow, counts = Slow(), [1, 2, 3, 4]
    with Bench() as bench, ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: score([slow], [sample("a")] * n, bench), counts))
    assert slow.most == 1
    assert [one.told["slow.of"] for one in made] == counts
