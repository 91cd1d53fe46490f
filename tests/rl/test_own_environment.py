"""Environments of the user's own: the page's example plays as our calculator does, and what is none is told."""

import pytest
from test_tool_environment import ASKED, call, speech_of, talked

from llmkit.core.errors import RecipeError
from llmkit.core.own import OwnError, begun
from llmkit.rl.environment import Call
from llmkit.rl.environment_node import Calculator, OwnEnvironment, ToolUse
from tests.stages.test_own_code import shown


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spoken(tokenizer):
    return speech_of(tokenizer)


@pytest.fixture
def own(tmp_path):
    """What makes environments of this text."""

    def made(text, name="Own"):
        (tmp_path / "my.py").write_text(text)
        node = OwnEnvironment(ref=f"{tmp_path}/my.py:{name}")
        begun(node, True, "rollout.environment.ref")
        return node.open()

    return made


SAID = (
    [call(expression="6 * 7") + call(expression="2 ** 10 / 3"), "It is 42."],
    [call(expression="(1 + 2") + call(expression="9**9**9"), call(expression="1"), "no"],
)


def test_the_pages_example_plays_as_the_calculator_does(spoken, own):
    boxes = own(shown("policy.md", "Sums"), "Sums"), ToolUse(tools=(Calculator(),)).open()
    for said in SAID:
        (one,), (other,) = (talked(spoken, said, box=box())[0] for box in boxes)
        for name in ("ids", "said", "turns", "text", "reward", "calls", "finish_reason"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.calls >= 2


HEAD = "from llmkit.rl.environment import Opening, Step\nclass Own:\n"
RESET = "    def reset(self, row, asked):\n        {}\n"
STEP = "    def step(self, calls):\n        {}\n"
TOLD = "[{'role': 'tool', 'content': 'x'} for _ in calls]"
FINE = "return Opening(asked)"


def test_each_conversation_has_its_own_and_cannot_change_a_row(own):
    begin = "self.left = row['left']; row['left'] = asked[0]['content'] = 'gone'; return Opening(asked)"
    make = own(HEAD + RESET.format(begin) + STEP.format(f"return Step({TOLD}, self.left == 1, 2 * self.left)"))
    row, asked = {"left": 1}, ({"role": "user", "content": "hi"},)
    first, second = make(), make()
    assert first.reset(row, asked).messages == ({"role": "user", "content": "gone"},)
    second.reset({"left": 3}, asked)
    assert row == {"left": 1} and asked[0]["content"] == "hi"
    made = first.step([Call("a", "{}"), Call("b", "{}")])
    assert made.done and made.reward == 2.0 and len(made.messages) == 2
    assert not second.step([]).done


BROKEN = {
    "raise ValueError('why')": r"raised ValueError: why \(.*my.py:\d+\); fix: mend it",
    "return 'x'": r"gave str, no Step \(in step\); fix: return Step\(messages, done, reward\)",
    "return Step([])": r"gave 0 messages for 1 calls \(in step\)",
    "return Step([{'role': 'user', 'content': 'x'}])": 'with role user .*; fix: give messages with "role": "tool"',
    "return Step([{'role': 'tool', 'content': 3}])": "gave a message that is .*'content': 3",
    "return Step([{'role': 'tool', 'content': 'x', 'it': self}])": "gave what JSON does not hold",
    f"return Step({TOLD}, reward=float('nan'))": "gave the reward nan .*; fix: give a finite number",
    f"return Step({TOLD}, reward=None)": "gave the reward None",
    f"Own.__float__ = lambda self: {{}}['no']; return Step({TOLD}, reward=self)": r"raised KeyError: 'no' \(.*y:6\)",
    f"import numpy as np; return Step({TOLD}, np.zeros(2))": r"raised ValueError: The truth value of an array ",
    "return Step(None)": "gave NoneType, where a list is",
}
BEGUN = {
    "return asked": "gave tuple, no Opening",
    "return Opening(asked, ({'name': 'x'},))": "gave a tool that is {'name': 'x'}.*; fix: give {\"type\": \"function\"",
    "return Opening(asked, 3)": r"gave int, where a list is \(in reset\)",
}


def test_what_it_gives_is_looked_at(own):
    for body, why in BROKEN.items():
        made = own(HEAD + RESET.format(FINE) + STEP.format(body))()
        made.reset({}, ASKED)
        with pytest.raises(OwnError, match=why) as caught:
            made.step([Call("a", "{}")])
        assert "\n" not in str(caught.value) and str(caught.value).startswith("rollout.environment.ref: ")
    for body, why in BEGUN.items():
        with pytest.raises(OwnError, match=why):
            own(HEAD + RESET.format(body) + STEP.format("..."))().reset({}, ASKED)


def test_what_is_no_environment_is_told_before_anything_is_begun(own, tmp_path):
    with pytest.raises(
        OwnError, match=r"made Own, which has no step; fix: give it reset\(row, asked\) and step\(calls\)"
    ):
        own(HEAD + RESET.format(FINE))
    with pytest.raises(OwnError, match="raised TypeError: .*missing 1 required positional argument: 'shop'"):
        own(HEAD + "    def __init__(self, shop): ...\n" + RESET.format(FINE) + STEP.format("..."))
    with pytest.raises(OwnError, match=r"raised KeyError: 'reset' \(.*my.py:4\)"):
        own(HEAD + "    def __getattr__(self, name):\n        raise KeyError(name)\n")
    with pytest.raises(RecipeError, match="'Own' names no class of a file; fix: write FILE.py:CLASS"):
        OwnEnvironment(ref="Own")
    (tmp_path / "my.py").write_text(HEAD + "    pass\n# nobody allowed this\n")
    with pytest.raises(RecipeError, match="runs code of yours .* nobody allowed yet"):
        begun(OwnEnvironment(ref=f"{tmp_path}/my.py:Own"), False, "rollout.environment.ref")
