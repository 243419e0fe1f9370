"""The MLflow store, seen from the launcher."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from countdown_kd import tracking
from countdown_kd.launching.states import State


def store(uri):
    return OmegaConf.create({"uri": uri, "experiment": "countdown_kd"})


def test_opening_makes_store_and_experiment_once_with_artifacts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client, experiment_id = tracking.open_store(store(uri))
    assert tracking._open.__wrapped__(uri, "countdown_kd")[1] == experiment_id, "as another process would find it"
    location = client.get_experiment(experiment_id).artifact_location
    assert location == (tmp_path / "mlartifacts" / "countdown_kd").as_uri()


def test_a_store_beside_the_current_folder_keeps_its_artifacts_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client, experiment_id = tracking.open_store(store("sqlite:///beside.db"))
    location = client.get_experiment(experiment_id).artifact_location
    assert location == (tmp_path / "mlartifacts" / "countdown_kd").as_uri(), "also seen from another folder"


def test_a_deleted_experiment_is_told(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.create_experiment("countdown_kd"))
    with pytest.raises(Exception, match="was deleted in .* restore --experiment-id 1.*set tracking.experiment"):
        tracking.open_store(store(f"sqlite:///{tmp_path}/mlflow.db"))


def test_cells_are_found_under_their_sweep(tmp_path, monkeypatch):
    client, experiment_id = tracking.open_store(store(f"sqlite:///{tmp_path}/mlflow.db"))
    sweep = tracking.start_run(client, experiment_id, "sweep", "sweep")
    tracking.start_run(client, experiment_id, "alone", "cell")
    monkeypatch.setenv(tracking.SWEEP_RUN_ID, sweep)
    for name in ("first", "second"):
        tracking.start_run(client, experiment_id, name, "cell", {"seed": "1"})
    cells = tracking.cells_of(client, sweep)
    assert [cell.info.run_name for cell in cells] == ["first", "second"]
    assert cells[0].data.params == {"seed": "1"} and cells[0].info.status == "SCHEDULED"


def test_every_cell_of_a_large_sweep_is_found(tmp_path, monkeypatch):
    """Stores answer in pages, the first of 100 in some."""
    client, experiment_id = tracking.open_store(store(f"sqlite:///{tmp_path}/mlflow.db"))
    monkeypatch.setenv(tracking.SWEEP_RUN_ID, sweep := tracking.start_run(client, experiment_id, "sweep", "sweep"))
    submitted = [tracking.start_run(client, experiment_id, f"cell {n}", "cell") for n in range(101)]
    assert {cell.info.run_id for cell in tracking.cells_of(client, sweep)} == set(submitted)


@pytest.mark.parametrize(
    "uri, command",
    [
        ("sqlite:////data/mlflow.db", "mlflow ui --backend-store-uri sqlite:////data/mlflow.db"),
        ("https://me:secret@tracking.example/x", "open https://tracking.example/x"),
        ("postgresql://me:secret@db/mlflow", 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'),
    ],
)
def test_the_way_to_the_ui_shows_no_password(uri, command):
    shown = tracking.ui_command(uri)
    assert shown.endswith(command) and "secret" not in shown
    if shown != command:
        assert shown.startswith(str(Path(sys.executable).parent)), "the program that is not on the path"


@pytest.mark.parametrize("told", ["http://me:sword%2Ffish@host", "sword/fish refused", "no such user: sword%2Ffish"])
def test_a_password_is_hidden_as_it_stands_in_the_address_and_as_it_is_meant(told):
    shown = tracking.without_password(f"no answer: {told}", "http://me:sword%2Ffish@host:5000")
    assert shown.startswith("no answer: ") and "***" in shown and "sword" not in shown


def log_as_a_cell_does(uri, run_id, steps):
    import mlflow

    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run_id):
        for step in range(1, steps + 1):
            mlflow.log_metrics({f"train/{name}": step for name in ("loss", "on_policy_loss", "grad_norm")}, step=step)


def test_sixteen_cells_logging_at_once_lose_nothing(tmp_path):
    uri, steps = f"sqlite:///{tmp_path}/mlflow.db", 30
    client, experiment_id = tracking.open_store(store(uri))
    runs = [tracking.start_run(client, experiment_id, f"cell {n}", "cell") for n in range(16)]
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(log_as_a_cell_does, [uri] * 16, runs, [steps] * 16))
    for run_id in runs:
        for name in ("train/loss", "train/on_policy_loss", "train/grad_norm"):
            points = client.get_metric_history(run_id, name)
            assert sorted(point.step for point in points) == list(range(1, steps + 1))
            assert [point.value for point in points] == [point.step for point in points]


def test_a_cell_begun_twice_counts_once_and_finished_first(tmp_path, monkeypatch):
    client, experiment_id = tracking.open_store(store(f"sqlite:///{tmp_path}/mlflow.db"))
    monkeypatch.setenv(tracking.SWEEP_RUN_ID, sweep := tracking.start_run(client, experiment_id, "sweep", "sweep"))
    tags = {tracking.IDENTITY_TAG: "abc"}
    first, second, third = (tracking.start_run(client, experiment_id, "cell", "cell", tags=tags) for _ in range(3))
    assert tracking.find(client, experiment_id, "abc").info.run_id == third
    tracking.set_state(client, third, State.FAILED, "exit code 1")
    tracking.set_state(client, second, State.RUNNING)
    tracking.set_state(client, second, State.FINISHED)
    assert tracking.find(client, experiment_id, "abc").info.run_id == second
    assert [cell.info.run_id for cell in tracking.cells_of(client, sweep)] == [second]
    assert tracking.find(client, experiment_id, "other") is None
