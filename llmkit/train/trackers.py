"""Metrics lines to trackers, each through its own library.

A run that goes on logs under the run that it had there: `out/.trackers.json` keeps its name. What a tracker prints goes
to the run's log.
"""

from __future__ import annotations

import calendar
import contextlib
import importlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from llmkit.core.errors import RecipeError
from llmkit.core.files import write_json
from llmkit.train.logs import Comet, Log1, Mlflow, Trackio, Wandb

LOGGER = logging.getLogger("llmkit")


@contextmanager
def tensorboard(folder: Path, done: int) -> Iterator[Log1]:
    """Event files; what a session before wrote of steps after `done` is shown no more.

    Raises:
        RecipeError: the package is not installed.
    """
    writer = _library("tensorboard", "torch.utils.tensorboard", "tensorboard").SummaryWriter
    with writer(str(folder), purge_step=done + 1) as events:

        def log(line: dict[str, Any]) -> None:
            for name, value in figures(line).items():
                events.add_scalar(name, value, line["step"])

        yield log


@contextmanager
def wandb(node: Wandb, folder: Path, settings: Mapping[str, object]) -> Iterator[Log1]:
    """A run of Weights & Biases.

    Raises:
        RecipeError: the package is not installed, or nobody is logged in.
    """
    library = _library("wandb", "wandb", "wandb")
    quiet = library.Settings(silent=True, console="off", disable_git=True, save_code=False)
    with _refused("wandb", "run `wandb login`, or set mode: offline"), _hushed():
        run = library.init(
            project=node.project,
            name=node.name or folder.name,
            entity=node.entity,
            tags=list(node.tags) or None,
            id=_kept(folder, "wandb", lambda: uuid4().hex[:8]),
            dir=str(folder),
            config=dict(settings),
            mode=node.mode,
            resume="allow",
            settings=quiet,
        )
    with _closed(run.finish):
        # a step that a killed session logged is passed over there: made again, it is the same
        yield lambda line: run.log(figures(line), step=line["step"])


@contextmanager
def mlflow(node: Mlflow, folder: Path, settings: Mapping[str, object]) -> Iterator[Log1]:
    """A run of MLflow.

    Raises:
        RecipeError: the package is not installed, or its server refuses.
    """
    library, entities = _library("mlflow", "mlflow", "mlflow-skinny"), _library("mlflow", "mlflow.entities", "mlflow")
    uri = node.uri or os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlruns").as_uri()
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its files are asked for once more in this release
    with _refused("mlflow", "check uri"), _hushed():
        client = library.MlflowClient(tracking_uri=uri)

        def begun() -> str:
            found = client.get_experiment_by_name(node.project)
            where = found.experiment_id if found else client.create_experiment(node.project)
            run = client.create_run(where, run_name=node.name or folder.name).info.run_id
            given = [entities.Param(key, value[:500]) for key, value in _flat(settings).items()]
            client.log_batch(run, params=given[:100])
            return str(run)

        run = _kept(folder, "mlflow", begun)
        client.set_terminated(run, "RUNNING")

    def log(line: dict[str, Any]) -> None:
        at, values = 1000 * calendar.timegm(time.gmtime()), figures(line).items()
        try:
            client.log_batch(run, [entities.Metric(name, value, at, line["step"]) for name, value in values])
        except (library.exceptions.MlflowException, OSError) as cause:  # a server that is away stops no training
            LOGGER.warning("mlflow: a line was not logged (%s)", cause)

    with _closed(lambda: client.set_terminated(run)):
        yield log


@contextmanager
def trackio(node: Trackio, folder: Path, settings: Mapping[str, object]) -> Iterator[Log1]:
    """A run of Trackio.

    Raises:
        RecipeError: the package is not installed.
    """
    library = _library("trackio", "trackio", "trackio")
    name = node.name or _kept(folder, "trackio", lambda: f"{folder.name}-{uuid4().hex[:8]}")
    with _refused("trackio", "check project and space"), _hushed():
        run = library.init(
            project=node.project, name=name, space_id=node.space, config=dict(settings), resume="allow", embed=False
        )

    with _closed(library.finish):
        yield lambda line: run.log(figures(line), step=line["step"])


@contextmanager
def comet(node: Comet, folder: Path, settings: Mapping[str, object]) -> Iterator[Log1]:
    """An experiment of Comet.

    Raises:
        RecipeError: the package is not installed, or there is no key.
    """
    os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # else it would have to be imported before torch
    library = _library("comet", "comet_ml", "comet_ml")
    logging.getLogger("comet_ml").setLevel(logging.ERROR)
    quiet = dict.fromkeys(("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch"), False)
    quiet |= dict.fromkeys(("auto_param_logging", "auto_metric_logging", "log_env_details"), False)
    made = library.ExperimentConfig(
        name=node.name or folder.name,
        auto_output_logging=False,
        display_summary_level=0,
        offline_directory=str(folder / "comet"),
        **quiet,
    )
    known = folder / ".trackers.json"
    again = known.is_file() and "comet" in json.loads(known.read_text("utf-8"))
    with _refused("comet", "set COMET_API_KEY, or mode: offline"), _hushed():
        experiment = library.start(
            project_name=node.project,
            workspace=node.workspace,
            experiment_key=_kept(folder, "comet", lambda: uuid4().hex + uuid4().hex[:4]),
            mode="get" if again else "create",
            online=node.mode == "online",
            experiment_config=made,
        )
        experiment.log_parameters(_flat(settings))

    with _closed(experiment.end):
        yield lambda line: experiment.log_metrics(figures(line), step=line["step"])


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, each named by its event."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    return {f"{line['event']}/{name}": float(value) for name, value in numbers.items()}


def _flat(settings: Mapping[str, object], below: str = "") -> dict[str, str]:
    made: dict[str, str] = {}
    for name, value in settings.items():
        made |= _flat(value, f"{below}{name}.") if isinstance(value, Mapping) else {f"{below}{name}": json.dumps(value)}
    return made


def _kept(folder: Path, kind: str, make: Callable[[], str]) -> str:
    """The name that this run has at a tracker: made once, and kept in the run's folder."""
    path = folder / ".trackers.json"
    names: dict[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if kind not in names:
        names[kind] = make()
        write_json(path, names)
    return names[kind]


def _library(kind: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise RecipeError(f"{kind} is not installed ({missing})", fix=f"pip install {package}", key="log") from missing


@contextmanager
def _refused(kind: str, fix: str) -> Iterator[None]:
    """Names the tracker in what its library raises before the first step."""
    try:
        yield
    except Exception as cause:  # each library has errors of its own
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        raise RecipeError(f"{kind} cannot begin ({why})", fix=fix, key="log") from cause


@contextmanager
def _hushed() -> Iterator[None]:
    """What is printed goes to the run's log."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        for text in filter(None, map(str.strip, said.getvalue().splitlines())):
            LOGGER.info("%s", text)


@contextmanager
def _closed(end: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    finally:
        with _hushed():
            end()
