"""How ranks find each other: by the launcher's store, over the given interface and nothing beyond it."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from llmkit.core.errors import PeerError, RecipeError
from llmkit.core.ranks import Ranks

FIX = "start all ranks by one launcher, where they reach each other"
GLOO = "GLOO_SOCKET_IFNAME"


def bound(interface: str, hosts: bool = False) -> tuple[str, str]:
    """The address of this host that its ranks listen at, and the interface that has it; with `hosts` ranks of other
    ones are to reach it.

    Raises:
        PeerError: there is no way to the main rank, or none from other hosts.
        RecipeError: there is no such interface.
    """
    address, named = _bound(interface)
    host, _ = _main()
    if (
        hosts
        and interface == "auto"
        and ipaddress.ip_address(address).is_loopback
        and host not in (address, "localhost")
    ):
        what = f"{host} is {address} here, which no other host reaches"
        fix = "give MASTER_ADDR an address of the main rank's host, or name parallel.interface"
        raise PeerError(what, fix=fix, key="parallel.interface")
    return address, named


def _bound(interface: str) -> tuple[str, str]:
    host, port = _main()
    named = interface if interface != "auto" else os.environ.get(GLOO, "").split(",")[0]
    known = {
        name: [each.address.split("%")[0] for each in found if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }
    if named:
        if not known.get(named):
            what = (
                f"{named} is no interface with an address; there are {', '.join(name for name in known if known[name])}"
            )
            raise RecipeError(what, fix="name one of those, or auto", key="parallel.interface")
        return known[named][0], named
    try:
        family, _, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(there)  # sends nothing: it says by which address one gets there
            address = way.getsockname()[0]
    except OSError as cause:
        raise PeerError(f"there is no way to the main rank at {host}:{port} ({cause.strerror})", fix=FIX) from cause
    return address, next((name for name, found in known.items() if address in found), "")


def _main() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise PeerError(f"the environment says MASTER_ADDR={host} and MASTER_PORT={port}", fix=FIX)
    return host, int(port)


def store(ranks: Ranks, address: str, patience: float, own: socket.socket | None = None) -> Store:
    """The launcher's store, or one that the main rank makes, listening at `address` alone: by its `own` socket, if it
    listens already.

    Raises:
        PeerError: nobody is there in time, or the port is taken.
    """
    (host, port), limit = _main(), timedelta(seconds=patience)
    launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        tcp: Any = dist
        if ranks.main and not launcher:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listening = own or socket.create_server((address, port), family=family, backlog=1024)
            handle = listening.detach()
            made = tcp.TCPStore(address, port, ranks.world, True, limit, False, master_listen_fd=handle)
        else:
            _reach(host, port, patience)
            made = tcp.TCPStore(host, port, ranks.world, False, limit, False)
    except (OSError, RuntimeError) as cause:
        why = str(cause).splitlines()[0][:160]
        taken = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE
        fix = "choose another MASTER_PORT (--master-port of torchrun, --port of llmkit launch)" if taken else FIX
        error = PeerError(f"{ranks.name} cannot join the {ranks.world} ranks at {host}:{port} ({why})", fix=fix)
        error.speaks = True
        raise error from cause
    return PrefixStore(f"llmkit/{attempt}", made)


def _reach(host: str, port: int, patience: float) -> None:
    """Waits for somebody to listen there; a signal can end it, as it could not in the library's own wait."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def told(store: Store, key: str, ranks: Ranks, patience: float) -> dict[str, Any]:
    """What the main rank has put there.

    Raises:
        PeerError: it did not in time.
    """
    store.set(f"here/{ranks.rank}", "")
    found = _within(lambda: store.check([key]), patience)
    if not found:
        error = PeerError(f"rank 0 of {ranks.world} did not come in {patience:.0f} s", fix=FIX)
        error.speaks = not any(store.check([f"here/{rank}"]) for rank in range(ranks.rank))
        raise error
    said: dict[str, Any] = json.loads(store.get(key))
    return said


def _within(done: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
