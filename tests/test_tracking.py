"""The MLflow store, seen from the launcher."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from countdown_kd import tracking


def store(uri):
    return OmegaConf.create({"uri": uri, "experiment": "countdown_kd"})


def test_opening_makes_store_and_experiment_once_with_artifacts_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client, experiment_id = tracking.open_store(store(uri))
    assert tracking.open_store(store(uri))[1] == experiment_id
    location = client.get_experiment(experiment_id).artifact_location
    assert location == (tmp_path / "mlartifacts" / "countdown_kd").as_uri()


def test_a_deleted_experiment_is_told(tmp_path):
    client, experiment_id = tracking.open_store(store(f"sqlite:///{tmp_path}/mlflow.db"))
    client.delete_experiment(experiment_id)
    with pytest.raises(Exception, match="was deleted in .* restore it, or set tracking.experiment"):
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
