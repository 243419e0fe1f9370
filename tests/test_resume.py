"""Cells that die and go on, and commands that are given again; everything with launch.py itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Launcher

STEPS = 10
CELL = (f"trainer.max_steps={STEPS}", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=40")


def history(launch, name="train/loss") -> list[tuple[int, float]]:
    (cell,) = launch.runs("cell")
    points = launch.client.get_metric_history(cell.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def files(launch, pattern: str) -> list[Path]:
    return sorted(launch.folder.glob(f"outputs/*/*/{pattern}"))


def kill_when(launch, condition, *arguments: str) -> None:
    """Start launch.py, end it with SIGKILL as soon as the condition holds, and wait for its cell to die with it."""
    process = launch.start(*arguments)
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module", params=["hf", "vllm"])
def uninterrupted(request, tmp_path_factory):
    launch = Launcher(tmp_path_factory.mktemp("uninterrupted"))
    result = launch(f"gen={request.param}", *CELL)
    assert result.returncode == 0, result.stderr
    return request.param, launch


def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights_and_losses(uninterrupted, launch):
    gen, whole = uninterrupted
    command = (f"gen={gen}", *CELL)
    moments = [
        lambda: files(launch, "run.log") and launch.runs("cell") and len(history(launch)) >= 3,  # between checkpoints
        lambda: files(launch, "checkpoint-8"),  # a checkpoint is being written
        lambda: len(history(launch)) == STEPS,  # the last step, its checkpoint, the evaluation
    ]
    for moment in moments if gen == "hf" else moments[:1]:
        kill_when(launch, moment, *command)
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    assert "going on from step" in result.stdout

    assert history(launch) == history(whole), "no point lost, none doubled, none different"
    assert [step for step, _ in history(launch)] == list(range(1, STEPS + 1))
    for name in ("eval/accuracy", "eval_before/accuracy", "perf/s_per_it"):
        assert len(history(launch, name)) == 1
    assert history(launch, "eval/accuracy") == history(whole, "eval/accuracy")
    ((ours,), (theirs,)) = (files(each, "student/model.safetensors") for each in (launch, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (
        json.loads(Path(each.client.download_artifacts(each.runs("cell")[0].info.run_id, name)).read_text())
        for each in (launch, whole)
        for name in ["on_policy_draws.json"]
    )
    assert ours == theirs and len(ours["on_policy"]) == STEPS
    assert not files(launch, "checkpoint-*"), "a finished cell needs none"
    assert launch.runs("cell")[0].info.status == "FINISHED"


def test_after_ctrl_c_a_cell_goes_on_where_it_stopped(launch):
    # As in a terminal, which sends SIGINT to all processes of the command in the foreground, not to the first alone.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    long = ("trainer.max_steps=60", *CELL[1:])
    process = launch.start(*long, **listen)
    while not (files(launch, "run.log") and len(history(launch)) >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped by Ctrl-C" in err
    (cell,) = launch.runs("cell")
    assert cell.info.status == "KILLED" and cell.data.tags["countdown_kd.state"] == "stopped"
    stopped_after = len(history(launch))

    plan = launch(*long, "plan=true")
    assert f"go on from step {stopped_after} (stopped)" in plan.stdout
    result = launch(*long)
    assert result.returncode == 0, result.stderr
    assert f"going on from step {stopped_after}" in result.stdout
    assert [step for step, _ in history(launch)] == list(range(1, 61))


def test_a_cell_that_runs_is_not_started_again(launch):
    process = launch.start("trainer.max_steps=500", *CELL[1:])
    while not files(launch, "run.log"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    second = launch("trainer.max_steps=500", *CELL[1:])
    assert second.returncode == 1 and "is running already" in second.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_status_tells_a_sweep_that_runs_here_from_one_whose_launcher_died(launch):
    def status():
        environment = os.environ | {"MLFLOW_TRACKING_URI": launch.uri, "COLUMNS": "160"}
        command = [sys.executable, "-m", "countdown_kd", "status"]
        done = subprocess.run(command, cwd=launch.folder, env=environment, capture_output=True, text=True)
        states = [run.data.tags["countdown_kd.state"] for run in launch.runs("cell")]
        return done.returncode, states, launch.runs("sweep")[0].info.status, done.stdout.strip().splitlines()[-1]

    process = launch.start("-m", "seed=1,2,3", "trainer.max_steps=500", *CELL[1:])
    while not list(launch.folder.rglob("run.log")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    assert status() == (1, ["running"], "RUNNING", "2 of 3 cells have not started yet")
    # Between two cells, every one that there is has ended.
    (cell,) = launch.runs("cell")
    launch.client.set_terminated(cell.info.run_id, "FINISHED")
    assert status()[0] == 1 and launch.runs("sweep")[0].info.status == "RUNNING"
    launch.client.update_run(cell.info.run_id, "RUNNING")

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    assert status() == (1, ["killed"], "KILLED", "2 of 3 cells never started")


def test_the_same_command_again_runs_only_what_is_missing(launch, tmp_path):
    assert launch("seed=1", *CELL).returncode == 0
    (first,) = launch.runs("cell")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    launch.folder = elsewhere  # the same store, another folder
    result = launch("-m", "seed=1,2", *CELL)
    assert result.returncode == 0, result.stderr
    assert "1 of 2 cells are done" in result.stdout
    cells = launch.runs("cell")
    assert [cell.data.params["seed"] for cell in cells] == ["1", "2"]
    assert cells[0].info.run_id == first.info.run_id
    table = result.stdout[result.stdout.rindex("seed") :]
    assert len([line for line in table.splitlines() if "→" in line and "(" in line]) == 2, "both are compared"

    again = launch("-m", "seed=1,2", *CELL)
    assert again.returncode == 0 and "2 of 2 cells are done" in again.stdout
    assert len(launch.runs("cell")) == 2 and len(launch.runs("sweep")) == 1
    assert "solved" in again.stdout
    forced = launch("seed=1", "force=true", *CELL)
    assert forced.returncode == 0, forced.stderr
    old, _, new = launch.runs("cell")
    assert [launch.losses(run.info.run_id) for run in (old, new)].count(launch.losses(old.info.run_id)) == 2


def test_a_folder_of_another_cell_is_refused_before_anything_starts(launch):
    once = ("baseline=student", "eval.num_puzzles=5", "hydra.run.dir=exp")
    assert launch(*once).returncode == 0
    before = {file: file.stat().st_mtime_ns for file in (launch.folder / "exp").rglob("*")}
    for other in (("seed=2",), ("seed=2", "force=true")):
        second = launch(*once, *other)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert "exp belongs to baseline-student+eval.num_puzzles-5" in second.stderr.replace("\n", " ")
    two = launch("-m", "seed=1,2", *once[:2], "hydra.sweep.subdir=x")
    assert two.returncode == 2 and "would both lie in" in two.stderr
    assert {file: file.stat().st_mtime_ns for file in (launch.folder / "exp").rglob("*")} == before
    assert len(launch.runs("cell")) == 1 and not launch.runs("sweep")

    forced = launch(*once, "force=true")  # the same cell may have its folder again
    assert forced.returncode == 0, forced.stderr
    assert len(launch.runs("cell")) == 2
