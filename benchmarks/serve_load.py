"""A server at four times its capacity, and clients of which half leave: what is refused, how fast, and what is left.

    python -m benchmarks.serve_load                     # 10,000 requests of a tiny model, by chance (a Poisson process)
    python -m benchmarks.serve_load --longest 12        # of short answers: HTTP is what gives out, and not the engine
    python -m benchmarks.serve_load --leave 20000       # connections of which half leave, beside others that stay

The capacity is measured first, with as many clients as there is room for. Exits 1 where a request was neither answered
to its end nor refused with a time to come back (429, or 503 beyond the bound on connections), the 99th percentile of
refusals is not under 100 ms, memory is not back within 10 MiB, or blocks, tasks or descriptors are left.
tests/serve/test_serve_load.py and test_leaks.py assert all of it but the times.

A refusal's time is from when its client begins to connect to the first byte of the answer, as the client sees it, which
does little else (benchmarks/serve_flood.py) and tells how late it was itself; its server's log has the same from the
request's head on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve_flood import Shot, flood
from tests.conftest import make_model, make_tokenizer
from tests.serve.crowd import Came, Told, asks, crowd
from tests.serve.real import Real, spawned
from tests.serve.test_leaks import come_and_go, settings

ROOM, MIB, SOON = 64, 1 << 20, 0.05
REFUSALS = (429, 503)
BAR_REFUSED, BAR_MEMORY, BAR_FREE = 0.1, 10.0, 1.0


def folder(at: Path) -> Path:
    """A tiny Llama."""
    make_model().save_pretrained(at)
    make_tokenizer().save_pretrained(at)
    return at


def capacity(server: Real, count: int, longest: int) -> float:
    """Requests a second with as many clients as there is room for; a refused one comes back soon, and not so often that
    its refusals are what the server does."""
    told, began = Told(), time.monotonic()
    asyncio.run(
        crowd(
            (told.until_done(server.url, number, asks(number, longest=longest), SOON) for number in range(count)), ROOM
        )
    )
    return count / (time.monotonic() - began)


def share(values: Sequence[float], of: float) -> float:
    """A percentile, in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(of * len(values)))] if values else 0.0


def rest(server: Real, key: str = "") -> float:
    """Seconds until nothing is held."""
    began = time.monotonic()
    while any((held := server.held(key)).values()):
        if time.monotonic() > began + 60:
            raise SystemExit(f"held for a minute: {held}")
        time.sleep(0.01)
    return time.monotonic() - began


def state(server: Real) -> dict[str, float]:
    """What could leak."""
    own, engine = server.resident()
    return {"server_mib": own / MIB, "engine_mib": engine / MIB, "files": server.files(), "tasks": server.tasks()}


def told_by_server(server: Real, status: int, since: int = 0) -> list[float]:
    """Seconds from a request's head to its answer's end, by the server's own log, but for the first `since`."""
    lines = (json.loads(line) for line in server.log.read_text().splitlines() if '"request"' in line)
    return [line["seconds"] for line in lines if line["event"] == "request" and line["status"] == status][since:]


def processor(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overload(server: Real, count: int, times: float, longest: int) -> dict[str, Any]:
    """Figures of a flood."""
    rate = capacity(server, count // 10, longest)
    rest(server)
    asked = [asks(number, longest=longest).bytes for number in range(10_000, 10_000 + count)]
    before, logged = state(server), len(told_by_server(server, 429))
    spent, began = [processor(pid) for pid in (server.process.pid, server.engine)], time.monotonic()
    shots = flood(("127.0.0.1", int(server.url.rpartition(":")[2])), asked, times * rate)
    took = time.monotonic() - began
    free = rest(server)
    spent = [processor(pid) - then for pid, then in zip((server.process.pid, server.engine), spent, strict=True)]
    return {
        "capacity_per_s": rate,
        "seconds": took,
        "processor_seconds": dict(zip(("server", "engine"), spent, strict=True)),
        **became(shots),
        "refused_by_its_log_ms": {"p99": share(told_by_server(server, 429, logged), 0.99)},
        "free_after_s": free,
        "before": before,
        "after": state(server),
    }


def became(shots: Sequence[Shot]) -> dict[str, Any]:
    """What became of requests."""
    came = [shot.came() for shot in shots]
    good = [one for one in came if one.status == 200]
    refused = [one for one in came if one.status in REFUSALS and one.wait >= 1]
    others = [one for one in came if one.status != 200 and (one.status not in REFUSALS or one.wait < 1)]
    seconds, late = [one.seconds for one in refused], [shot.began - shot.due for shot in shots]
    return {
        "asked": len(shots),
        "answered": sum(map(whole, good)),
        "not_to_the_end": sum(not whole(one) for one in good),
        "refused": dict(Counter(one.status for one in refused)),
        "lost": len(others),
        "lost_to": dict(Counter(one.error or str(one.status) for one in others)),
        "refused_ms": {name: share(seconds, of) for name, of in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "client_late_ms": {"p50": share(late, 0.5), "p99": share(late, 0.99)},
    }


def whole(one: Came) -> bool:
    """Whether an answer came to its end."""
    return one.whole and set(one.finishes.values()) == {"length"}


def leaving(server: Real, count: int) -> dict[str, Any]:
    """Figures of clients that leave."""
    come_and_go(server, range(1000))
    rest(server)
    before = state(server)
    came = come_and_go(server, range(10_000, 10_000 + count))
    free = rest(server)
    stayed = [one for one in came.values() if not one.left]
    made = {"connections": count, "left": count - len(stayed), "lost": sum(not one.whole for one in stayed)}
    return made | {"free_after_s": free, "before": before, "after": state(server)}


def wrong(found: dict[str, Any]) -> list[str]:
    """The bars that do not hold."""
    before, after = found["before"], found["after"]
    no = [name for name in ("not_to_the_end", "lost") if found.get(name)]
    no += [name for name in ("server_mib", "engine_mib") if after[name] - before[name] > BAR_MEMORY]
    no += [name for name in ("files", "tasks") if after[name] > before[name]]
    no += ["free_after_s"] if found["free_after_s"] > BAR_FREE else []
    no += ["refused_ms"] if found.get("refused_ms", {}).get("p99", 0.0) > 1000 * BAR_REFUSED else []
    return no


def main() -> int:
    """Prints the figures as one JSON object."""
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--requests", type=int, default=10_000)
    read.add_argument("--times", type=float, default=4.0, help="The capacity.")
    read.add_argument("--leave", type=int, default=0, help="So many connections instead, of which half leave.")
    read.add_argument("--model", default="", help="In place of the tiny one.")
    read.add_argument("--longest", type=int, default=200, help="Tokens of an answer, at most.")
    given = read.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        said: dict[str, Any] = {"folder": given.model or str(folder(Path(kept) / "tiny")), "bounds": {"requests": ROOM}}
        if given.leave:
            said = settings(said["folder"])
        with spawned(Path(kept) / "log", said) as server:
            if given.leave:
                found = leaving(server, given.leave)
            else:
                found = overload(server, given.requests, given.times, given.longest)
            server.stop()
    print(json.dumps(found | {"wrong": wrong(found)}, indent=1))
    return bool(wrong(found))


if __name__ == "__main__":
    sys.exit(main())
