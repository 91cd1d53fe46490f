"""What the parts of a training stage know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.build.precision import Types
from llmkit.core.run import Run
from llmkit.core.shape import Shape
from llmkit.data.feed import Feed
from llmkit.data.prepare import Prepared
from llmkit.models.resolve import Resolved
from llmkit.parallel.steps import Loss
from llmkit.plan.choice import Choice
from llmkit.rl.bench import Bench
from llmkit.stages.training import Training


@dataclass(frozen=True)
class Job:
    """One training stage with its data read and its sizes known."""

    node: Training
    run: Run
    resolved: Resolved
    types: Types
    train: Prepared
    valid: Prepared | None
    choice: Choice
    steps: int
    feed: Feed
    """What each step sees of `train`."""
    shape: Shape
    loss: Loss
    """What is made small; one that learns keeps its state here."""
    bench: Bench
    """What rewards hold, in training and in evaluations alike; the run closes it."""
    known: Mapping[str, Any]
    """What is read beside the model and the data, by its key: where models come from, and digests of files."""

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.run.folder / "checkpoints"
