"""A server at four times its capacity, and clients of which half leave: what is refused, how fast, and what is left.

    python -m benchmarks.serve_load                     # 10,000 requests of a tiny model, by chance (a Poisson process)
    python -m benchmarks.serve_load --longest 12        # of short answers: HTTP is what gives out, and not the engine
    python -m benchmarks.serve_load --leave 20000       # connections of which half leave, beside others that stay

The capacity is measured first, with as many clients as there is room for. Exits 1 where an accepted request did not
come to its end, the 99th percentile of refusals is not under 100 ms, memory is not back within 10 MiB, or blocks,
tasks or descriptors are left. tests/serve/test_serve_load.py and test_leaks.py assert all of it but the times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import make_model, make_tokenizer
from tests.serve.crowd import Came, Told, ask, asks, crowd
from tests.serve.real import Real, spawned
from tests.serve.test_leaks import come_and_go, settings

ROOM, MIB, TICK = 64, 1 << 20, 0.005
BAR_REFUSED, BAR_MEMORY, BAR_FREE = 0.1, 10.0, 1.0


def folder(at: Path) -> Path:
    """A tiny Llama."""
    make_model().save_pretrained(at)
    make_tokenizer().save_pretrained(at)
    return at


def capacity(server: Real, count: int, longest: int) -> float:
    """Requests a second with as many clients as there is room for; a refused one comes back at once."""
    told, began = Told(), time.monotonic()
    asyncio.run(
        crowd(
            (told.until_done(server.url, number, asks(number, longest=longest), 0.0) for number in range(count)), ROOM
        )
    )
    return count / (time.monotonic() - began)


async def flood(server: Real, numbers: range, rate: float, longest: int) -> tuple[list[Came], list[float]]:
    """Each when it is due, whatever became of those before; and how late this client woke."""
    loop, rng, came, late = asyncio.get_running_loop(), random.Random(0), list[Came](), list[float]()

    async def one(number: int) -> None:
        came.append(await ask(server.url, asks(number, longest=longest)))

    async def watch() -> None:
        while True:
            before = loop.time()
            await asyncio.sleep(TICK)
            late.append(loop.time() - before - TICK)

    watching, due = asyncio.create_task(watch()), loop.time()
    async with asyncio.TaskGroup() as group:
        for number in numbers:
            due += rng.expovariate(rate)
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            group.create_task(one(number))
    watching.cancel()
    return came, late


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


def told_by_server(server: Real, status: int) -> list[float]:
    """Seconds from a request's head to its answer's end, by the server's own log."""
    lines = (json.loads(line) for line in server.log.read_text().splitlines() if '"request"' in line)
    return [line["seconds"] for line in lines if line["event"] == "request" and line["status"] == status]


def overload(server: Real, count: int, times: float, longest: int) -> dict[str, Any]:
    """Figures of a flood."""
    rate = capacity(server, count // 10, longest)
    rest(server)
    before = state(server)
    came, late = asyncio.run(flood(server, range(10_000, 10_000 + count), times * rate, longest))
    free = rest(server)
    good = [one for one in came if one.status == 200]
    refused = [one.seconds for one in came if one.status == 429]
    whole = [one for one in good if one.whole and set(one.finishes.values()) == {"length"}]
    return {
        "capacity_per_s": rate,
        "asked": count,
        "answered": len(good),
        "not_to_the_end": len(good) - len(whole),
        "refused": len(refused),
        "lost": count - len(good) - len(refused),
        "without_retry_after": sum(one.status == 429 and one.wait < 1 for one in came),
        "refused_ms": {name: share(refused, of) for name, of in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "refused_by_its_log_ms": {"p99": share(told_by_server(server, 429), 0.99)},
        "client_late_ms": {"p50": share(late, 0.5), "p99": share(late, 0.99)},
        "free_after_s": free,
        "before": before,
        "after": state(server),
    }


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
    no = [name for name in ("not_to_the_end", "lost", "without_retry_after") if found.get(name)]
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
