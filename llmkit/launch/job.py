"""What is to be started, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmkit.core.errors import RecipeError


@dataclass(frozen=True)
class Job:
    """A recipe on `nodes` hosts with `gpus` ranks each."""

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 1
    cpu: bool = False
    """The ranks compute on CPUs: no GPU is asked for."""
    hostfile: str = ""
    node_rank: int | None = None
    """Only this host's part is started."""
    master: str = ""
    port: int = 29500
    interface: str = ""
    restarts: int | None = None
    """How often the ranks are started again after a fault; None is what the engine takes to be right."""
    name: str = ""
    time: str = ""
    """The longest that a batch system may run it, in its own words."""
    options: tuple[str, ...] = ()
    """Handed on to sbatch as they are."""
    image: str = "llmkit:latest"
    claim: str = "llmkit"
    """The volume claim that holds the recipe, its data and its `out`."""
    kind: str = "job"
    run: tuple[str, ...] = ()
    """Options of `llmkit run`, such as --accept=KEY."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.gpus

    @property
    def words(self) -> tuple[str, ...]:
        """What follows `llmkit run`."""
        return (self.recipe, *self.overrides, *self.run)

    @property
    def label(self) -> str:
        """A name that batch systems and Kubernetes (RFC 1035) take: it leaves room for what they put after it."""
        plain = re.sub("[^a-z0-9]+", "-", (self.name or Path(self.recipe).stem).lower()).strip("-")
        return (plain if plain[:1].isalpha() else f"run-{plain}".strip("-"))[:40].strip("-")


def check_hosts(job: Job) -> None:
    """Sees to it that a hostfile has what a job asks for.

    Raises:
        RecipeError: it is not there, has too few hosts or slots, a line that means nothing, or a host twice.
    """
    path = Path(job.hostfile)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        why = "is not there" if isinstance(cause, FileNotFoundError) else "cannot be read"
        raise RecipeError(f"the hostfile {path} {why}", fix="write one line a host, such as: node1 slots=8") from cause
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        said = line.split("#")[0].split()
        if not said:
            continue
        slots = re.fullmatch(r"slots=(\d+)", said[1]) if len(said) == 2 else None
        if said[0] in hosts or (len(said) > 1 and slots is None):
            what = f"names {said[0]} twice" if said[0] in hosts else f"says {line.strip()!r}"
            raise RecipeError(what, fix="write one line a host, such as: node1 slots=8", file=str(path), line=number)
        hosts[said[0]] = int(slots[1]) if slots else job.gpus
    if len(hosts) < job.nodes:
        raise RecipeError(f"{path} names {len(hosts)} hosts, and --nodes is {job.nodes}", fix="name more, or use fewer")
    for name, room in list(hosts.items())[: job.nodes]:
        if room < job.gpus:
            raise RecipeError(f"{path} gives {name} {room} slots, and --gpus is {job.gpus}", fix=f"use --gpus {room}")
