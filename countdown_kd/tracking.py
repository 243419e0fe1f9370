"""One cell = one MLflow run; the cells of a sweep lie under one parent run. Imports no torch.

A run is opened when its cell is submitted, SCHEDULED while it waits, RUNNING while its process lives, and closed as
what it was by whoever started that process, or, where that died too, by the next one who looks (launching.slurm.query).
The process itself logs into the run through MLFLOW_RUN_ID.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Param, Run, ViewType
from omegaconf import DictConfig

from countdown_kd.config import ROOT
from countdown_kd.launching.lock import Lock
from countdown_kd.launching.states import ENDED, MLFLOW_STATUS, TRANSITIONS, State, describe

log = logging.getLogger(__name__)

SWEEP_RUN_ID = "COUNTDOWN_KD_SWEEP_RUN_ID"  # environment: the parent run of the cells that start now
PARENT_TAG = "mlflow.parentRunId"
IDENTITY_TAG = "countdown_kd.identity"  # config.identity of a cell, and of a sweep the hash of its cells'
FOLDER_TAG = "countdown_kd.folder"
STATE_TAG = "countdown_kd.state"  # a launching.states.State
DETAILS_TAG = "countdown_kd.details"  # an exit code, a signal, why it waits: for people
CODE_TAG = "countdown_kd.code"  # the hash of the code that a cell was started with
JOB_TAG = "countdown_kd.slurm_job"
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

    Call it before any job starts: a store that jobs make is made by several at once. Raises StoreError where there is
    no answer within a minute.
    """
    return _open(tracking.uri, tracking.experiment)


def lock_of(uri: str, name: str) -> Lock:
    """A lock that all who use a store can see: beside its SQLite file, or in the repository, which the nodes share."""
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else ROOT / ".mlflow"
    return Lock(file.with_name(f"{file.name}.{name}"))


@contextmanager
def launching(uri: str) -> Iterator[None]:
    """Held while cells are looked up and opened, so that two launchers never open the same one.

    Those who wait are told for whom.
    """
    lock = lock_of(uri, "launching")
    if not lock.acquire():
        log.info("waiting for %s, which opens its cells in this store", lock.holder)
        lock.__enter__()
    lock.note = {}
    try:
        yield
    finally:
        lock.release()


@cache
def _open(uri: str, name: str) -> tuple[MlflowClient, str]:
    # SQLite is not protected against being created twice at once.
    with lock_of(uri, "opening") if uri.startswith("sqlite:///") else nullcontext():
        return _opened(uri, name)


def _opened(uri: str, name: str) -> tuple[MlflowClient, str]:
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
        told = without_password(uri, uri)
        raise StoreError(
            f"the experiment {name!r} was deleted in {told}: restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or set tracking.experiment"
        )
    return client, experiment.experiment_id


def start_run(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    kind: str,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
) -> str:
    """Open a run; ``kind`` is "cell", which is PENDING then, or "sweep". Returns its id."""
    tags = {"countdown_kd.kind": kind, "mlflow.source.name": "launch.py"} | (tags or {})
    if kind == "cell":
        tags = {STATE_TAG: State.PENDING} | tags
        if parent := os.environ.get(SWEEP_RUN_ID):
            tags[PARENT_TAG] = parent
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    client.log_batch(run_id, params=[Param(key, value) for key, value in (params or {}).items()])
    if kind == "cell":
        client.update_run(run_id, status=MLFLOW_STATUS[State(tags[STATE_TAG])])
    return run_id


def state_of(run: Run) -> State:
    """A cell's state; of a run that bears none, what MLflow's own status says."""
    by_status = {"FINISHED": State.FINISHED, "FAILED": State.FAILED, "KILLED": State.KILLED, "SCHEDULED": State.PENDING}
    told = run.data.tags.get(STATE_TAG)
    return State(told) if told in set(State) else by_status.get(run.info.status, State.RUNNING)


def described(run: Run) -> str:
    """A cell's state in a person's words."""
    return describe(state_of(run), run.data.tags.get(DETAILS_TAG, ""))


def set_state(client: MlflowClient, run_id: str, state: State, details: str = "") -> None:
    """Write a cell's state, and the status that MLflow has for it; a state that it cannot come to is not written."""
    before = state_of(client.get_run(run_id))
    if state not in TRANSITIONS[before]:
        log.warning("run %s stays %s: it cannot become %s", run_id[:8], before, describe(state, details))
        return
    client.set_tag(run_id, STATE_TAG, state)
    client.set_tag(run_id, DETAILS_TAG, details)
    if state in ENDED:
        client.set_terminated(run_id, MLFLOW_STATUS[state])
    else:
        client.update_run(run_id, status=MLFLOW_STATUS[state])


def close_sweep(client: MlflowClient, run_id: str, cells: Sequence[Run], complete: bool = True) -> bool:
    """Close a sweep's run as what its cells were; False where one of them is still under way."""
    statuses = {cell.info.status for cell in cells}
    if statuses & {"RUNNING", "SCHEDULED"}:
        return False
    if statuses == {"FINISHED"} and complete:
        status = "FINISHED"
    else:
        status = "FAILED" if "FAILED" in statuses else "KILLED"
    client.set_terminated(run_id, status)
    return True


def search(client: MlflowClient, experiment_id: str, tag: str, value: str) -> list[Run]:
    """All runs with a tag, the newest first, however many there are: MLflow gives a page of a thousand at most."""
    runs, token = [], None
    while True:
        page = client.search_runs(
            [experiment_id], f"tags.`{tag}` = '{value}'", run_view_type=ViewType.ACTIVE_ONLY, max_results=1000,
            order_by=["attributes.start_time DESC"], page_token=token,
        )  # fmt: skip
        runs += page
        if not (token := page.token):
            return runs


def find(client: MlflowClient, experiment_id: str, identity: str) -> Run | None:
    """The run that holds a cell or a sweep: a finished one before others, then the newest."""
    runs = search(client, experiment_id, IDENTITY_TAG, identity)
    return min(runs, key=lambda run: run.info.status != "FINISHED", default=None)


def cells_of(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    """The cells of a sweep in the order they were submitted, also those that an earlier sweep had finished."""
    sweep = client.get_run(sweep_run_id)
    runs = search(client, sweep.info.experiment_id, PARENT_TAG, sweep_run_id)
    runs += [client.get_run(run_id) for run_id in sweep.data.tags.get(SHARED_TAG, "").split()]
    runs.sort(key=lambda run: run.info.start_time)
    # Of a cell that was begun twice only the last run counts, and of all its runs a finished one.
    cells = {run.data.tags.get(IDENTITY_TAG, run.info.run_id): run for run in runs}
    cells |= {run.data.tags[IDENTITY_TAG]: run for run in runs if run.info.status == "FINISHED"}
    return list(cells.values())


def share(client: MlflowClient, sweep_run_id: str, runs: Sequence[Run]) -> None:
    """Have a sweep list cells that another sweep or command has run."""
    listed = client.get_run(sweep_run_id).data.tags.get(SHARED_TAG, "").split()
    others = [run.info.run_id for run in runs if run.data.tags.get(PARENT_TAG) != sweep_run_id]
    if new := [run_id for run_id in others if run_id not in listed]:
        client.set_tag(sweep_run_id, SHARED_TAG, " ".join([*listed, *new]))


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
