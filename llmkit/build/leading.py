"""The first of the ranks that hold a model: it starts the others, and ends them."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
import torch.distributed as dist

from llmkit.build.followers import PATIENCE, Followers, Start, spawn
from llmkit.build.ranked import Spread, check, opened, rank_of
from llmkit.core.errors import LlmkitError, ModelError
from llmkit.core.ranks import Ranks
from llmkit.inference.ranks import Led
from llmkit.models.load import Loaded
from llmkit.models.resolve import Resolved
from llmkit.parallel.group import Group, joined


class Leading:
    """A model over `tensor` processes of this host, of which this one is the first. `led` is what the engine runs."""

    loaded: Loaded
    led: Led
    group: Group

    def __init__(self, resolved: Resolved, spread: Spread, tensor: int, start: Start = spawn) -> None:
        """`start` starts the process of another rank.

        Raises:
            RecipeError, ModelError: it cannot be cut for so many.
            ResourceError: there is no room for a cache.
            PeerError: another rank could not be started.
        """
        check(resolved, spread.quant, tensor, str(spread.how["device"]))
        if dist.is_available() and dist.is_initialized():
            what = "this process is a rank of another group already"
            raise ModelError(what, fix="use a process of its own, or set tensor=1", key="tensor")
        self.stack, self.threads = ExitStack(), torch.get_num_threads()
        threads = max(1, self.threads // tensor)  # they wait for each other in every layer: none is to be slower
        device, facts = str(spread.how["device"]), {"model": resolved.sha256, "torch": torch.__version__}
        said = {"spread": spread.said(), "facts": facts, "device": device, "threads": threads, "patience": PATIENCE}
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as own:  # bound before anybody is told of it
            port = int(own.getsockname()[1])
            self.others = Followers(tensor)
            try:
                self.others.begin(port, said, start)
                self.others.ready()
                torch.set_num_threads(threads)
                with _address(port):
                    first = Ranks(0, tensor, 0, tensor)
                    coming = joined(first, device, PATIENCE, facts=facts, serves=True, own=own)
                    self.group = self.stack.enter_context(coming)
                self.loaded = opened(resolved, spread)
                self.led = Led(rank_of(self.loaded, spread, self.group))
            except BaseException as cause:
                self._fail(cause)
                raise
        self.finish = weakref.finalize(self, _ended, self.led, self.stack, self.others)

    def check(self) -> None:
        """Raises: LlmkitError: another rank is to blame for what cannot go on."""
        self.group.watch.check()

    def close(self) -> None:
        """All ranks end."""
        self.finish()
        torch.set_num_threads(self.threads)

    def _fail(self, cause: BaseException) -> None:
        torch.set_num_threads(self.threads)
        with suppress(LlmkitError, RuntimeError):
            self.stack.__exit__(type(cause), cause, cause.__traceback__)
        self.others.end(0.0)


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


def _ended(led: Led, stack: ExitStack, others: Followers) -> None:
    """They are told, or know; those that do not listen any more are ended."""
    lost = led.lost
    try:
        led.close()
        if lost is None:
            stack.close()
    except LlmkitError as cause:  # a rank is gone already: the others know
        lost = cause
    if lost is not None:
        others.end(0.0)
        with suppress(LlmkitError, RuntimeError):
            stack.__exit__(type(lost), lost, lost.__traceback__)
    others.end()
