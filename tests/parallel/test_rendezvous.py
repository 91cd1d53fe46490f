"""How ranks find each other."""

import socket

import pytest

from llmkit.core.errors import PeerError
from llmkit.parallel.rendezvous import bound


def test_a_name_that_is_loopback_on_its_own_host_is_told_at_once(monkeypatch):
    """As Debian writes it into /etc/hosts: other hosts would wait for ever."""
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 29500))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert bound("auto")[0].startswith("127.")  # one host alone may
    with pytest.raises(PeerError, match="node1 is 127.0.* which no other host reaches"):
        bound("auto", hosts=True)
    assert bound("lo", hosts=True) == ("127.0.0.1", "lo")  # it was named
