"""One cell = one MLflow run; the cells of a sweep lie under one parent run. Imports no torch.

A run is opened when its cell is submitted, SCHEDULED while it waits, RUNNING while its process lives, and closed as
what it was by whoever started that process, or, where that died too, by the next one who looks (slurm.refresh). The
process itself logs into the run through MLFLOW_RUN_ID.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Param, Run, ViewType
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig

from countdown_kd.config import ROOT

SWEEP_RUN_ID = "COUNTDOWN_KD_SWEEP_RUN_ID"  # environment: the parent run of the cells that start now
PARENT_TAG = "mlflow.parentRunId"
IDENTITY_TAG = "countdown_kd.identity"  # config.identity of a cell, and of a sweep the hash of its cells'
FOLDER_TAG = "countdown_kd.folder"
STATE_TAG = "countdown_kd.state"  # what became of a run, in a person's words
CODE_TAG = "countdown_kd.code"  # the hash of the code that a cell was started with
JOB_TAG = "countdown_kd.slurm_job"
TIMEOUTS_TAG = "countdown_kd.timeouts"  # how often a job has hit its time limit since the cell was submitted
CELLS_TAG = "countdown_kd.cells"  # of a sweep: how many it has, also those that have not started
SHARED_TAG = "countdown_kd.shared_cells"  # of a sweep: runs that another sweep had finished before

# Environment: MLflow's own limits, which are minutes where nobody answers.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
SERVER = (
    "a cluster wants `mlflow server --host 0.0.0.0` on a machine that its nodes reach, and "
    "MLFLOW_TRACKING_URI=http://THAT-MACHINE:5000"
)

# A new SQLite store is built by dozens of migrations, each with a line of its own.
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


class StoreError(RuntimeError):
    """The MLflow store does not answer; the message says what to do."""


def open_store(tracking: DictConfig) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; store and experiment are made if need be.

    Call it before any job starts: SQLite is not protected against being created twice at once. Raises StoreError where
    there is no answer within a minute.
    """
    return _open(tracking.uri, tracking.experiment)


@cache
def _open(uri: str, name: str) -> tuple[MlflowClient, str]:
    try:
        with mock.patch.dict(os.environ, IMPATIENT):
            client = within(60, MlflowClient, uri)
            experiment = within(60, client.get_experiment_by_name, name)
    except Exception as error:
        told = without_password(f"{uri} does not answer: {error}", uri)
        raise StoreError(
            f"the MLflow store {told}\nCells write to it while they run. Set MLFLOW_TRACKING_URI (or tracking.uri) to "
            f"one that answers; {SERVER}"
        ) from error
    if experiment is None:
        # Without a location MLflow would put the artifacts of a local store below the current folder.
        location = None
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///"))
            location = (database.parent / "mlartifacts" / name).resolve().as_uri()
        return client, client.create_experiment(name, artifact_location=location)
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(f"the experiment {name!r} was deleted in {uri}: restore it, or set tracking.experiment")
    return client, experiment.experiment_id


def start_run(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    kind: str,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> str:
    """Open a run; ``kind`` is "cell" or "sweep". Returns its id. Where a cell waits, slurm.refresh says so."""
    tags = {"countdown_kd.kind": kind, "mlflow.source.name": "launch.py"} | (tags or {})
    parent = os.environ.get(SWEEP_RUN_ID)
    if parent and kind == "cell":
        tags[PARENT_TAG] = parent
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    client.log_batch(run_id, params=[Param(key, value) for key, value in (params or {}).items()])
    return run_id


def end_run(client: MlflowClient, run_id: str, status: str, state: str) -> None:
    """Close a run (FINISHED, FAILED or KILLED); ``state`` says it in a person's words."""
    client.set_tag(run_id, STATE_TAG, state)
    client.set_terminated(run_id, status)


def find(client: MlflowClient, experiment_id: str, identity: str) -> Run | None:
    """The run that holds a cell or a sweep: a finished one before others, then the newest."""
    runs = client.search_runs(
        [experiment_id],
        f"tags.`{IDENTITY_TAG}` = '{identity}'",
        order_by=["attributes.start_time DESC"],
    )
    return min(runs, key=lambda run: run.info.status != "FINISHED", default=None)


def cells_of(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    """The cells of a sweep in the order they were submitted, also those that an earlier sweep had finished."""
    sweep = client.get_run(sweep_run_id)
    runs = client.search_runs(
        [sweep.info.experiment_id],
        f"tags.`{PARENT_TAG}` = '{sweep_run_id}'",
        run_view_type=ViewType.ACTIVE_ONLY,
        max_results=1000,
    )
    runs += [client.get_run(run_id) for run_id in sweep.data.tags.get(SHARED_TAG, "").split()]
    runs.sort(key=lambda run: run.info.start_time)
    # Of a cell that was begun twice only the last run counts, and of all its runs a finished one.
    cells = {run.data.tags.get(IDENTITY_TAG, run.info.run_id): run for run in runs}
    cells |= {run.data.tags[IDENTITY_TAG]: run for run in runs if run.info.status == "FINISHED"}
    return list(cells.values())


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


def without_password(text: str, uri: str) -> str:
    """A text without the user and password in a store's address."""
    found = re.match(r"[\w+.-]+://([^/].*)@", uri)
    user = found[1] if found else ""
    password = user.partition(":")[2]
    for secret in filter(None, (user, password, unquote(password))):
        text = text.replace(secret, "***")
    return text


def within(seconds: float, function: Callable, *arguments: Any, **named: Any) -> Any:
    """What a function returns; TimeoutError where it takes longer. A thread, as no signal ends a call into C."""
    outcome = []

    def work() -> None:
        try:
            outcome.append((function(*arguments, **named), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    value, error = outcome[0] if outcome else (None, TimeoutError(f"no answer within {seconds} seconds"))
    if error:
        raise error
    return value
