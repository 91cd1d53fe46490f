"""What a stage is told about the process it runs in: passed, never global."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmkit.core.console import Console
    from llmkit.core.stop import Stop


@dataclass(frozen=True)
class Run:
    """One stage's run. `device` is `cpu` or `cuda`; `folder` is the stage's own, claimed and with the recipe in it."""

    folder: Path
    seed: int
    device: str
    threads: int
    recipe_digest: str
    """sha256 of the resolved recipe without `out`."""
    console: Console
    """Progress and notices, on standard error."""
    stop: Stop
    """Set by SIGTERM, SIGINT and SIGHUP; the loop asks it at every micro-batch boundary."""
    rank: int = 0
    world: int = 1
    resume: str = "auto"
    """auto, never, or the folder of a checkpoint to go on from."""
    accept: tuple[str, ...] = ()
    """Recipe keys that may differ on resume."""
    allow_code: bool = False
    """Whether code from a model folder may run."""
    allow_nonfinite: bool = False
