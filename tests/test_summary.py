"""The table and figure that end a sweep, over a real store with made-up runs."""

import sys
import time
from types import SimpleNamespace

import mlflow
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.system_metrics.metrics import gpu_monitor
from rich.console import Console

from countdown_kd.summary import FEWEST_LOOKS, idle_gpus, show, summary_figure, summary_table, swept_params

METRICS = {
    "perf/s_per_it": 1.234,
    "perf/samples_per_s": 12.96,
    "perf/peak_memory_gib": 1.26,
    "eval_before/accuracy": 0.25,
    "eval_before/accuracy_low": 0.21,
    "eval_before/accuracy_high": 0.295,
    "eval/accuracy": 0.525,
    "eval/accuracy_low": 0.476,
    "eval/accuracy_high": 0.573,
    "eval/truncated_frac": 0.0325,
    "perf/phase/generate_s": 0.6,
    "perf/phase/backward_s": 0.5,
}


@pytest.fixture
def store(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())

    def add(params, metrics=METRICS, losses=(), status="FINISHED"):
        run_id = client.create_run(experiment, run_name="cell").info.run_id
        for key, value in params.items():
            client.log_param(run_id, key, value)
        points = [Metric(key, value, 0, 0) for key, value in metrics.items()]
        points += [Metric("train/loss", value, 0, step) for step, value in enumerate(losses, start=1)]
        client.log_batch(run_id, metrics=points)
        client.set_terminated(run_id, status)
        return client.get_run(run_id)

    return client, add


def printed(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def four(add):
    losses = [9.0] * 20 + [0.1] * 5 + [0.3] * 5
    return [
        add({"precision": precision, "gen": gen, "global_batch": "16"}, losses=losses)
        for precision in ("bf16", "fp32")
        for gen in ("vllm", "hf")
    ]


def test_a_row_a_cell_with_its_swept_options_and_figures_in_80_columns(store):
    client, add = store
    text = printed(summary_table(client, four(add)))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if "25 (21–30) → 52 (48–57)" in line]
    assert [row.split()[:7] for row in rows] == [
        [precision, gen, "0.2000", "1.23", "13.0", "16", "1.3"]
        for precision in ("bf16", "fp32")
        for gen in ("vllm", "hf")
    ], "the final loss is the mean of the last ten steps"


def test_only_params_that_differ_are_columns(store):
    _, add = store
    cells = [add({"model": "tiny", "seed": seed, "global_batch": seed}) for seed in ("1", "2")]
    assert swept_params(cells) == ["seed"]


def test_rows_that_no_param_tells_apart_are_named(store):
    client, add = store
    cells = [add({"seed": "1"}), add({"seed": "1"})]
    rows = printed(summary_table(client, cells, ["1a2b", "[/3c]"])).splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["1a2b", "[/3c]"]


def test_the_intervals_before_and_after_do_not_lie_over_each_other(store, tmp_path, monkeypatch):
    client, add = store
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    summary_figure(client, [add({"seed": seed}, losses=[1.0, 0.9]) for seed in "12"], tmp_path / "x.png")
    losses, accuracies, *_ = figures[0].axes
    heights = [bars.lines[0].get_ydata()[0] for bars in accuracies.containers]
    assert len(set(heights)) == 4 and heights == sorted(heights), "before above after, a cell below another"
    assert all(tick.is_integer() for tick in losses.get_xticks())


def test_a_cell_that_did_not_finish_is_shown_as_what_it_was(store):
    client, add = store
    cells = [add({"seed": "1"}), add({"seed": "2"}, metrics={}, status="KILLED")]
    text = printed(summary_table(client, cells))
    assert text.count("killed") == 1 and "finished" not in text


def test_a_baseline_has_an_accuracy_and_no_training_figures(store):
    client, add = store
    metrics = {name: value for name, value in METRICS.items() if name.startswith("eval/")}
    text = printed(summary_table(client, [add({}, metrics=metrics)]))
    (row,) = [line for line in text.splitlines() if "52 (48–57)" in line]
    assert row.split() == ["–", "–", "–", "–", "–", "52", "(48–57)", "3%"]


def test_the_figure_copes_with_cells_that_have_nothing_to_show(store, tmp_path, recwarn):
    client, add = store
    cells = [*four(add), add({"precision": "x" * 200, "gen": "hf"}, metrics={}, status="FAILED")]
    file = summary_figure(client, cells, tmp_path / "summary.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert not [str(w.message) for w in recwarn if "layout" in str(w.message)]


def test_the_end_of_a_sweep_names_the_figure_and_the_way_to_the_ui(store, tmp_path, capsys):
    client, add = store
    cells = four(add)
    show(client, cells, f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
    out = capsys.readouterr().out
    assert f"{tmp_path}/summary.png" in out
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in out
    assert [file.path for file in client.list_artifacts(cells[0].info.run_id)] == ["summary.png"]


class Driver:
    """As much of pynvml as MLflow asks, for GPUs that are busy by these shares; a machine without a driver has none."""

    NVMLError = RuntimeError

    def __init__(self, *busy):
        self.busy = busy

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return len(self.busy)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used=1, total=2)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=self.busy[gpu])

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 100

    nvmlDeviceGetEnforcedPowerLimit = nvmlDeviceGetPowerUsage


@pytest.fixture
def watched(store, monkeypatch, tmp_path):
    """A run during which MLflow itself has watched the GPUs."""
    client, _ = store

    def wait_for_looks(run_id):
        def looks():
            return len(client.get_metric_history(run_id, "system/gpu_0_utilization_percentage"))

        before = looks()
        while looks() < before + 2 * FEWEST_LOOKS:
            time.sleep(0.05)

    def run(params, busy, steps=True, before=None):
        monkeypatch.setitem(sys.modules, "pynvml", driver := Driver(*(before or busy)))
        monkeypatch.setattr(gpu_monitor, "pynvml", driver, raising=False)
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        with mlflow.start_run(experiment_id="1", log_system_metrics=True) as active:
            mlflow.log_params(params)
            mlflow.log_metrics({"perf/phase/generate_s": 0.9, "perf/phase/backward_s": 0.1})
            wait_for_looks(active.info.run_id)
            driver.busy = busy
            if steps:
                mlflow.log_metric("train/loss", 1.0, step=1)
                wait_for_looks(active.info.run_id)
                mlflow.log_metric("train/loss", 1.0, step=2)
        return client.get_run(active.info.run_id)

    return run


@pytest.mark.parametrize(
    ("params", "busy", "sentence"),
    [
        (
            {"gen": "hf", "dist": "single"},
            [21, 0, 0, 0],
            "3 of 4 GPUs did nothing while it trained; dist=ddp trains on all that it is given. "
            "A GPU worked 21% of the time; 90% of a step is generate: gen=vllm samples faster.",
        ),
        (
            {"gen": "vllm", "dist": "ddp"},
            [30, 40, 0],
            "1 of 3 GPUs did nothing while it trained. 2 GPUs worked 30% to 40% of the time; 90% of a step is "
            "generate: a larger batch or gen.steps_per_rollout gives it more to sample at once.",
        ),
        ({"gen": "hf", "dist": "single"}, [80], ""),
    ],
)
def test_gpus_that_stand_idle_are_told_of(watched, store, params, busy, sentence):
    client, _ = store
    assert idle_gpus(client, watched(params, busy)) == sentence


def test_what_gpus_do_outside_training_is_no_ones_fault(watched, store):
    client, _ = store
    assert idle_gpus(client, watched({"gen": "hf"}, [0], steps=False)) == ""
    assert idle_gpus(client, watched({"gen": "hf"}, [95], before=[0])) == ""


def test_idle_gpus_are_told_of_below_the_table(watched, store, tmp_path, capsys):
    client, _ = store
    cells = [watched({"gen": gen, "dist": "single"}, [0, 90]) for gen in ("hf", "vllm")]
    show(client, cells, "sqlite:///x.db", tmp_path)
    text = " ".join(capsys.readouterr().out.split())
    for gen in ("hf", "vllm"):
        assert f"gen-{gen}: 1 of 2 GPUs did nothing while it trained; dist=ddp" in text
