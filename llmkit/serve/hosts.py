"""Under which names a server that asks for no key may be asked: a page of the web, whose name was made to lead to this
machine (DNS rebinding) or which posts a form here, talks with no model of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from llmkit.core.errors import RecipeError
from llmkit.serve.refusal import Refusal

HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[^:\[\]]*)(:[0-9]{0,5})?")
NAMED = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*")
"""A name, or an address, without its port."""
READS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing: another site may ask, and its browser does not let it see the answer."""
FIX = "ask by 127.0.0.1 or localhost, name it in `hosts` (--allow-host), or have the server ask for keys"


class Hosts:
    """Names of this machine, whatever the port (which a tunnel changes), and those that an operator gave."""

    def __init__(self, named: Iterable[str] = ()) -> None:
        """
        Raises:
            RecipeError: one is no name of a host, so that no request would ever come under it.
        """
        self.named = {"localhost", *map(str.lower, named)}
        for name in self.named:
            if not NAMED.fullmatch(name):
                fix = "give a name or an address alone, without scheme, brackets and port"
                raise RecipeError(f"{name!r} is no name of a host", fix=fix, key="hosts")

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """
        Raises:
            Refusal: 403, the request was sent to another name, or by a page of another site to change something.
        """
        for name, value in headers:  # each of them: which of several is believed differs from reader to reader
            if name == b"host" and not self._holds(_host(value)):
                raise _refused("the host", value, "host_not_allowed")
            if name == b"origin" and method not in READS and not self._holds(_site(value)):
                raise _refused("a page of", value, "origin_not_allowed")

    def _holds(self, name: str) -> bool:
        name = name.strip("[]")
        if name in self.named:
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False


def _host(value: bytes) -> str:
    """What is before the port; nothing, where it cannot be told."""
    found = HOST.fullmatch(value)
    return "" if found is None else found[1].decode("latin-1").lower()


def _site(value: bytes) -> str:
    try:
        return urlsplit(value.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _refused(what: str, value: bytes, code: str) -> Refusal:
    return Refusal(403, f"{what} {value[:80].decode('latin-1')!r} is not this machine; {FIX}", code=code)
