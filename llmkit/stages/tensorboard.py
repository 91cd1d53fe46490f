"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.core.errors import RecipeError


@contextmanager
def writer(folder: Path, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a metrics line; what a session before wrote of steps after `done` is shown no more.

    Raises:
        RecipeError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise RecipeError(
            f"tensorboard is not installed ({missing})", fix="pip install tensorboard", key="log"
        ) from missing
    with SummaryWriter(str(folder), purge_step=done + 1) as events:

        def log(line: dict[str, Any]) -> None:
            for name, value in line.items():
                if isinstance(value, int | float) and name not in ("step",):
                    events.add_scalar(f"{line['event']}/{name}", value, line["step"])

        yield log
