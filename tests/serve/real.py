"""The server as it is run: two processes, HTTP over loopback; and what can be counted of it from outside.

python -m tests.serve.real '{"folder": MODEL, "bounds": {...}, "engine": {...}, "keys": FILE, "journal": FILE,
"admin_keys": FILE, "admin_port": PORT, "adapter_root": FOLDER}'
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import httpx

from llmkit.serve import worker
from tests.serve.forked import Forked

ROOT = Path(__file__).parents[2]
PAGE = resource.getpagesize()


def serving(said: Mapping[str, Any], start: Any = None) -> None:
    """Serves until a signal; SIGUSR1 has it tell how many tasks it has. `start`: how its engine's process is made."""
    from llmkit.inference.cache import Cache
    from llmkit.inference.node import OwnEngine
    from llmkit.models.node import ModelRef
    from llmkit.serve.node import Bounds
    from llmkit.serve.remote import spawn
    from llmkit.serve.start import Settings
    from llmkit.serve.start import start as serve

    def count(*_: Any) -> None:
        logging.getLogger("llmkit.serve").info("counted", extra={"tasks": len(asyncio.all_tasks())})

    signal.signal(signal.SIGUSR1, count)
    engine = OwnEngine(cache=Cache(size=said.get("cache", 8 << 20)), **said.get("engine", {}))
    paths = {name: Path(said[name]) for name in ("keys", "journal", "admin_keys", "adapter_root") if name in said}
    own = Settings(
        ModelRef(name=str(said["folder"])),
        port=0,
        name="tiny",
        engine=engine,
        admin_port=said.get("admin_port"),
        **paths,
    )
    serve(Settings(**vars(own) | {"bounds": Bounds(**said.get("bounds", {}))}), start or spawn)


class Real:
    """One that runs, by the log that it writes."""

    def __init__(self, process: Any, log: Path, seconds: float) -> None:
        """`process`: with `pid`, `poll` and `kill`, as those of subprocess and of tests.serve.forked have them;
        `seconds`: in which it is ready."""
        self.process, self.log = process, log
        self.url = self.said("ready", seconds=seconds)["url"]

    def said(self, event: str, count: int = 1, seconds: float = 280.0) -> dict[str, Any]:
        """The `count`-th line of the log about something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
            found = [line for line in lines if line["event"] == event]
            if len(found) >= count:
                return dict(found[count - 1])
            time.sleep(0.01)
        raise AssertionError(self.log.read_text()[-5000:])

    @property
    def engine(self) -> int:
        """The pid of its engine's process."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])

    def resident(self) -> tuple[int, int]:
        """Bytes that its two processes hold: the server's, the engine's."""
        pids = self.process.pid, self.engine
        server, engine = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in pids)
        return server, engine

    def files(self) -> int:
        """File descriptors that the server has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def tasks(self) -> int:
        """Of its event loop."""
        before = self.log.read_text().count('"counted"')
        os.kill(self.process.pid, signal.SIGUSR1)
        return int(self.said("counted", before + 1)["tasks"])

    def numbers(self, key: str = "") -> dict[str, float]:
        """What `/metrics` says, but for buckets."""
        head = {"authorization": f"Bearer {key}"} if key else {}
        lines = httpx.get(self.url + "/metrics", headers=head, timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "_bucket{" not in line)
        return {name: float(value) for name, value in pairs}

    def held(self, key: str = "") -> dict[str, float]:
        """What is accepted, queued, run and held now."""
        now = self.numbers(key)
        names = ("llmkit_accepted", "llmkit_engine_queued", "llmkit_engine_running", "llmkit_engine_used")
        return {name: now[name] for name in names}

    def stop(self, seconds: float = 60.0) -> int:
        """Asks it to; gives its exit status."""
        os.kill(self.process.pid, signal.SIGTERM)
        return int(self.process.wait(seconds))


def engine_of(theirs: socket.socket) -> Forked:
    """The engine's process, forked like its server."""

    def work() -> int:
        number = theirs.fileno()
        os.closerange(3, number)  # as in a new interpreter: with its server's end of the socket it would outlive it
        os.closerange(number + 1, 4096)
        return worker.main(number)

    return Forked(work)


@contextlib.contextmanager
def running(start: Callable[[IO[str]], Any], log: Path, seconds: float) -> Iterator[Real]:
    """A server that is left neither running nor unasked for its status. `start`: its process, which writes there."""
    with log.open("w") as err:
        process = start(err)
    try:
        yield Real(process, log, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                process.kill()
                process.wait()


def at_work(log: Path, work: Callable[[], Any], seconds: float = 280.0) -> contextlib.AbstractContextManager[Real]:
    """What serves in a process that is forked from this one, which has imported what it needs."""
    return running(lambda err: Forked(work, err=err.fileno()), log, seconds)


def forked(log: Path, said: Mapping[str, Any], files: int = 0) -> contextlib.AbstractContextManager[Real]:
    """A server in such a process. `files`: its limit of descriptors."""

    def work() -> None:
        if files:
            os.closerange(3, 4096)  # what the tests have open is no part of its few
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        serving(said, engine_of)

    return at_work(log, work)


def interpreter(log: Path, *words: str, seconds: float = 280.0) -> contextlib.AbstractContextManager[Real]:
    """A module that serves (`python -m` and these words), in an interpreter of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

    def start(err: IO[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *words], stderr=err, stdout=err, env=environment)

    return running(start, log, seconds)


def spawned(log: Path, said: Mapping[str, Any]) -> contextlib.AbstractContextManager[Real]:
    """A server in an interpreter that has imported nothing but what it needs."""
    return interpreter(log, "tests.serve.real", json.dumps(said))


if __name__ == "__main__":
    serving(json.loads(sys.argv[1]))
