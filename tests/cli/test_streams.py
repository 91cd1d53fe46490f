"""Who of several ranks speaks."""

import pytest

from llmkit.cli import streams
from llmkit.cli.streams import say


@pytest.mark.parametrize(
    ("environment", "aloud", "spoken"),
    [
        ({}, None, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, None, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, None, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, None, True),  # another host, before the ranks have met
        ({"RANK": "9", "LOCAL_RANK": "1"}, None, False),
        ({"RANK": "8"}, None, True),  # started by hand
        ({"RANK": "8", "LOCAL_RANK": "0"}, False, False),  # the main rank says it
        ({"RANK": "9", "LOCAL_RANK": "1"}, True, True),
    ],
)
def test_before_ranks_have_met_each_host_has_a_voice(environment, aloud, spoken, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(streams, "TURN", 0.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert say(["what is wrong"], 2, aloud) == 2
    assert capsys.readouterr().err == ("llmkit: error: what is wrong\n" if spoken else "")
