"""Waiting for something to read, of a file with any number."""

import fcntl
import resource
import socket

import pytest

from llmkit.core.readable import readable


def test_it_tells_what_has_come_and_the_end():
    here, there = socket.socketpair()
    with here:
        assert not readable(here, 0.0) and not readable(here, -1.0)
        there.send(b"a")
        assert readable(here, 0.0) and here.recv(1) == b"a" and not readable(here, 0.0)
        there.close()
        assert readable(here, 0.0)


def test_files_past_the_number_that_select_knows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400:
        pytest.skip("no more than 1,400 files may be open here")
    here, there = socket.socketpair()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    try:
        with there, here, socket.socket(fileno=fcntl.fcntl(here.fileno(), fcntl.F_DUPFD, 1300)) as high:
            assert high.fileno() >= 1300 and not readable(high, 0.0)
            there.send(b"a")
            assert readable(high, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
