"""What a stage is told about the process it runs in: passed, never global."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
    rank: int = 0
    world: int = 1
    resume: str = "auto"
    """auto, never, or the folder of a checkpoint to go on from."""
    grants: Grants = field(default_factory=Grants)
    values: Mapping[str, object] = field(default_factory=dict)
    """The stage's resolved values, for the manifest and the comparison on resume."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """By key of the stage: what it says of the environment, with a digest of what was read there."""
