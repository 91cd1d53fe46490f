"""A run's folder, as ranks on other hosts see it."""

import errno
import threading
import time

import pytest

from llmkit.core.console import Console
from llmkit.core.errors import ResourceError
from llmkit.core.files import DISK
from llmkit.core.folder import claim, read_status, shared


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


def test_a_full_disk_leaves_what_became_of_a_run(tmp_path, monkeypatch):
    held = claim(tmp_path / "run", "auto", Console(quiet=True))
    held.status("running", 3, pid=1, more="a" * 300)

    def full(path, parts):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(DISK, "write", full)
    held.status("failed", 2, 5, "no space")
    said = read_status(tmp_path / "run")
    assert (said["state"], said["step"], said["exit_code"], said["why"]) == ("failed", 2, 5, "no space")
    (tmp_path / "run" / "status.json").unlink()
    with pytest.raises(ResourceError, match="status.json failed: No space"):
        held.status("failed", 2, 5, "no space")
    held.release()
