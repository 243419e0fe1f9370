"""Sweeps on a real Slurm: one node with two pretended GPUs, so two cells at a time."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import Launcher
from omegaconf import OmegaConf

from countdown_kd import tracking
from countdown_kd.config import ROOT
from countdown_kd.launching.slurm.job import Job
from countdown_kd.launching.slurm.query import JobRecord, state_by
from countdown_kd.launching.slurm.submit import leave_or_cancel, one_task
from countdown_kd.launching.states import State
from countdown_kd.launching.status import status

SLURM = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=4")
SHORT = ("trainer.max_steps=5", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=40")


def launcher(slurm, folder: Path) -> Launcher:
    launch = Launcher(folder)
    # Two cells share two cores; and sums over one thread are the same sums everywhere.
    launch.environment = slurm.env | {"OMP_NUM_THREADS": "1"}
    return launch


@pytest.fixture
def launch(slurm, tmp_path):
    yield launcher(slurm, tmp_path)
    for job in slurm.run("squeue", "-h", "-o", "%A").split():
        slurm.run("scancel", job)


def wait(condition, process=None, patience_s=300):
    """What the condition returns, once it is true."""
    deadline = time.time() + patience_s
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


def command_line(*arguments, launch):
    """python -m countdown_kd, with the launcher's store and cluster."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": launch.uri, "COLUMNS": "160"} | launch.environment
    return subprocess.run(
        [sys.executable, "-m", "countdown_kd", *arguments], cwd=launch.folder, env=environment, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip


def by_seed(launch) -> dict[int, object]:
    return {int(run.data.params["seed"]): run for run in launch.runs("cell")}


def steps(launch, run) -> list[int]:
    history = launch.client.get_metric_history(run.info.run_id, "train/loss")
    return sorted(point.step for point in history)


def accounted(slurm, job: str, *arguments: str) -> list[str]:
    """What sacct says of a job: its states, without who cancelled it."""
    rows = slurm.run("sacct", "-n", "-X", "-P", "-j", job, "-o", "State", *arguments).splitlines()
    return [row.split()[0] for row in rows]


def state(run) -> str:
    return tracking.described(run)


# ------------------------------------------------------------------------------------------------
# The main job


@pytest.mark.timeout(1200)
def test_the_sweep_on_slurm_solves_what_the_local_one_solves(slurm, tmp_path):
    grid = ("-m", "precision=bf16,fp32", *SHORT)
    there, here = launcher(slurm, tmp_path / "slurm"), launcher(slurm, tmp_path / "local")
    there.folder.mkdir()
    here.folder.mkdir()
    process = there.start(*grid, "gen=vllm,hf", *SLURM)
    try:
        # Two at a time, and a job that runs bears its cell's name.
        wait(lambda: slurm.run("squeue", "-h", "-t", "R", "-o", "%j").count("gen-") == 2, process)
        assert len(slurm.run("squeue", "-h", "-r", "-t", "PD").splitlines()) == 2
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, err
    cells = there.runs("cell")
    assert {run.info.status for run in cells + there.runs("sweep")} == {"FINISHED"}
    jobs = [run.data.tags["countdown_kd.slurm_job"] for run in cells]
    assert [accounted(slurm, job) for job in jobs] == [["COMPLETED"]] * 4
    for run in cells:
        log = Path(run.data.tags["countdown_kd.folder"], "slurm.log").read_text()
        assert "after training" in log
    assert "precision gen" in " ".join(out.split()), "the table at the end"

    assert here(*grid, "gen=hf", timeout=500).returncode == 0
    ours = {run.data.params["precision"]: run for run in cells if run.data.params["gen"] == "hf"}
    theirs = {run.data.params["precision"]: run for run in here.runs("cell")}
    for precision in ("bf16", "fp32"):
        for name in ("eval_before/accuracy", "eval/accuracy"):
            assert ours[precision].data.metrics[name] == theirs[precision].data.metrics[name]
        assert there.losses(ours[precision].info.run_id) == here.losses(theirs[precision].info.run_id)


# ------------------------------------------------------------------------------------------------
# Every cell ends as what it was


@pytest.mark.timeout(1800)
def test_eight_cells_five_faults_and_the_same_command_again(slurm, launch):
    command = (
        "-m", "seed=1,2,3,4,5,6,7,8", "trainer.max_steps=30", *SHORT[1:], *SLURM,
        "hydra.launcher.max_num_timeout=0", "hydra.launcher.signal_delay_s=30",
    )  # fmt: skip
    process = launch.start(*command)

    def training(seed, at_least=2):
        """The cell's run, once it trains."""

        def trains():
            run = by_seed(launch).get(seed)
            return run and len(steps(launch, run)) >= at_least and run

        return wait(trains, process)

    def processes(run):
        """The process that trains the cell."""
        found = subprocess.run(["pgrep", "-f", f"countdown_kd.run {run.data.tags['countdown_kd.folder']}/cell.yaml"],
                               capture_output=True, text=True)  # fmt: skip
        return [int(pid) for pid in found.stdout.split()]

    try:
        wait(lambda: any(launch.folder.rglob("slurm.log")), process)
        wait(lambda: len(launch.runs("cell")) == 8, process)
        raises = Path(by_seed(launch)[6].data.tags["countdown_kd.folder"], "checkpoint-6")
        raises.write_text("in the way of a checkpoint")

        training(1)
        training(2)
        slurm.run("sbatch", "-p", "urgent", "--gres=gpu:1", "--time=1", "-o", "/dev/null", "--wrap", "sleep 1")
        preempted = wait(lambda: [r for r in by_seed(launch).values() if "goes on" in state(r)], process)
        killed = training(3)
        for pid in processes(killed):
            os.kill(pid, signal.SIGKILL)
        late = training(4)
        for pid in processes(late):
            os.kill(pid, signal.SIGSTOP)
        slurm.run("scontrol", "update", f"jobid={late.data.tags['countdown_kd.slurm_job']}", "TimeLimit=1")
        slurm.run("scancel", training(5).data.tags["countdown_kd.slurm_job"])
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()

    assert process.returncode == 1
    cells = by_seed(launch)
    jobs = {seed: run.data.tags["countdown_kd.slurm_job"] for seed, run in cells.items()}
    told = {
        seed: (run.info.status, state(run), *accounted(slurm, jobs[seed])) for seed, run in cells.items()
    }  # fmt: skip
    assert told == {
        1: ("FINISHED", "finished", "COMPLETED"),
        2: ("FINISHED", "finished", "COMPLETED"),
        3: ("KILLED", "killed by SIGKILL", "FAILED"),
        4: ("KILLED", "timed out", "TIMEOUT"),
        5: ("KILLED", "cancelled", "CANCELLED"),
        6: ("FAILED", "failed (exit code 1)", "FAILED"),
        7: ("FINISHED", "finished", "COMPLETED"),
        8: ("FINISHED", "finished", "COMPLETED"),
    }
    history = accounted(slurm, preempted[0].data.tags["countdown_kd.slurm_job"], "-D")
    assert history[-1] == "COMPLETED" and set(history[:-1]) <= {"REQUEUED", "PREEMPTED"} and len(history) > 1
    assert launch.runs("sweep")[0].info.status == "FAILED"
    for seed, (_, word, _) in told.items():
        if word != "finished":
            log = f"{cells[seed].data.tags['countdown_kd.folder']}/slurm.log"
            assert word in out and log in out.replace("\n", "").replace(" ", "")
    assert "FileExistsError" in out, "the last lines of a log are in the summary"
    shown = command_line("status", launch=launch)
    assert shown.returncode == 1 and all(word in shown.stdout for _, word, _ in told.values())

    raises.unlink()
    before = {seed: run.info.run_id for seed, run in cells.items()}
    again = launch(*command, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "4 of 8 cells are done" in again.stdout and "submitted 4 cells" in again.stdout
    cells = by_seed(launch)
    assert {seed: run.info.run_id for seed, run in cells.items()} == before, "each in its own run"
    assert {state(run) for run in cells.values()} == {"finished"}
    assert all(steps(launch, run) == list(range(1, 31)) for run in cells.values()), "no point lost or doubled"
    assert launch.runs("sweep")[0].info.status == "FINISHED"


@pytest.mark.timeout(600)
def test_explain_sends_its_probes_to_slurm(slurm, launch):
    done = launch(
        "-m", "hydra/sweeper=explain", "precision=fp32,bf16_pure", "++trainer.do_eval=false,true", *SHORT, *SLURM,
        "hydra.sweeper.tolerance=1e-6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^`precision .*` explains 100% .* `trainer.do_eval` explains none of it.$", done.stdout, re.M)
    cells = launch.runs("cell")
    assert [run.info.run_name for run in cells] == ["A", "B", "A+precision", "A+trainer.do_eval"]
    jobs = [run.data.tags["countdown_kd.slurm_job"].split("_")[0] for run in cells]
    assert len(set(jobs)) == 2, "an array for A and B, one for both probes of the round"


@pytest.mark.timeout(900)
def test_a_cell_at_its_time_limit_is_queued_again_and_goes_on(slurm, launch):
    process = launch.start(
        "-m", "seed=1", "trainer.max_steps=400", *SHORT[1:], *SLURM, "hydra.launcher.signal_delay_s=30"
    )
    try:
        run = wait(
            lambda: (
                any(launch.folder.rglob("slurm.log"))
                and [run for run in launch.runs("cell") if len(steps(launch, run)) >= 2]
            ),
            process,
        )[0]
        slurm.run("scontrol", "update", f"jobid={run.data.tags['countdown_kd.slurm_job']}", "TimeLimit=1")
        wait(lambda: state(launch.runs("cell")[0]) == "timed out, goes on", process)
        job = launch.runs("cell")[0].data.tags["countdown_kd.slurm_job"]
        wait(lambda: "PENDING" in slurm.run("squeue", "-h", "-j", job, "-o", "%T"), process)
        slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")
        _, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, err
    (run,) = launch.runs("cell")
    assert steps(launch, run) == list(range(1, 401))
    assert Path(run.data.tags["countdown_kd.folder"], "timeouts").read_text() == "1"


@pytest.mark.parametrize(
    "slurms, exit_code, ran, known, state, details",
    [
        ("PENDING", "0:0", False, State.PENDING, State.PENDING, ""),
        ("PENDING", "0:0", True, State.PREEMPTED_REQUEUED, State.PREEMPTED_REQUEUED, ""),
        ("PENDING", "0:0", True, State.STOPPING, State.STOPPED_REQUEUED, ""),  # SIGTERM was a preemption
        ("PENDING", "0:0", True, State.RUNNING, State.PENDING, ""),  # an administrator has queued it again
        ("RUNNING", "0:0", True, State.PENDING, State.STARTING, ""),
        ("RUNNING", "0:0", True, State.RUNNING, State.RUNNING, ""),
        ("COMPLETING", "0:0", True, State.STOPPING, State.STOPPING, ""),  # not over: Slurm has not said what it was
        ("CANCELLED", "0:0", True, State.STOPPING, State.CANCELLED, ""),
        ("FAILED", "143:0", True, State.STOPPING, State.STOPPED, ""),
        (None, "", True, State.STOPPING, State.STOPPED, ""),
        ("OUT_OF_MEMORY", "0:125", True, State.RUNNING, State.OUT_OF_MEMORY, ""),
        ("OUT_OF_MEMORY", "0:125", True, State.KILLED, State.OUT_OF_MEMORY, ""),
        ("NODE_FAIL", "0:0", True, State.RUNNING, State.NODE_FAILED, ""),
        ("PREEMPTED", "0:0", True, State.RUNNING, State.PREEMPTED, ""),
        ("PREEMPTED", "0:0", True, State.PREEMPTING, State.PREEMPTED, ""),
        ("CANCELLED", "0:0", False, State.PENDING, State.NEVER_STARTED, ""),
        ("CANCELLED", "0:0", False, State.NEVER_STARTED, State.NEVER_STARTED, ""),
        ("FAILED", "1:0", True, State.RUNNING, State.FAILED, "exit code 1"),
        ("FAILED", "9:0", True, State.RUNNING, State.KILLED, "SIGKILL"),  # sacct's word for 137
        ("FAILED", "137:0", True, State.RUNNING, State.KILLED, "SIGKILL"),  # scontrol's
        ("FAILED", "0:9", True, State.RUNNING, State.KILLED, "SIGKILL"),  # the batch script itself
        ("FAILED", "127:0", True, State.RUNNING, State.FAILED, "exit code 127"),
        ("FAILED", "3:0", True, State.STARTING, State.FAILED_TO_START, "exit code 3"),
        ("FAILED", "126:0", True, State.PENDING, State.FAILED_TO_START, "exit code 126"),
        ("FAILED", "127:0", True, State.PENDING, State.FAILED_TO_START, "exit code 127"),
        ("FAILED", "255:0", True, State.STARTING, State.FAILED_TO_START, "exit code 255"),
        ("FAILED", "0:53", True, State.PENDING, State.FAILED_TO_START, "exit code 0:53"),  # no log can be written
        (None, "", True, State.RUNNING, State.LOST, "Slurm does not know its job any more"),
    ],
)
def test_every_end_has_its_state(slurms, exit_code, ran, known, state, details):
    assert state_by(slurms and JobRecord(slurms, exit_code, ran=ran), known) == (state, details)


def test_a_job_that_ends_in_its_setup_never_started(slurm, launch):
    result = launch("-m", "seed=1", *SHORT, *SLURM, "hydra.launcher.setup=['sleep 6', 'exit 127']")
    assert result.returncode == 1 and "ValueError" not in result.stderr
    (run,) = launch.runs("cell")
    assert (run.info.status, state(run)) == ("FAILED", "failed to start (exit code 127)")
    assert accounted(slurm, run.data.tags["countdown_kd.slurm_job"]) == ["FAILED"]


@pytest.fixture
def cell_with_a_job(tmp_path, monkeypatch):
    """A store with a sweep of one cell, which is said to run as Slurm's job 123: no Slurm is needed."""
    store = OmegaConf.create({"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "countdown_kd"})
    client, experiment_id = tracking.open_store(store)
    sweep = tracking.start_run(client, experiment_id, "sweep", "sweep")
    monkeypatch.setenv(tracking.SWEEP_RUN_ID, sweep)
    tags = {tracking.JOB_TAG: "123", tracking.STATE_TAG: State.RUNNING}
    run_id = tracking.start_run(client, experiment_id, "cell", "cell", tags=tags)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def answer(*names: str, script: str) -> None:
        for name in names:
            (programs / name).write_text(f"#!/bin/sh\n{script}")
            (programs / name).chmod(0o755)

    return SimpleNamespace(client=client, experiment_id=experiment_id, sweep=sweep, run_id=run_id, answer=answer)


def test_no_answer_of_slurm_changes_nothing_and_is_told(cell_with_a_job, capsys):
    store = cell_with_a_job

    def look():
        code = status(store.client, store.experiment_id, None, live=False)
        found = store.client.get_run(store.run_id), store.client.get_run(store.sweep)
        return (
            code,
            state(found[0]),
            [run.info.status for run in found],
            "Slurm does not answer" in capsys.readouterr().out,
        )

    unchanged = (1, "running", ["RUNNING", "RUNNING"], True)
    assert look() == unchanged, "no Slurm here"
    store.answer("squeue", "sacct", "scontrol", script="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert look() == unchanged
    store.answer("sacct", script="echo 'JobID|State|ExitCode|Start'")
    assert look() == unchanged, "accounting alone may not know it yet"
    store.answer("squeue", "scontrol", script="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert look() == (1, "lost (Slurm does not know its job any more)", ["KILLED", "KILLED"], False)


def test_ctrl_c_leaves_a_cell_that_runs_without_slurm(cell_with_a_job, monkeypatch, capsys):
    store = cell_with_a_job
    store.client.delete_tag(store.run_id, tracking.JOB_TAG)
    monkeypatch.setattr("countdown_kd.launching.slurm.submit.time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        leave_or_cancel(store.client, [store.run_id])
    assert end.value.code == 130 and "scancel" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "received, said",
    [
        ([signal.SIGUSR2], "timed out (Slurm does not queue it again: requeue is disabled)"),
        ([signal.SIGUSR2, signal.SIGTERM], "timed out (Slurm does not queue it again: requeue is disabled)"),
        ([signal.SIGTERM], "stopped"),
    ],
)
def test_a_job_that_stopped_waits_for_slurm_and_never_ends_well(cell_with_a_job, tmp_path, monkeypatch, received, said):
    store, slept = cell_with_a_job, []
    store.answer("scontrol", script="echo 'requeue is disabled' >&2; exit 1")
    monkeypatch.setattr("countdown_kd.launching.slurm.job.times", lambda job: (5400, 7200))
    monkeypatch.setattr("countdown_kd.launching.slurm.job.time.sleep", slept.append)
    cell = SimpleNamespace(store=store.client, run_id=store.run_id, name="cell", folder=tmp_path)
    job = Job(cell, signal_delay_s=1800, max_num_timeout=20, received=dict.fromkeys(received, 0))
    with pytest.raises(SystemExit) as end:
        job.interrupted("123")
    assert end.value.code == 143 and slept[0] > 1800
    run = store.client.get_run(store.run_id)
    assert (run.info.status, state(run)) == ("RUNNING", said), "what it was is Slurm's to say"


@pytest.mark.timeout(600)
def test_a_cell_preempted_before_it_begins_is_queued_again(slurm, launch):
    process = launch.start("-m", "seed=1", *SHORT, *SLURM)
    try:
        wait(lambda: "RUNNING" in slurm.run("squeue", "-h", "-o", "%T"), process)
        slurm.run("sbatch", "-p", "urgent", "--gres=gpu:2", "--time=1", "-o", "/dev/null", "--wrap", "sleep 1")
        wait(lambda: state(launch.runs("cell")[0]) == "preempted, goes on", process)
        assert not any(launch.folder.rglob("run.log")), "the cell's process is not even started"
        _, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, err
    (run,) = launch.runs("cell")
    assert accounted(slurm, run.data.tags["countdown_kd.slurm_job"], "-D") == ["REQUEUED", "COMPLETED"]


@pytest.mark.timeout(600)
def test_the_launcher_leaves_on_slurms_word_not_on_a_cells(slurm, launch):
    # Slurm as it is without SlurmctldParameters: SIGTERM tells a cell neither that it is preempted nor cancelled.
    conf = slurm.folder / "slurm.conf"
    before = conf.read_text()
    plain = before.replace("SlurmctldParameters=preempt_send_user_signal\n", "").replace("GraceTime=30", "GraceTime=10")
    conf.write_text(plain)
    slurm.run("scontrol", "reconfigure")
    process = launch.start("-m", "seed=1", "trainer.max_steps=3000", *SHORT[1:], *SLURM)
    try:
        wait(lambda: any(launch.folder.rglob("run.log")) and launch.losses(launch.runs("cell")[0].info.run_id), process)
        slurm.run("sbatch", "-p", "urgent", "--gres=gpu:2", "--time=1", "-o", "/dev/null", "--wrap", "sleep 1")
        wait(lambda: state(launch.runs("cell")[0]) == "stopped", process)
        wait(lambda: state(launch.runs("cell")[0]) == "stopped, goes on", process)
        job = launch.runs("cell")[0].data.tags["countdown_kd.slurm_job"]
        slurm.run("scancel", job)
        process.communicate(timeout=120)
    finally:
        process.kill()
        conf.write_text(before)
        slurm.run("scontrol", "reconfigure")
    (run,) = launch.runs("cell")
    assert process.returncode == 1
    assert (run.info.status, state(run), accounted(slurm, job)) == ("KILLED", "cancelled", ["CANCELLED"])


# ------------------------------------------------------------------------------------------------
# Submitting, leaving, coming back


def test_a_hundred_held_cells_wait_and_are_left_and_cancelled(slurm, launch):
    seeds = ",".join(map(str, range(100)))
    process = launch.start(
        "-m", f"seed={seeds}", *SHORT, *SLURM, "+hydra.launcher.additional_parameters.hold=true",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("submitted 100 cells as Slurm job ")
    # The launcher's own seconds, and sbatch's: a clock on the wall would tell what else the machine does.
    used = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    assert used / os.sysconf("SC_CLK_TCK") < 10
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps and "sqlalchemy" in maps, "submitting needs no torch"
    assert len(slurm.run("squeue", "-h", "-r", "-t", "PD").splitlines()) == 100
    wait(lambda: "pending" in process.stdout.readline(), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The jobs go on" in out and "python -m countdown_kd status" in out
    assert len(slurm.run("squeue", "-h", "-r").splitlines()) == 100
    assert launch.runs("sweep")[0].info.status == "RUNNING"

    waiting = command_line("status", launch=launch)
    assert waiting.stdout.count("pending (JobHeldUser)") == 100
    again = launch.start(
        "-m", f"seed={seeds}", *SHORT, *SLURM, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    assert again.stdout.readline().startswith("100 of 100 cells are done or under way"), "nothing is submitted twice"
    wait(lambda: "pending" in again.stdout.readline(), again)
    again.send_signal(signal.SIGINT)
    wait(lambda: "The jobs go on" in again.stdout.readline(), again)
    again.send_signal(signal.SIGINT)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 1 and "never started" in out
    ended = command_line("status", launch=launch)
    assert ended.returncode == 1 and ended.stdout.count("never started") >= 100
    assert slurm.run("squeue", "-h") == ""
    assert {run.info.status for run in launch.runs("cell") + launch.runs("sweep")} == {"KILLED"}


def test_a_plan_shows_the_script_and_submits_nothing(slurm, launch):
    plan = launch("-m", "seed=1,2", "trainer.num_generations=1,5", *SHORT[:1], *SLURM, "plan=true")
    assert plan.returncode == 0, plan.stderr
    assert "2 of 4 cells would run; 2 invalid" in plan.stdout and "a divisor of 16" in " ".join(plan.stdout.split())
    assert "#SBATCH --array=0-1%2" in plan.stdout and "srun" in plan.stdout
    assert "#SBATCH --requeue\n" in plan.stdout, "also where the cluster's default is not to"
    assert slurm.run("squeue", "-h") == ""
    assert not launch.runs("cell")


def test_a_plan_without_slurm_says_where_its_script_is_made(tmp_path):
    launch = Launcher(tmp_path)
    launch.environment = {"PATH": "/nowhere"}
    plan = launch("-m", "seed=1,2", *SHORT, *SLURM, "plan=true")
    assert plan.returncode == 0 and "2 of 2 cells would run" in plan.stdout and "login node" in plan.stdout


def test_slurm_wants_a_sweep_and_says_so(launch):
    result = launch(*SHORT, *SLURM)
    assert result.returncode == 2 and "add -m" in result.stderr and "Traceback" not in result.stderr
    assert not (launch.folder / "outputs").exists()


def test_what_was_submitted_is_what_runs(slurm, launch, tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("countdown_kd", "conf", "sweeps", "hydra_plugins"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True)
    launch.program = Path(shutil.copy(ROOT / "launch.py", checkout))
    launch.environment |= {"PYTHONPATH": str(checkout)}
    launch.folder = checkout  # where python -m would find the package before anything else
    git = "git init -q && git add . && git -c user.name=me -c user.email=me@example.org commit -qm as-submitted"
    subprocess.run(git, shell=True, cwd=checkout, check=True)
    process = launch.start("-m", "seed=1", *SHORT, *SLURM, "+hydra.launcher.additional_parameters.hold=true")
    assert process.stdout.readline().startswith("submitted 1 cells")
    (checkout / "countdown_kd" / "run.py").write_text("raise SystemExit('edited while the job was waiting')")
    (checkout / "conf" / "trainer" / "gold.yaml").write_text("nonsense: true")
    slurm.run("scontrol", "release", *slurm.run("squeue", "-h", "-o", "%A").split())
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (run,) = launch.runs("cell")
    effective = yaml.safe_load(
        Path(launch.client.download_artifacts(run.info.run_id, "config/effective.yaml")).read_text()
    )
    assert effective["code"] == run.data.tags["countdown_kd.code"]
    assert effective["commit"] == run.data.tags["mlflow.source.git.commit"] != ""


def test_a_job_that_does_not_reach_the_store_says_so(slurm, launch):
    # Where the jobs are, the store's address leads nowhere.
    result = launch(
        "-m", "seed=1", *SHORT, *SLURM, "hydra.launcher.setup=['export MLFLOW_TRACKING_URI=http://127.0.0.1:9']"
    )
    assert result.returncode == 1
    assert "does not reach the MLflow store" in result.stdout and "mlflow server" in result.stdout
    (cell,) = launch.runs("cell")
    assert (cell.info.status, state(cell)) == ("FAILED", "failed to start (exit code 1)")


def test_what_slurm_refuses_is_told_in_its_words(slurm, launch):
    result = launch("-m", "seed=1,2", *SHORT, *SLURM, "hydra.launcher.partition=nowhere")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"Slurm did not take the cells: .*invalid partition", result.stderr, re.S)
    assert {(run.info.status, state(run)) for run in launch.runs("cell")} == {("KILLED", "never started")}


def test_ctrl_c_while_cells_are_prepared_leaves_none_waiting(slurm, launch):
    seeds = ",".join(map(str, range(100)))
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = launch.start("-m", f"seed={seeds}", *SHORT, *SLURM, **listen)
    wait(lambda: len(list(launch.folder.rglob("cell.yaml"))) > 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by Ctrl-C" in err and "cells never started" in out
    assert slurm.run("squeue", "-h") == ""
    assert {run.info.status for run in launch.runs("cell") + launch.runs("sweep")} == {"KILLED"}


@pytest.mark.parametrize("key", ["nodes", "tasks_per_node"])
def test_a_cell_is_one_task(key, capsys):
    with pytest.raises(SystemExit):
        one_task({key: 2})
    assert f"hydra.launcher.{key}=2" in capsys.readouterr().err


def test_without_accounting_the_controller_is_asked(slurm, launch):
    slurm.end("slurmdbd")
    try:
        process = launch.start("-m", "seed=1", "trainer.max_steps=500", *SHORT[1:], *SLURM)
        (run,) = wait(lambda: any(launch.folder.rglob("run.log")) and launch.runs("cell"), process)
        slurm.run("scancel", run.data.tags["countdown_kd.slurm_job"])
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "cancelled" in out
        shown = command_line("status", launch=launch)
        assert "cancelled" in shown.stdout and "sacct does not answer" in shown.stdout
    finally:
        slurm.begin("slurmdbd")


# ------------------------------------------------------------------------------------------------
# More than one rank


@pytest.mark.timeout(1200)
def test_two_ranks_are_preempted_and_train_as_one_would(slurm, launch, tmp_path):
    off_policy = ("trainer.lmbda=0.0", "trainer.max_steps=12", "eval.num_puzzles=20")
    process = launch.start(
        "-m", "gen=hf,vllm", "dist=ddp", "dist.nproc_per_node=2", "trainer.per_device_train_batch_size=4",
        *off_policy, *SLURM,
    )  # fmt: skip
    try:
        run = wait(
            lambda: any(launch.folder.rglob("slurm.log"))
            and [r for r in launch.runs("cell") if r.data.params["gen"] == "hf" and steps(launch, r)],
            process,
        )[0]  # fmt: skip
        # As a preemption does it: to every process of the job.
        slurm.run("scancel", "--signal=USR2", run.data.tags["countdown_kd.slurm_job"])
        _, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, err
    cells = {run.data.params["gen"]: run for run in launch.runs("cell")}
    assert accounted(slurm, cells["hf"].data.tags["countdown_kd.slurm_job"], "-D")[0] == "REQUEUED"
    again = [file.path for file in launch.client.list_artifacts(cells["hf"].info.run_id, "config")]
    assert any("effective_from_step_" in path for path in again), "it went on from a checkpoint"
    for run in cells.values():
        assert run.data.params["global_batch"] == "8" and steps(launch, run) == list(range(1, 13))

    alone = Launcher(tmp_path / "alone")
    alone.folder.mkdir()
    assert alone("trainer.per_device_train_batch_size=8", *off_policy).returncode == 0
    (single,) = alone.runs("cell")
    for run in cells.values():
        ours, theirs = launch.losses(run.info.run_id), alone.losses(single.info.run_id)
        assert ours == pytest.approx(theirs, rel=1e-4)
