"""Whether there is a network to be asked, found out before a library tries for minutes."""

from __future__ import annotations

import socket
import threading
import urllib.request
from urllib.parse import urlsplit

SECONDS = 1.5


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether somebody answers at a URL's host, or at the proxy that stands before it, within so many seconds."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        behind = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = behind.hostname or "", behind.port or {"https": 443}.get(behind.scheme, 80)
    answered = threading.Event()

    def ask() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except OSError:
            return
        answered.set()

    # in a thread, since looking up a name takes as long as it likes
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()
