"""The shelf: rivals that make and sweep at once, and whose fault a failure is."""

import errno
import os
import subprocess
import sys

import pytest

from llmkit.core import shelf
from llmkit.core.errors import ResourceError

CROWD = """
import sys
from llmkit.core import shelf
def make(folder, alive):
    (folder / "ids").write_bytes(b"x" * 99)
    return {"said": 1}
for number in range(int(sys.argv[1])):
    with shelf.entry("tokens", f"{number % 40:064x}", make) as held:
        assert (held.folder / "ids").read_bytes() == b"x" * 99, "what is in use stays"
"""


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A cache of the test's own."""
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("LLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMKIT_CACHE_SIZE", raising=False)
    return tmp_path / "cache" / "tokens"


def test_processes_that_make_and_sweep_at_once_do_not_meet(kept, monkeypatch):
    monkeypatch.setenv("LLMKIT_CACHE_SIZE", "2000")
    crowd = [subprocess.Popen([sys.executable, "-c", CROWD, "150"], stderr=subprocess.PIPE, text=True) for _ in "abc"]
    said = [one.communicate(timeout=120)[1] for one in crowd]
    assert said == [""] * 3 and [one.returncode for one in crowd] == [0] * 3
    shelf.sweep("tokens", 2000)
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) <= 2000
    assert not list(kept.glob(".aside-*"))


def test_a_folder_that_a_sweep_takes_before_it_is_locked_is_made_again(kept, monkeypatch):
    real, swept = shelf.fcntl.flock, []

    def late(handle, how):
        if how == shelf.fcntl.LOCK_EX and not swept:
            swept.append(1)
            shelf.sweep("tokens", 1 << 30)
        real(handle, how)

    monkeypatch.setattr(shelf.fcntl, "flock", late)
    with shelf.entry("tokens", "k" * 64, lambda folder, alive: {"said": 1}) as held:
        assert held.facts == {"said": 1} and swept


def test_an_entry_that_was_made_anew_since_is_not_taken_for_the_old_one(kept):
    def make(folder, alive):
        return {"said": 1}

    with shelf.entry("tokens", "k" * 64, make) as old:
        manifest = old.folder / shelf.MANIFEST
        handle = os.open(manifest, os.O_RDONLY)
        shelf._move(old.folder)
    with shelf.entry("tokens", "k" * 64, make):
        assert not shelf._is(manifest, handle)
        os.close(handle)


@pytest.mark.parametrize(
    ("cause", "own"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EAGAIN, "no process can be started"), False),
        (OSError(errno.EIO, "the source cannot be read", "/elsewhere/rows.jsonl"), False),
    ],
)
def test_the_cache_is_named_for_what_the_cache_refuses_alone(cause, own, kept):
    def make(folder, alive):
        raise cause

    with pytest.raises(ResourceError if own else OSError) as raised, shelf.entry("tokens", "k" * 64, make):
        pass
    assert own == (raised.value is not cause) and not list(kept.glob(".aside-*"))


def test_a_maker_that_cannot_write_its_file_is_the_caches_error(kept):
    def make(folder, alive):
        (folder / "ids" / "part").write_bytes(b"")

    with pytest.raises(ResourceError, match="LLMKIT_CACHE: writing"), shelf.entry("tokens", "k" * 64, make):
        pass
