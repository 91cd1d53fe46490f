"""Asking a run of several ranks to stop."""

import os
import signal
from types import SimpleNamespace

from llmkit.core.ranks import Ranks
from llmkit.core.stop import Stop


def test_a_signal_that_comes_while_ranks_agree_counts_the_next_time():
    """All ranks go on together then, and none forgets it."""
    during = ["a signal", ""]

    def agree(why):
        if during.pop(0):
            os.kill(os.getpid(), signal.SIGTERM)
        return why

    with Stop() as stop, stop.together(SimpleNamespace(ranks=Ranks(0, 2, 0, 2), any=agree)):
        assert stop.asked() == ""
        assert stop.asked() == "stopped by SIGTERM"


def test_the_reason_of_another_rank_is_this_ones_too():
    with Stop() as stop, stop.together(SimpleNamespace(ranks=Ranks(0, 2, 0, 2), any=lambda why: why or "theirs")):
        assert stop.asked() == stop.why == "theirs"
