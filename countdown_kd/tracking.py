"""One cell = one MLflow run; the cells of a sweep lie under one parent run. Imports no torch.

The launcher owns a run's life: it opens the run before the cell's process starts and closes it as what it was
when that process has ended, so a cell that died is FAILED or KILLED, never RUNNING. The process itself logs into
the run through MLFLOW_RUN_ID.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig

from countdown_kd.config import ROOT

SWEEP_RUN_ID = "COUNTDOWN_KD_SWEEP_RUN_ID"  # environment: the parent run of the cells that start now
PARENT_TAG = "mlflow.parentRunId"

# A new SQLite store is built by dozens of migrations, each with a line of its own.
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


def open_store(tracking: DictConfig) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; store and experiment are made if need be.

    Call it before any job starts: SQLite is not protected against being created twice at once.
    """
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        # Without a location MLflow would put the artifacts of a local store below the current folder.
        location = None
        if tracking.uri.startswith("sqlite:///"):
            database = Path(tracking.uri.removeprefix("sqlite:///"))
            location = (database.parent / "mlartifacts" / tracking.experiment).resolve().as_uri()
        return client, client.create_experiment(tracking.experiment, artifact_location=location)
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(
            f"the experiment {tracking.experiment!r} was deleted in {tracking.uri}: restore it, or set "
            "tracking.experiment"
        )
    return client, experiment.experiment_id


def start_run(client: MlflowClient, experiment_id: str, name: str, params: dict[str, str], kind: str) -> str:
    """Open a run that is RUNNING from now on; ``kind`` is "cell" or "sweep". Returns its id."""
    tags = {"mlflow.runName": name, "countdown_kd.kind": kind, "mlflow.source.name": "launch.py"}
    commit = git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    parent = os.environ.get(SWEEP_RUN_ID)
    if parent and kind == "cell":
        tags[PARENT_TAG] = parent
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    return run_id


def cells_of(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    """The cells of a sweep in the order they were started."""
    experiment_id = client.get_run(sweep_run_id).info.experiment_id
    runs = client.search_runs(
        [experiment_id],
        f"tags.`{PARENT_TAG}` = '{sweep_run_id}'",
        run_view_type=ViewType.ACTIVE_ONLY,
        max_results=1000,
    )
    return sorted(runs, key=lambda run: run.info.start_time)


def git(*arguments: str) -> str:
    """What a git command says about the folder the code lies in; empty where that is no checkout."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def ui_command(uri: str) -> str:
    """How to open MLflow's UI on this store, ready to paste; a password in its address is not shown."""
    address = urlsplit(uri)
    if address.scheme in ("http", "https"):
        return f"open {address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
    if address.password:
        uri = '"$MLFLOW_TRACKING_URI"'
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return f"{program} ui --backend-store-uri {uri}"
