"""H2 at its size, against two processes: what is sent without end or measure is refused, and nothing is kept of it."""

import contextlib
import gzip
import itertools
import json
import random
import socket

import pytest

from tests.serve.raw import answer, connect, head, post
from tests.serve.real import spawned

MIB = 1 << 20
ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire")
    with spawned(folder / "log", {"folder": str(tiny), "bounds": {"receive": 5.0}}) as server:
        yield server


def poured(server, first, pieces, most):
    """Sends until `most` bytes are out or the other side has had enough: (bytes that went out, status, body)."""
    sent = 0
    with connect(server) as own:
        own.settimeout(30)
        with contextlib.suppress(OSError):
            own.sendall(first)
            for piece in pieces:
                own.sendall(piece)
                sent += len(piece)
                if sent >= most:
                    break
        try:
            status, said = answer(own)
        except OSError:
            status, said = 0, b""  # the connection was ended: what it had said was lost with it
    return sent, status, said


BLOCK = b"x" * (64 << 10)
LINE = b"X-A: a\r\n"
POURED = {
    "a body of 1 GB": (head(Content_Length=1 << 30), itertools.repeat(BLOCK), {413}),
    "1 GB of gzip": (head(Content_Length=1 << 30, Content_Encoding="gzip"), itertools.repeat(BLOCK), {400, 413}),
    "endless chunks": (head(Transfer_Encoding="chunked"), itertools.repeat(b"10000\r\n" + BLOCK + b"\r\n"), {413}),
    "endless small chunks": (head(Transfer_Encoding="chunked"), itertools.repeat(b"1\r\nx\r\n" * 10_000), {400}),
    "extensions of chunks": (head(Transfer_Encoding="chunked"), itertools.repeat(b"1;" + b"a" * 60_000), {400}),
    "trailers": (head(Transfer_Encoding="chunked") + b"0\r\n", itertools.repeat(LINE * 1000), {400, 431}),
    "100,000 headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", itertools.repeat(LINE * 1000, 100), {400, 431}),
    "a header of 1 MB": (b"GET /health HTTP/1.1\r\nX: ", itertools.repeat(b"a" * 1024, 1024), {400, 431}),
    "a path of 1 MB": (b"GET /", itertools.repeat(b"a" * 1024, 1024), {400, 414, 431}),
    "lines without end": (b"", itertools.repeat(b"\r\n" * 30_000), {400, 408, 431}),
    "noise": (b"", (random.Random(i).randbytes(1 << 16) for i in range(1 << 14)), {400, 431}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POURED)
def test_h2_what_has_no_end_is_refused_at_the_bound_in_flat_memory(real, name):
    first, pieces, wanted = POURED[name]
    assert post(real, ASKED)[0] == 200
    before = real.resident()
    sent, status, said = poured(real, first, pieces, 1 << 30)
    assert status in wanted | {0}, (status, said[:200])
    assert sent < 1 << 30, "it was all taken"
    if status:
        assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
    grown = [now - then for now, then in zip(real.resident(), before, strict=True)]
    assert max(grown) < 24 * MIB, grown  # a body at its bound is 4 MiB
    assert post(real, ASKED)[0] == 200


def lying(body):
    """Requests that say another thing than they do."""
    plain = head(Content_Length=len(body))
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    return {
        "shorter than it says": head(Content_Length=len(body) + 10) + body,
        "longer than it says": head(Content_Length=len(body) - 3) + body,
        "negative": head(Content_Length=-1) + body,
        "two lengths": plain[:-2] + b"Content-Length: 3\r\n\r\n" + body,
        "a list of lengths": head(Content_Length=f"{len(body)}, 3") + body,
        "no number": head(Content_Length="0x20") + body,
        "huge": head(Content_Length=10**30) + body,
        "a length and chunks": head(Content_Length=3, Transfer_Encoding="chunked") + chunk,
        "chunks of no size": head(Transfer_Encoding="chunked") + b"zz\r\n" + body,
        "a chunk of too much": head(Transfer_Encoding="chunked") + b"f" * 30 + b"\r\n" + body,
        "an unknown coding": head(Transfer_Encoding="gzip, chunked") + chunk,
        "identity": head(Transfer_Encoding="identity") + body,
        "no host": plain.replace(b"Host: localhost\r\n", b"") + body,
        "two hosts": plain.replace(b"Host: localhost\r\n", b"Host: localhost\r\nHost: y\r\n") + body,
        "a folded line": plain[:-2] + b"X-A: a\r\n b\r\n\r\n" + body,
        "a space in a name": plain[:-2] + b"X A: a\r\n\r\n" + body,
        "a NUL in a value": plain[:-2] + b"X-A: a\x00b\r\n\r\n" + body,
        "a bare line feed": plain.replace(b"\r\n", b"\n") + body,
        "a version of none": plain.replace(b"HTTP/1.1", b"HTTP/9.9") + body,
        "of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        "of HTTP/0.9": b"GET /health\r\n\r\n",
        "a method of odd letters": plain.replace(b"POST", b"PO\xffT") + body,
        "a path of odd letters": plain.replace(b"/v1", b"/v\xff\x00") + body,
    }


LYING = lying(json.dumps(ASKED).encode())
BOMB = gzip.compress(bytes(64 * MIB))


@pytest.mark.parametrize("name", LYING)
def test_h2_what_says_another_thing_than_it_does_ends_by_itself_alone(server, name):
    """It is refused, or answered as one of the readings that the standard allows; never a fault, never twice."""
    with connect(server) as own:
        own.sendall(LYING[name])
        own.shutdown(socket.SHUT_WR)
        status, said = answer(own)
        rest = own.recv(1 << 16)
    assert status in (0, 200, 400, 404, 408, 413), (status, said)
    assert status != 200 or name in ("identity", "no host", "two hosts", "a folded line", "a bare line feed"), name
    assert not rest.startswith(b"HTTP/1.1 2"), "what came after it was taken for a request"
    assert post(server, ASKED)[0] == 200


@pytest.mark.parametrize(("size", "count", "status"), [(1, 1024, 200), (1, 1100, 400), (300, 5000, 200)])
def test_h2_a_body_may_have_small_chunks_but_not_be_all_chunks(server, size, count, status):
    text = json.dumps(ASKED).encode()
    body = text + b" " * (size * count - len(text))
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    with connect(server) as own:
        with contextlib.suppress(OSError):
            own.sendall(head(Transfer_Encoding="chunked"))
            own.sendall(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        got, said = answer(own)
    assert got == status and (b"no HTTP that is taken" in said) == (count == 1100)


def letters(count):
    return b"a" * count


LONG = {
    "a header": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + letters(70_000) + b"\r\n\r\n", 431),
    "spaces": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b" " * 70_000 + b"\r\n\r\n", 431),
    "headers": (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + (b"X: " + letters(10_000) + b"\r\n") * 12 + b"\r\n",
        431,
    ),
    "a path": (b"GET /" + letters(40_000) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
    "trailers": (head(Transfer_Encoding="chunked") + b"0\r\nX: " + letters(40_000) + b"\r\n\r\n", 431),
    "nearly": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + letters(32_000) + b"\r\n\r\n", 200),
}


@pytest.mark.parametrize("most", [1 << 20, 4000])
@pytest.mark.parametrize("name", LONG)
def test_h2_the_bound_on_a_head_holds_whatever_the_reads(server, name, most):
    request, wanted = LONG[name]
    with connect(server) as own, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for at in range(0, len(request), most):
            own.sendall(request[at : at + most])
        status, said = answer(own)
        assert status == wanted or (name, most, status) == ("trailers", 4000, 400), said
        if status == 431:
            error = json.loads(said)["error"]
            assert error["code"] == "head_too_large" and "longer than 32768 bytes" in error["message"]


def test_h2_a_bomb_is_not_unpacked(server):
    status, said = post(server, BOMB, Content_Encoding="gzip")
    assert status == 400 and said["error"]["param"] == "content-encoding"
    assert post(server, BOMB)[0] == 400  # nor where it does not say what it is


@pytest.mark.slow
def test_many_requests_in_one_piece_are_answered_in_turn_in_flat_memory(real):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before, count = real.resident(), 20_000
    with connect(real, 120.0) as own:
        own.setblocking(True)
        sent, held, seen = 0, one * count, 0
        while sent < len(held):  # what is answered is read, so that neither waits for the other
            sent += own.send(held[sent : sent + 65536], socket.MSG_DONTWAIT) if _ready(own) else 0
            seen += _taken(own)
        while seen < count and (part := own.recv(1 << 16)):
            seen += part.count(b"HTTP/1.1 200")
    assert seen >= count - 1  # one may be cut where it was read
    assert sum(real.resident()) - sum(before) < 24 * MIB


def _ready(own):
    import select

    return bool(select.select([], [own], [], 0.01)[1])


def _taken(own):
    with contextlib.suppress(BlockingIOError):
        return own.recv(1 << 16, socket.MSG_DONTWAIT).count(b"HTTP/1.1 200")
    return 0
