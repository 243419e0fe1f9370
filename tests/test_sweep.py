"""launch.py as its users run it: whole cells in processes of their own, a real MLflow store."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from countdown_kd import tracking
from countdown_kd.config import ROOT
from countdown_kd.countdown import FAILURES
from countdown_kd.launching.states import State
from countdown_kd.launching.status import status
from countdown_kd.perf import PHASES

SHORT = ("trainer.max_steps=4", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=20")
EVALUATED = {
    f"{prefix}/{name}"
    for prefix in ("eval", "eval_before")
    for name in (
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "truncated_frac",
        *(f"failures/{f}" for f in FAILURES),
    )
}
TRAINED = {"train/loss", "rollout/mean_tokens", "rollout/truncated_frac"} | {
    "perf/s_per_it", "perf/samples_per_s", "perf/rollout_tokens_per_s", "perf/peak_memory_gib",
    *(f"perf/phase/{phase}_s" for phase in PHASES),
}  # fmt: skip


def artifact(launch, run_id, path):
    return launch.client.download_artifacts(run_id, path)


# ------------------------------------------------------------------------------------------------
# The main job: a sweep over precision and generation backend


@pytest.fixture(scope="module")
def sweep(launch_once):
    result = launch_once("-m", "precision=bf16,fp32", "gen=vllm,hf", *SHORT)
    assert result.returncode == 0, result.stderr
    return launch_once, result.stdout


def test_four_cells_finish_under_one_parent(sweep):
    launch, _ = sweep
    (parent,) = launch.runs("sweep")
    cells = launch.runs("cell")
    assert {parent.info.status, *(cell.info.status for cell in cells)} == {"FINISHED"}
    assert [(c.data.params["precision"], c.data.params["gen"]) for c in cells] == [
        ("bf16", "vllm"), ("bf16", "hf"), ("fp32", "vllm"), ("fp32", "hf"),
    ]  # fmt: skip
    assert {cell.data.tags["mlflow.parentRunId"] for cell in cells} == {parent.info.run_id}


def test_every_cell_has_the_promised_metrics(sweep):
    launch, _ = sweep
    for cell in launch.runs("cell"):
        assert EVALUATED | TRAINED <= set(cell.data.metrics), cell.info.run_name
        assert {"train/on_policy_loss", "train/off_policy_loss"} & set(cell.data.metrics)
        assert len(launch.losses(cell.info.run_id)) == 4
        failures = sum(cell.data.metrics[f"eval/failures/{label}"] for label in FAILURES)
        assert failures + 20 * cell.data.metrics["eval/accuracy"] == pytest.approx(20)
        assert cell.data.metrics["perf/phase/sync_s"] > 0 or cell.data.params["gen"] == "hf"


def test_the_effective_config_tells_the_cells_apart(sweep):
    launch, _ = sweep
    for cell in launch.runs("cell"):
        file = artifact(launch, cell.info.run_id, "config/effective.yaml")
        effective = yaml.safe_load(open(file))
        precision, gen = cell.data.params["precision"], cell.data.params["gen"]
        assert effective["rollout"] == {
            "backend": "hf" if gen == "hf" else "vllm colocate",
            "dtype": "bfloat16" if precision == "bf16" else "float32",
            "steps_per_rollout": 1,
        }
        assert effective["trainer"]["bf16"] == (precision == "bf16")
        assert effective["student"]["dtypes"] == {"float32": effective["student"]["parameters"]}
        assert effective["global_batch"] == 4 and effective["world_size"] == 1
        assert effective["versions"]["trl"] and effective["data"]["fingerprint"]
        assert effective["student"]["tokenizer_fingerprint"] != effective["teacher"]["tokenizer_fingerprint"]


def test_cells_draw_the_same_on_policy_steps_and_see_the_same_puzzles(sweep):
    launch, _ = sweep
    draws, prompts, puzzles = [], [], []
    for cell in launch.runs("cell"):
        told = json.load(open(artifact(launch, cell.info.run_id, "on_policy_draws.json")))
        draws.append(told["on_policy"])
        prompts.append([[prompt for prompt, _ in step] for step in told["batches"]])
        table = json.load(open(artifact(launch, cell.info.run_id, "eval_predictions.json")))
        assert table["columns"][:3] == ["numbers", "target", "label"]
        puzzles.append([row[:2] for row in table["data"]])
    assert len(draws[0]) == 4
    for same in (draws, prompts, puzzles):
        assert all(each == same[0] for each in same)


def test_the_sweep_ends_with_a_table_a_figure_and_the_way_to_the_ui(sweep):
    launch, printed = sweep
    tail = printed[printed.rindex("precision ") :]
    assert max(map(len, tail.splitlines()[:6])) <= 80
    for row in ("bf16      vllm", "bf16      hf", "fp32      vllm", "fp32      hf"):
        assert row in tail
    assert f"mlflow ui --backend-store-uri {launch.uri}" in printed
    (figure,) = launch.folder.glob("multirun/*/*/summary.png")
    assert str(figure) in printed and figure.read_bytes().startswith(b"\x89PNG")
    (parent,) = launch.runs("sweep")
    assert "summary.png" in [file.path for file in launch.client.list_artifacts(parent.info.run_id)]


def test_the_trained_student_is_kept_without_pickles(sweep):
    launch, _ = sweep
    folders = list(launch.folder.glob("multirun/*/*/*/student"))
    assert len(folders) == 4
    for folder in folders:
        assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    assert not [f for pattern in ("*.bin", "*.pt", "*.pkl", "*.pth") for f in launch.folder.rglob(pattern)]


# ------------------------------------------------------------------------------------------------
# Reproducibility


def test_the_same_cell_twice_has_the_same_losses_digit_for_digit(launch):
    for _ in range(2):
        result = launch("seed=3", "gen=hf", "force=true", *SHORT)
        assert result.returncode == 0, result.stderr
    one, two = launch.runs("cell")
    assert launch.losses(one.info.run_id) == launch.losses(two.info.run_id)
    assert one.data.metrics["eval/accuracy"] == two.data.metrics["eval/accuracy"]


# ------------------------------------------------------------------------------------------------
# Other ways to run


def test_a_model_is_evaluated_without_training_it(launch):
    result = launch("-m", "baseline=student,teacher", "eval.num_puzzles=100")
    assert result.returncode == 0, result.stderr
    student, teacher = launch.runs("cell")
    assert student.data.metrics["eval/accuracy"] < 0.5 < teacher.data.metrics["eval/accuracy"]
    assert "train/loss" not in teacher.data.metrics
    assert "teacher" in result.stdout


def test_two_ranks_share_one_run_of_the_snapshot(launch):
    there = f"hydra.run.dir={launch.folder}/outputs/a/b"
    launch.folder = ROOT  # where python -m would find the package itself
    result = launch("dist=ddp", "dist.nproc_per_node=2", *SHORT, there)
    assert result.returncode == 0, result.stderr
    (cell,) = launch.runs("cell")
    effective = yaml.safe_load(open(artifact(launch, cell.info.run_id, "config/effective.yaml")))
    assert effective["code"] == cell.data.tags["countdown_kd.code"]
    assert cell.data.params["global_batch"] == "8"
    assert len(launch.losses(cell.info.run_id)) == 4
    assert EVALUATED | TRAINED <= set(cell.data.metrics)


def test_ten_cells_in_another_order_are_the_same_sweep(cell, launch):
    """Whatever order Python's sets have in a process: it depends on a seed."""
    solved = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
    seeds = [str(seed) for seed in range(10)]
    for seed in seeds:
        launch.put(cell(f"seed={seed}"), State.FINISHED, metrics=solved)
    for order in (seeds, seeds[::-1]):
        launch.environment = {"PYTHONHASHSEED": order[0]}
        result = launch("-m", f"seed={','.join(order)}")
        assert result.returncode == 0 and "10 of 10 cells are done" in result.stdout, result.stderr
        assert result.stdout.count("50 (40–60)") == 10
    assert len(launch.runs("sweep")) == 1 and len(launch.runs("cell")) == 10


def test_what_is_not_committed_is_kept_beside_the_code_staged_or_not(launch):
    checkout = launch.folder / "checkout"
    for name in ("countdown_kd", "conf", "sweeps", "hydra_plugins"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    launch.program = Path(shutil.copy(ROOT / "launch.py", checkout))
    launch.environment = {"PYTHONPATH": str(checkout)}
    run, staged = checkout / "countdown_kd" / "run.py", checkout / "conf" / "task" / "tiny.yaml"
    run.write_text("raise SystemExit('nothing to train here')\n")
    git = "git init -q && git add . && git -c user.name=me -c user.email=me@example.org commit -qm begun"
    subprocess.run(git, shell=True, cwd=checkout, check=True)
    staged.write_text(staged.read_text() + "# an edit that is staged\n")
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    run.write_text(run.read_text() + "# an edit that is not\n")
    assert "failed (exit code 1)" in launch().stderr
    (kept,) = launch.folder.glob("outputs/*/*/.code/*/code.diff")
    assert "\n+# an edit that is staged" in kept.read_text() and "\n+# an edit that is not" in kept.read_text()
    (commit,) = launch.folder.glob("outputs/*/*/.code/*/commit")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert commit.read_text() == launch.runs("cell")[0].data.tags["mlflow.source.git.commit"] == head


def test_optuna_chooses_cells_that_are_not_run_again(launch):
    command = ("+sweeps=learning_rate", "hydra.sweeper.n_trials=2", "trainer.max_steps=2", *SHORT[1:])
    plan = launch(*command, "plan=true")
    assert plan.returncode == 0 and "chooses its cells as it goes" in plan.stdout and not list(launch.folder.iterdir())
    for _ in range(2):
        result = launch(*command)
        assert result.returncode == 0, result.stderr
        assert "Best parameters: {'trainer.learning_rate': " in result.stdout
        header, _, *rows = result.stdout[result.stdout.rindex("learning_rate lmbda ") :].splitlines()[:4]
        assert "off" in header and all(row.endswith("%") and len(row) < 90 for row in rows)
        cells = launch.runs("cell")
        assert [cell.info.status for cell in cells] == ["FINISHED"] * 2
    assert result.stdout.count("done before") == 2
    best = max(cell.data.metrics["eval/accuracy"] for cell in cells)
    assert f"Best value: {best}" in result.stdout


def test_another_launcher_runs_the_cells_side_by_side(launch):
    result = launch("-m", "baseline=student,teacher", "eval.num_puzzles=20", "hydra/launcher=joblib")
    assert result.returncode == 0, result.stderr
    one, other = launch.runs("cell")
    assert max(run.info.start_time for run in (one, other)) < min(run.info.end_time for run in (one, other))
    (parent,) = launch.runs("sweep")
    assert {run.info.status for run in (one, other, parent)} == {"FINISHED"}


# ------------------------------------------------------------------------------------------------
# Runs end as what they were


def test_a_sweep_that_cannot_start_starts_no_cell(launch):
    """As on a full disk: the copy of the code finds no room."""
    there = launch.folder / "there"
    there.mkdir()
    (there / ".code").write_text("in the way")
    result = launch("-m", "baseline=student,teacher", "eval.num_puzzles=1", f"hydra.sweep.dir={there}")
    assert result.returncode == 1 and ".code" in result.stderr
    assert not launch.runs("cell")


def test_a_sweep_is_under_way_while_a_cell_of_it_is_queued_or_runs_elsewhere(cell, launch, monkeypatch):
    client, experiment_id = tracking.open_store(cell(f"tracking.uri={launch.uri}").tracking)
    sweep = tracking.start_run(client, experiment_id, "sweep", "sweep")
    monkeypatch.setenv(tracking.SWEEP_RUN_ID, sweep)
    launch.put(cell("seed=1"), State.FINISHED)
    last = launch.put(cell("seed=2"), State.PENDING)
    for going_on in ("SCHEDULED", "RUNNING"):
        client.update_run(last, going_on)
        assert status(client, experiment_id, None, live=False) == 1
        assert client.get_run(sweep).info.status == "RUNNING"
    client.set_terminated(last, "FINISHED")
    assert status(client, experiment_id, None, live=False) == 0
    assert client.get_run(sweep).info.status == "FINISHED"


def test_a_mistake_in_one_cell_is_told_before_any_cell_runs(launch):
    result = launch("-m", "trainer.num_generations=1,5", *SHORT[:1])
    assert result.returncode == 2
    assert "Nothing was started" in result.stderr and "a divisor of 16" in result.stderr
    assert "trainer.num_generations=5" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (launch.folder / "mlflow.db").exists()


def test_a_store_that_does_not_answer_is_told_soon_without_its_password(launch):
    launch.uri = "http://somebody:swordfish@127.0.0.1:9"
    begun = time.time()
    result = launch("-m", "seed=1,2", *SHORT)
    assert result.returncode == 2 and time.time() - begun < 100
    assert "http://***@127.0.0.1:9 does not answer" in result.stderr and "mlflow server" in result.stderr
    assert "Traceback" not in result.stderr and "swordfish" not in result.stderr + result.stdout


def test_one_failed_cell_is_failed_and_the_others_go_on(launch):
    whole = ROOT / "countdown_kd" / "tiny" / "student"
    broken = Path(shutil.copytree(whole, launch.folder / "broken"))
    weights = broken / "model.safetensors"  # which nobody reads before the cell's own process
    weights.write_bytes(weights.read_bytes()[:1000])
    result = launch("-m", f"model.pretrained_model_name_or_path={broken},{whole}", *SHORT)
    assert result.returncode == 1
    failed, finished = launch.runs("cell")
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    (parent,) = launch.runs("sweep")
    assert parent.info.status == "FAILED"
    assert "failed (exit code 1)" in result.stdout, "the table tells"
    assert "SafetensorError" in result.stdout, "and shows the end of the log"
    assert "failed (exit code 1): " in result.stderr and "HYDRA_FULL_ERROR" not in result.stderr


def wait_for_training(launch, process):
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        time.sleep(1)
        # Only a cell's process writes run.log: the store is made by then, which two clients at once would break.
        if any(launch.folder.rglob("run.log")) and launch.losses(launch.runs("cell")[0].info.run_id):
            return
    raise AssertionError(process.communicate())


LONG = ("trainer.max_steps=500", *SHORT[1:])


def test_after_ctrl_c_the_runs_are_killed(launch):
    # Where the tests themselves run in the background, Ctrl-C is ignored and would be below.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = launch.start("-m", "seed=1,2", *LONG, **listen)
    wait_for_training(launch, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert [run.info.status for run in launch.runs("cell") + launch.runs("sweep")] == ["KILLED"] * 2
    assert "stopped by Ctrl-C" in err and "1 of 2 cells never started" in out


def test_a_cell_whose_process_is_killed_is_killed(launch):
    process = launch.start(*LONG)
    wait_for_training(launch, process)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "killed by SIGKILL" in err
    assert [run.info.status for run in launch.runs("cell")] == ["KILLED"]
