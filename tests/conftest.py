import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from mlflow.entities import Metric
from omegaconf import OmegaConf
from slurm import slurm  # noqa: F401  a fixture

from countdown_kd import tracking
from countdown_kd.config import ROOT, identity, register_resolvers
from countdown_kd.launching.folder import CONFIG, claim
from countdown_kd.launching.states import State

# No test may look for a hub; a name that is not a folder here must fail at once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
# Threads that wait for each other by spinning take ten times as long where two jobs share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
register_resolvers()


@pytest.fixture
def cell():
    """``cell("gen=vllm")`` is the config that launch.py would compose."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


class Launcher:
    """launch.py in a folder and with an MLflow store of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.environment: dict[str, str] = {}
        self.program = ROOT / "launch.py"

    def start(self, *arguments: str, **kwargs) -> subprocess.Popen:
        environment = os.environ | {"MLFLOW_TRACKING_URI": self.uri, "COLUMNS": "80"} | self.environment
        return subprocess.Popen(
            [sys.executable, str(self.program), *arguments],
            cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
        )  # fmt: skip

    def __call__(self, *arguments: str, timeout: float = 550) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def runs(self, kind: str) -> list:
        """The runs of a kind ("cell" or "sweep"), oldest first."""
        experiment = self.client.get_experiment_by_name("countdown_kd")
        return self.client.search_runs(
            [experiment.experiment_id], f"tags.`countdown_kd.kind` = '{kind}'",
            order_by=["attributes.start_time"],
        )  # fmt: skip

    def put(self, cfg, state: State, details: str = "", folder: Path | None = None, metrics=(), **tags: str) -> str:
        """A cell's run as an earlier command would have left it; returns its id. Nothing trains for it."""
        client, experiment_id = tracking.open_store(OmegaConf.create({"uri": self.uri, "experiment": "countdown_kd"}))
        tags |= {
            tracking.IDENTITY_TAG: identity(cfg), tracking.FOLDER_TAG: str(folder or "/nowhere"),
            tracking.STATE_TAG: state, tracking.DETAILS_TAG: details,
        }  # fmt: skip
        run_id = tracking.start_run(client, experiment_id, "cell", "cell", {"seed": str(cfg.seed)}, tags)
        client.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in dict(metrics).items()])
        if folder:
            claim(folder, identity(cfg), "cell", run_id).release()
            (folder / CONFIG).touch()
        return run_id

    def losses(self, run_id: str) -> list[float]:
        history = self.client.get_metric_history(run_id, "train/loss")
        return [metric.value for metric in sorted(history, key=lambda metric: metric.step)]


@pytest.fixture
def launch(tmp_path):
    return Launcher(tmp_path)


@pytest.fixture(scope="module")
def launch_once(tmp_path_factory):
    """For a run that several tests of a module look at."""
    return Launcher(tmp_path_factory.mktemp("launch"))


def option_names(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))
