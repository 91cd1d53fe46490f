"""Which answers become rows."""

from llmkit.rl.kept_node import Above, Best, BestWorst, Rated

FOUR = [Rated(text, score, {"regex": score}) for text, score in (("a", 0.5), ("b", 1.0), ("c", 1.0), ("b", 1.0))]


def test_the_best_are_kept_once_each_and_of_equals_the_first():
    assert Best().rows(FOUR) == [{"completion": "b", "score": 1.0, "scores": {"regex": 1.0}}]
    assert [row["completion"] for row in Best(count=9).rows(FOUR)] == ["b", "c", "a"]


def test_all_above_a_bar_are_kept():
    assert [row["completion"] for row in Above(bar=1.0).rows(FOUR)] == ["b", "c"]
    assert [row["completion"] for row in Above(bar=0.5, most=2).rows(FOUR)] == ["b", "c"]
    assert Above(bar=1.5).rows(FOUR) == []


def test_the_best_and_the_worst_are_a_pair_where_they_differ():
    assert BestWorst().rows(FOUR) == [{"chosen": "b", "rejected": "a", "score_chosen": 1.0, "score_rejected": 0.5}]
    assert BestWorst(gap=0.5).rows(FOUR) == [] == BestWorst().rows(FOUR[1:])
