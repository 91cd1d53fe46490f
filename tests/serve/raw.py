"""HTTP by hand: what no client library would send."""

import json
import socket


def connect(server, timeout=20.0):
    own = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return own


def head(path="/v1/chat/completions", method="POST", kind="application/json", **more):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(own):
    """(status, the rest until the other side closes or the body is whole)."""
    held = b""
    while b"\r\n\r\n" not in held:
        if not (more := own.recv(65536)):
            break
        held += more
    top, _, body = held.partition(b"\r\n\r\n")
    sizes = [line.split(b":")[1] for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while sizes and len(body) < int(sizes[0]) and (more := own.recv(65536)):
        body += more
    return int(top.split()[1]) if top else 0, body


def post(server, body, **more):
    """The answer to one body of any bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with connect(server) as own:
        own.sendall(head(Content_Length=len(data), **more) + data)
        status, said = answer(own)
    return status, json.loads(said)
