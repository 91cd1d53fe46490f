"""What a file of the user's own says of its functions, before anything of it runs."""

import pytest

from llmkit.core.usercode import looked_at


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("def score(text, answer, *, scale, most=1): ...", ["text", "answer", "scale"]),
        ("def score(text, answer='x'): ...", ["text"]),
        ("def score(text): ...\ndef score(text, other): ...", ["text", "other"]),
        ("@supplied\ndef score(text, bonus): ...", []),  # what a decorator gives is not seen
        ("def score(text, bonus): ...\nscore = partial(score, bonus=1)", []),
        ("class score: ...", []),
    ],
)
def test_arguments_that_a_function_cannot_do_without(tmp_path, text, wanted):
    (tmp_path / "my.py").write_text(text)
    assert looked_at(f"{tmp_path}/my.py:score").wanted == wanted
