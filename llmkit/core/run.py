"""What a stage is told about the process it runs in: passed, never global."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.core.peers import Alone, Peers
from llmkit.core.ranks import Ranks

if TYPE_CHECKING:
    from llmkit.core.console import Console
    from llmkit.core.stop import Stop


@dataclass(frozen=True)
class Grants:
    """What the command line allows beyond the ordinary."""

    code: bool = False
    """Code from a model's folder may run (`--allow-code`)."""
    nonfinite: bool = False
    """Weights may hold NaN or infinity (`--allow-nonfinite`)."""
    python: bool = False
    """Python files that the recipe names may run (`--allow-python`)."""
    accept: tuple[str, ...] = ()
    """What may differ from the checkpoint on resume (`--accept KEY`)."""


@dataclass(frozen=True)
class Run:
    """One stage's run. `device` is `cpu` or `cuda`; `folder` is the stage's own, claimed, with the recipe in it."""

    folder: Path
    seed: int
    device: str
    threads: int
    recipe_digest: str
    """sha256 of the stage's resolved values without `out`."""
    console: Console
    stop: Stop
    peers: Peers = field(default_factory=Alone)
    """The other processes of this run."""
    resume: str = "auto"
    """auto, never, or the folder of a checkpoint to go on from."""
    grants: Grants = field(default_factory=Grants)
    values: Mapping[str, object] = field(default_factory=dict)
    """The stage's resolved values, for the manifest and the comparison on resume."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """By key of the stage: what it says of the environment, with a digest of what was read there."""

    @property
    def ranks(self) -> Ranks:
        """Which process this is."""
        return self.peers.ranks

    @property
    def main(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.peers.ranks.main

    @property
    def scratch(self) -> Path:
        """Where this process writes what is its own: the run's folder for the main one."""
        return self.folder if self.main else self.folder / "ranks" / str(self.ranks.rank)
