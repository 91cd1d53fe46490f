"""A run's folder, as ranks on other hosts see it."""

import threading
import time

import pytest

from llmkit.core.console import Console
from llmkit.core.errors import ResourceError
from llmkit.core.folder import claim, shared


def test_a_folder_that_the_main_rank_holds_is_waited_for(tmp_path):
    begun = threading.Timer(0.2, lambda: claim(tmp_path / "run", "auto", Console(quiet=True)).release())
    begun.start()
    shared(tmp_path / "run", "rank 1")
    begun.join()
    assert (tmp_path / "run" / ".lock").exists()


def test_a_rank_that_does_not_see_it_says_so_and_makes_none(tmp_path):
    began = time.monotonic()
    with pytest.raises(ResourceError, match="rank 1 .* does not see .*run, .*; fix: put out on a disk that all hosts"):
        shared(tmp_path / "run", "rank 1 (b, pid 2)", 0.2)
    assert time.monotonic() - began < 5 and not (tmp_path / "run").exists()
