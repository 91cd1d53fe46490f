"""The recipe's `log` nodes: where a run's metrics go beside its own `metrics.jsonl`.

A run that was killed logs the steps since its checkpoint once more, with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from llmkit.core.config import config

Log1 = Callable[[dict[str, Any]], None]
"""Takes one line of the metrics."""


@config
class TensorBoard:
    """Event files in `out/tensorboard` (needs `pip install tensorboard`)."""

    kind: Literal["tensorboard"] = "tensorboard"

    def open(self, folder: Path, done: int, settings: Mapping[str, object]) -> AbstractContextManager[Log1]:
        """The writer of a run whose first `done` steps are shown already; `settings` are the recipe's."""
        from llmkit.train.trackers import tensorboard

        return tensorboard(folder / "tensorboard", done)


@config
class Tracker:
    """A run under a name, in a project of runs."""

    kind: str = ""
    project: str = "llmkit"
    """Of MLflow, the experiment."""
    name: str | None = None
    """The run's name there; without it that of the run's folder."""


@config
class Wandb(Tracker):
    """Weights & Biases (needs `pip install wandb`, and `wandb login` for `mode: online`)."""

    kind: Literal["wandb"] = "wandb"
    entity: str | None = None
    """A user or a team."""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = "online"
    """`offline` writes below `out/wandb` alone, for a later `wandb sync`."""

    def open(self, folder: Path, done: int, settings: Mapping[str, object]) -> AbstractContextManager[Log1]:
        """The writer of a run; one that goes on has the same run there."""
        from llmkit.train.trackers import wandb

        return wandb(self, folder, settings)


@config
class Mlflow(Tracker):
    """MLflow (needs `pip install mlflow-skinny`, or mlflow)."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """A tracking server; without it, MLFLOW_TRACKING_URI, else files in `out/mlruns`."""

    def open(self, folder: Path, done: int, settings: Mapping[str, object]) -> AbstractContextManager[Log1]:
        """The writer of a run; one that goes on has the same run there."""
        from llmkit.train.trackers import mlflow

        return mlflow(self, folder, settings)


@config
class Trackio(Tracker):
    """Trackio, in its own local store (needs `pip install trackio`)."""

    kind: Literal["trackio"] = "trackio"
    space: str | None = None
    """A Hugging Face Space that shows it."""

    def open(self, folder: Path, done: int, settings: Mapping[str, object]) -> AbstractContextManager[Log1]:
        """The writer of a run; one that goes on has the same run there."""
        from llmkit.train.trackers import trackio

        return trackio(self, folder, settings)


@config
class Comet(Tracker):
    """Comet (needs `pip install comet_ml`, and COMET_API_KEY for `mode: online`)."""

    kind: Literal["comet"] = "comet"
    workspace: str | None = None
    mode: Literal["online", "offline"] = "online"
    """`offline` writes below `out/comet` alone, for a later `comet upload`."""

    def open(self, folder: Path, done: int, settings: Mapping[str, object]) -> AbstractContextManager[Log1]:
        """The writer of a run; one that goes on has the same run there."""
        from llmkit.train.trackers import comet

        return comet(self, folder, settings)


Log = TensorBoard | Wandb | Mlflow | Trackio | Comet
