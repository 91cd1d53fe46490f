"""Asking a run to stop, where several ranks must agree."""

import os
import signal
from types import SimpleNamespace

import pytest

from llmkit.core.errors import Stopped
from llmkit.core.stop import Stop


def peers(answers):
    """Of two ranks; each answer is what the other says, or a signal that comes while this one waits."""

    def any(why):
        said = answers.pop(0)
        if isinstance(said, signal.Signals):
            os.kill(os.getpid(), said)
            return why
        return why or said

    return SimpleNamespace(ranks=SimpleNamespace(world=2), any=any)


def test_a_signal_that_comes_while_ranks_agree_is_not_lost():
    with Stop() as stop, stop.together(peers(["", signal.SIGTERM, "", ""])):
        assert stop.asked() == ""
        assert stop.asked() == ""  # the others were told of nothing, and go on
        assert stop.asked() == "stopped by SIGTERM"
        with pytest.raises(Stopped, match="stopped by SIGTERM in step 3"):
            stop.check("in step 3")


def test_what_another_rank_asks_for_stops_this_one():
    with Stop() as stop, stop.together(peers(["", "stopped by SIGINT"])):
        assert stop.asked() == "" and stop.asked() == "stopped by SIGINT" == stop.why
