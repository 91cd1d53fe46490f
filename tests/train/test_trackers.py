"""Trackers, each in its own way of working without a network: every line arrives, also over a stop."""

import json
import sqlite3
import zipfile

import pytest

from llmkit.core.errors import RecipeError
from llmkit.train import trackers
from llmkit.train.logs import Comet, Mlflow, Trackio, Wandb

SETTINGS = {"kind": "sft", "optim": {"lr": 1e-3}}


def line(step, loss):
    return {"event": "train", "step": step, "loss": loss, "skipped": [1], "note": "text"}


def twice(node, folder):
    """A run in two sessions."""
    folder.mkdir(exist_ok=True)
    for done, losses in ((0, {1: 3.0, 2: 2.0}), (2, {3: 1.0})):
        with node.open(folder, done, SETTINGS) as log:
            for step, loss in losses.items():
                log(line(step, loss))


def test_mlflow_has_both_sessions_in_one_run(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    twice(Mlflow(project="mine", name="first"), tmp_path / "run")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    seen = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert seen == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_mlflow_that_is_away_stops_no_training(tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    with Mlflow().open(tmp_path, 0, SETTINGS) as log:
        log(line(1, 3.0))

        def away(*args, **more):
            raise mlflow.exceptions.MlflowException("no route")

        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", away)
        log(line(2, 2.0))
    assert "a line was not logged (no route)" in caplog.text


def test_wandb_writes_both_sessions_under_one_name(tmp_path):
    pytest.importorskip("wandb")
    twice(Wandb(project="mine", mode="offline"), tmp_path / "run")
    name = json.loads((tmp_path / "run" / ".trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}*/*.wandb"))
    assert files and b"train/loss" in b"".join(path.read_bytes() for path in files)


def test_trackio_has_both_sessions_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import utils

    store = utils.TRACKIO_DIR
    project = f"test-{tmp_path.name}-{abs(hash(str(tmp_path)))}"
    twice(Trackio(project=project, name="first"), tmp_path / "run")
    path = store / f"{project}.db"
    try:
        rows = sqlite3.connect(path).execute("select run_name, step, metrics from metrics order by step").fetchall()
    finally:
        for left in store.glob(f"{project}*"):
            left.unlink()
    assert [(name, step, json.loads(said)["train/loss"]) for name, step, said in rows] == [
        ("first", 1, 3.0),
        ("first", 2, 2.0),
        ("first", 3, 1.0),
    ]


def test_comet_writes_an_archive_a_session(tmp_path):
    pytest.importorskip("comet_ml")
    twice(Comet(project="mine", mode="offline"), tmp_path / "run")
    archives = sorted((tmp_path / "run" / "comet").glob("*.zip"))
    said = "".join(zipfile.ZipFile(path).read("messages.json").decode() for path in archives)
    assert len(archives) == 2 and said.count('"train/loss"') >= 3 and "optim.lr" in said


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio", "comet"])
def test_a_tracker_that_is_not_installed_is_named(kind, tmp_path, monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    node = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio, "comet": Comet}[kind]()
    with (
        pytest.raises(RecipeError, match=f"log: {kind} is not installed .*; fix: pip install"),
        node.open(tmp_path, 0, {}),
    ):
        pass
