"""What a cell's process writes into its MLflow run, over a real store; each ``with process():`` is one of a run's."""

import time

import mlflow
import pytest
import yaml
from hydra.utils import instantiate
from mlflow import MlflowClient
from transformers import TrainerState

from countdown_kd.record import RecordSteps, record_config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(uri := f"sqlite:///{folder}/mlflow.db")
    return uri, client.create_experiment("x", artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture
def process(store, monkeypatch):
    uri, experiment = store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_id = MlflowClient(uri).create_run(experiment).info.run_id
    return lambda: mlflow.start_run(run_id=run_id)


def history(run) -> list:
    points = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    return sorted(points, key=lambda point: point.step)


def log(steps: RecordSteps, *numbers: int) -> None:
    for number in numbers:
        steps.on_log(None, TrainerState(global_step=number), None, logs={"loss": number / 10})


def test_a_step_is_dated_in_milliseconds_as_it_was_logged(process):
    begun = time.time()
    with process() as run:
        log(steps := RecordSteps(), 1)
        time.sleep(0.1)
        log(steps, 2)
        steps.write()
        one, two = history(run)
    assert begun - 0.001 <= one.timestamp / 1000 <= two.timestamp / 1000 - 0.09 <= time.time()


def test_a_step_that_is_computed_again_after_a_resume_is_written_once(process):
    """The last step that was written is among those after the checkpoint, and is not written again."""
    with process() as run:
        log(steps := RecordSteps(), 1, 2)
        steps.on_save(None, None, None)
        assert [point.step for point in history(run)] == [1, 2], "what a checkpoint holds is not computed again"
        log(steps, 3, 4)
        steps.write()
    with process() as run:
        steps = RecordSteps()
        steps.on_train_begin(None, None, None)
        log(steps, 3, 4, 5, 6)
        steps.write()
        assert [(point.step, point.value) for point in history(run)] == [(n, n / 10) for n in range(1, 7)]


def test_a_run_goes_on_with_its_own_global_batch_and_keeps_both_configs(cell, process):
    """Other machines have other numbers of devices, and other defaults."""

    def record(*overrides: str, resumed_at: int = 0) -> None:
        cfg = cell("task.num_train=4", "task.num_test=4", *overrides)
        args = instantiate(cfg.trainer, use_cpu=True)
        with process():
            record_config(cfg, args, instantiate(cfg.task), {}, None, resumed_at=resumed_at)

    record("trainer.warmup_steps=1")
    record("trainer.warmup_steps=2", resumed_at=4)
    with pytest.raises(ValueError, match="began with 16 sequences an optimizer step and would go on with 8 "):
        record("trainer.gradient_accumulation_steps=1", "trainer.per_device_train_batch_size=8", resumed_at=4)
    with process() as run:
        stored = [file.path for file in MlflowClient().list_artifacts(run.info.run_id, "config")]
        assert stored == [f"config/{name}.yaml" for name in ("composed", "effective", "effective_from_step_4")]
        for file, steps in zip(stored[1:], (1, 2), strict=True):
            effective = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{file}"))
            assert effective["trainer"]["warmup_steps"] == steps
            assert effective["global_batch"] == 16
