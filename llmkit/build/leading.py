"""The first of the ranks that hold a model: it starts the others, and ends them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from llmkit.build.ranked import Spread, check, opened, rank_of
from llmkit.core.errors import LlmkitError, ModelError, PeerError
from llmkit.core.ranks import Ranks, free_port
from llmkit.inference.ranks import Led
from llmkit.models.load import Loaded
from llmkit.models.resolve import Resolved
from llmkit.parallel.group import joined

PATIENCE = 120.0
"""Seconds for a rank to come, and for a sum over all of them."""
GRACE = 10.0
"""Seconds for a rank to end by itself."""


class Leading:
    """A model over `tensor` processes of this host, of which this one is the first. `led` is what the engine runs."""

    def __init__(self, resolved: Resolved, spread: Spread, tensor: int) -> None:
        """
        Raises:
            RecipeError, ModelError: it cannot be cut for so many.
            PeerError: another rank could not be started.
        """
        check(resolved, spread.quant, tensor)
        if dist.is_available() and dist.is_initialized():
            what = "this process is a rank of another group already"
            raise ModelError(what, fix="use a process of its own, or set tensor=1", key="tensor")
        self.stack, self.threads = ExitStack(), torch.get_num_threads()
        self.children: list[subprocess.Popen[bytes]] = []
        try:
            self._start(resolved, spread, tensor)
        except BaseException as cause:
            self._end(cause)
            raise
        weakref.finalize(self, _ended, self.led, self.stack, self.children)

    def _start(self, resolved: Resolved, spread: Spread, tensor: int) -> None:
        device, port = str(spread.how["device"]), free_port()
        facts = {"model": resolved.sha256, "torch": torch.__version__}
        threads = max(1, self.threads // tensor)
        said = {"spread": spread.said(), "facts": facts, "device": device, "threads": threads, "patience": PATIENCE}
        for rank in range(1, tensor):
            self.children.append(_child(Ranks(rank, tensor, rank, tensor), port, said))
        for rank, child in enumerate(self.children, 1):
            if child.stdout is None or not child.stdout.readline():
                what = f"rank {rank} ended as it began, with status {child.wait()}"
                raise PeerError(what, fix="look at what it said above", key="tensor")
        torch.set_num_threads(threads)  # they wait for each other in every layer: none is to be slower
        with _address(port):
            own = Ranks(0, tensor, 0, tensor)
            group = self.stack.enter_context(joined(own, device, PATIENCE, facts=facts, serves=True))
        self.loaded: Loaded = opened(resolved, spread)
        self.led = Led(rank_of(self.loaded, spread, group))

    def close(self) -> None:
        """All ranks end."""
        _ended(self.led, self.stack, self.children)
        torch.set_num_threads(self.threads)

    def _end(self, cause: BaseException) -> None:
        torch.set_num_threads(self.threads)
        with suppress(LlmkitError, RuntimeError):
            self.stack.__exit__(type(cause), cause, cause.__traceback__)
        _reap(self.children, 0.0)


def _child(rank: Ranks, port: int, said: dict[str, Any]) -> subprocess.Popen[bytes]:
    environment = os.environ | rank.environment(port) | {"OMP_NUM_THREADS": str(said["threads"])}
    command, pipe = [sys.executable, "-m", "llmkit.build.rank"], subprocess.PIPE
    made = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    if made.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended; whoever waits for it says so
            made.stdin.write(json.dumps(said).encode() + b"\n")
            made.stdin.close()
    return made


@contextmanager
def _address(port: int) -> Iterator[None]:
    """The environment says where the ranks meet, as a launcher would."""
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ended(led: Led, stack: ExitStack, children: list[subprocess.Popen[bytes]]) -> None:
    if not children:
        return
    try:
        led.close()
        stack.close()
    except LlmkitError as cause:  # a rank is gone already: the others know
        with suppress(LlmkitError):
            stack.__exit__(type(cause), cause, cause.__traceback__)
    _reap(children, GRACE)


def _reap(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    for child in children:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    children.clear()
