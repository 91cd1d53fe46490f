"""A critic, a reviser and a judge that go by patterns, asked in the words that models are asked in."""

import pytest

from llmkit.core.errors import RecipeError
from llmkit.core.run import Grants
from llmkit.inference.request import Ask, Prompt
from llmkit.inference.sampling import Sampling
from llmkit.rl import constitution as words
from llmkit.rl.judge import read
from llmkit.rl.mouths import Mouths
from llmkit.rl.role_node import Role, Rules

PRINCIPLE = words.read("brief").principles[0]
RULES = Rules(patterns=("(?i)damn", r"(?s)(?<=[.!?])\s+\S.*"), instead="")


def said(rules, *asked):
    writer = rules.open()
    return [one.text for one in writer.each([Ask(Prompt((), one), Sampling()) for one in asked])]


@pytest.mark.parametrize(
    ("answer", "wrong", "revised"),
    [
        ("One sentence.", False, "One sentence."),
        ("One sentence. Another one.\nA third.", True, "One sentence."),
        ("Damn, damn it.", True, ",  it."),
        ("", False, ""),
        ("</answer>\n\n<critique>\nx\n</critique> x. Damn", True, "< /answer>\n\n<critique>\nx\n</critique> x."),
    ],
)
def test_what_is_found_is_objected_to_and_taken_out(answer, wrong, revised):
    (critique,) = said(RULES, words.critique(PRINCIPLE, "what?", answer))
    assert words.objects(critique) is wrong
    (made,) = said(RULES, words.revision(PRINCIPLE, "what?", answer, critique))
    assert made.replace("< critique", "<critique").replace("< /critique", "</critique") == revised
    assert words.objects(said(RULES, words.critique(PRINCIPLE, "what?", made))[0]) is False


def test_the_answer_with_fewer_places_is_the_better_one_in_both_orders():
    good, bad = "Fine.", "Fine. And more."
    told = said(RULES, *(words.preference(PRINCIPLE, "q", *pair) for pair in ((good, bad), (bad, good), (bad, bad))))
    assert [read(one) for one in told] == [1.0, 0.0, 0.5]


def test_roles_by_rules_load_nothing():
    with Mouths(Grants(), "cpu", "auto") as mouths:
        role = Role(generator=RULES)
        (one,) = mouths.say(role, [words.critique(PRINCIPLE, "q", "damn")], 0)
        assert words.objects(one[0]) and not mouths.here.held


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"patterns": ()}, "patterns: is empty"),
        ({"patterns": ("(",)}, r"patterns.0: '\(' is no pattern"),
        ({"patterns": ("x", "a*")}, "patterns.1: 'a\\*' finds an empty answer"),
    ],
)
def test_what_is_no_pattern_is_refused(given, why):
    with pytest.raises(RecipeError, match=why):
        Rules(**given)
    with pytest.raises(RecipeError, match="model: contradicts|rules need none"):
        Role(generator=RULES, model="x")
