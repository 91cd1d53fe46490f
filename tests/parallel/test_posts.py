"""The main rank's end of the watch, and who comes to it."""

import json
import socket
import struct
import time

import pytest

from llmkit.core.ranks import Ranks
from llmkit.parallel.line import MOST
from llmkit.parallel.posts import Hub
from llmkit.parallel.where import Where


@pytest.fixture
def hub():
    made = Hub(Ranks(0, 2), Where(), "host", "127.0.0.1", 60.0)
    yield made
    made.close()


def come(hub):
    return socket.create_connection((hub.address["host"], hub.address["port"]), 5)


def turns(hub, until, seconds=10.0):
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        assert hub.turn(time.monotonic()) is None
        time.sleep(0.005)
    assert until()


def join(hub):
    one = come(hub)
    mine = {"token": hub.token, "rank": 1, "name": "rank 1", "host": "host", "pid": 1}
    one.sendall(json.dumps(mine).encode() + b"\n")
    turns(hub, lambda: hub.complete)
    return one


WORDS = [b"[" * 300_000 + b"\n", b"\xff\n", b"GET / HTTP/1.1\r\n\r\n", b'{"token": "no"}\n', b"1\n"]


@pytest.mark.parametrize("said", WORDS, ids=["deep", "bytes", "http", "token", "number"])
def test_a_stranger_is_sent_away_and_the_watch_goes_on(said, hub):
    with come(hub) as stranger:
        stranger.sendall(said)
        turns(hub, lambda: not hub.strangers and _closed(stranger))
    join(hub).close()


def _closed(one):
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_one_who_hangs_up_before_it_is_heard_ends_nothing(hub):
    gone = come(hub)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()  # a reset, not an end
    hub.turn(time.monotonic())
    join(hub).close()


def test_nobody_can_be_let_in_where_there_is_no_room_for_one_more(hub, monkeypatch):
    class Full:
        def accept(self):
            raise OSError(24, "Too many open files")

    real, hub.listening = hub.listening, Full()
    assert hub.turn(time.monotonic()) is None
    hub.listening = real
    join(hub).close()


def test_much_that_waited_is_all_heard(hub):
    one = join(hub)
    line, text = hub.lines[1], json.dumps({"beat": "x" * 1000}).encode() + b"\n"
    one.setblocking(False)
    left, heard = text * (2 * MOST // len(text)), 0  # more than one line may be
    while left or heard < 2 * MOST // len(text):
        try:
            left = left[one.send(left) :] if left else left
        except BlockingIOError:
            pass
        else:
            if left:
                continue  # as much as there is room for, while nobody looks
        heard += len(list(line.hear()))
        assert not line.lost
    one.close()
