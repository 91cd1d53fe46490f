"""Which of a run's processes this is, as the launcher says in the environment."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from llmkit.core.errors import RecipeError, Stopped

LAUNCHED = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK")
"""Set by torchrun, deepspeed and accelerate, which restart what does not exit 0: the truth is in `status.json`."""


def exit_status(code: int) -> int:
    """What a process exits with: a launcher takes a clean stop for a failure."""
    # DeepSpeed reads LOCAL_RANK, which is set for it where no launcher is (parallel/zero_engine.py)
    launched = "WORLD_SIZE" in os.environ and any(name in os.environ for name in LAUNCHED)
    return 0 if code == Stopped.code and launched else code


@dataclass(frozen=True)
class Ranks:
    """One process among `world`, the `local`-th of its host's `here`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def name(self) -> str:
        """As errors name it: the rank, its host and its process."""
        return f"rank {self.rank} ({platform.node()}, pid {self.pid})"

    def environment(self, port: int, host: str = "127.0.0.1") -> dict[str, str]:
        """What a launcher tells this rank, whose main one is reached at a port of a host: what `ranks` reads."""
        said = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": self.local, "LOCAL_WORLD_SIZE": self.here}
        return {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def free_port(address: str = "127.0.0.1") -> int:
    """A port of an address of this host that nobody listens at now."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What torchrun, deepspeed, accelerate or a script of ours said; one process where nobody said anything.

    Raises:
        RecipeError: a variable is no number, or they do not go together.
    """
    said = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    fix = "start it by torchrun, deepspeed, accelerate or llmkit launch"
    if not said["WORLD_SIZE"] and said["RANK"] not in ("", "0"):
        raise RecipeError(f"the environment says RANK={said['RANK']} and no WORLD_SIZE", fix=fix)
    if not said["WORLD_SIZE"]:
        return Ranks()
    wrong = [f"{name}={text}" for name, text in said.items() if text and not text.isdecimal()]
    if wrong:
        raise RecipeError(f"the environment says {', '.join(wrong)}, which is no rank", fix=fix)
    world, rank = int(said["WORLD_SIZE"]), int(said["RANK"] or 0)
    if world > 1 and not said["RANK"]:
        raise RecipeError(f"the environment says WORLD_SIZE={world} and no RANK", fix=fix)
    if not rank < world:
        raise RecipeError(f"the environment says RANK={rank} of WORLD_SIZE={world}", fix=fix)
    here = int(said["LOCAL_WORLD_SIZE"] or world)
    return Ranks(rank, world, int(said["LOCAL_RANK"] or rank % here), here)
