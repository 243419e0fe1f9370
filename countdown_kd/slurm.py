"""The cells of a sweep as Slurm jobs: submitting them, what happens inside a job, and what Slurm says became of it.

What is submitted is fixed: a pickled Cell, its resolved config and a snapshot of the code. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from countdown_kd import tracking
from countdown_kd.cell import Cell, CellFailed, lock, prepare, standings
from countdown_kd.config import validate

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------
# Submitting


def launch(
    loader: ConfigLoader,
    config: DictConfig,
    params: dict[str, Any],
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[JobReturn]:
    """Submit the cells that are not done as one job array, follow them to their end, and return what became of each.

    Ctrl-C leaves the jobs running and raises SystemExit; a second one within five seconds cancels them.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if missing := [program for program in ("sbatch", "srun") if not shutil.which(program)]:
        absent = f"there is no {' and no '.join(missing)} here"
        print(f"hydra/launcher=slurm: {absent}. Call it on a login node of the cluster", file=sys.stderr)
        raise SystemExit(2)
    one_task(params)
    client, experiment_id = tracking.open_store(config.tracking)
    composed = [loader.load_sweep_config(config, list(overrides)) for overrides in job_overrides]
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):  # whose cells were checked before
        for cfg in composed:
            validate(cfg)
    ranks, gpus = {cfg.dist.nproc_per_node for cfg in composed} - {"gpu"}, params.get("gpus_per_node")
    if gpus and max(ranks, default=1) > gpus:
        log.warning(
            "dist.nproc_per_node=%s: a job has %s GPU, which its ranks would share. One rank a GPU: "
            "hydra.launcher.gpus_per_node=%s", max(ranks), gpus, max(ranks),
        )  # fmt: skip
    run_ids: dict[str, str] = {}  # by identity: a cell that is asked for twice runs once
    identities, cells = [], []
    # In the middle of what MLflow writes, an interrupt would leave the store locked: it is heard between cells. While
    # jobs are submitted, it would end sbatch too and leave jobs that nobody knows of: it is ignored.
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        for number, (cfg, found) in enumerate(
            zip(composed, standings(client, experiment_id, composed), strict=True), initial_job_idx
        ):
            if heard:
                break
            identities.append(found.identity)
            if found.what in ("done", "active"):
                run_ids[found.identity] = found.run.info.run_id
            if found.identity in run_ids:
                continue
            with read_write(cfg.hydra), read_write(cfg.hydra.runtime), open_dict(cfg.hydra):
                cfg.hydra.job.num = number
                cfg.hydra.job.id = str(number)
                folder = os.path.join(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
                cfg.hydra.runtime.output_dir = os.path.abspath(folder)
            HydraConfig.instance().cfg = cfg  # for ${hydra:…} in a config
            cells.append(prepare(cfg, cfg.hydra, found))
            run_ids[found.identity] = cells[-1].run_id
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if heard:
            raise KeyboardInterrupt
        for cell, job_id in zip(cells, submit(params, cells), strict=True):
            client.set_tag(cell.run_id, tracking.JOB_TAG, job_id)
    except BaseException as error:
        for run in tracking.cells_of(client, os.environ[tracking.SWEEP_RUN_ID]):
            if run.data.tags.get(tracking.STATE_TAG) == "pending" and tracking.JOB_TAG not in run.data.tags:
                tracking.end_run(client, run.info.run_id, "KILLED", "never started")
        if not isinstance(error, (FailedJobError, FailedSubmissionError)):
            raise
        print(
            f"\nSlurm did not take the cells: {error}\n"
            "Keys hydra.launcher.* are its options; python -m countdown_kd doctor hydra/launcher=slurm looks at them",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        see_out(client, list(run_ids.values()))
    except KeyboardInterrupt:
        leave_or_cancel(client, list(run_ids.values()))

    returns = []
    for overrides, identity in zip(job_overrides, identities, strict=True):
        run = client.get_run(run_ids[identity])
        done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        done.return_value = run.data.metrics.get("eval/accuracy")
        if run.info.status != "FINISHED":
            done.status = JobStatus.FAILED
            done.return_value = CellFailed(f"cell {run.info.run_name}: {run.data.tags.get(tracking.STATE_TAG)}")
        returns.append(done)
    return returns


def one_task(params: dict[str, Any]) -> None:
    """Exit where a job would run its cell more than once."""
    for key in ("nodes", "tasks_per_node"):
        if (params.get(key) or 1) > 1:
            print(
                f"hydra.launcher.{key}={params[key]}: every task of a job would run the same cell. It must be 1; "
                "dist=ddp starts the ranks of a cell, one a GPU, inside one task",
                file=sys.stderr,
            )
            raise SystemExit(2)


def see_out(client: MlflowClient, run_ids: Sequence[str]) -> None:
    """Follow the cells until Slurm has let go of their jobs: a cell's own last word may not be the job's."""
    from countdown_kd.status import GOING_ON, follow, look

    while True:
        follow(client, run_ids)
        wait_to_leave(jobs_of(client.get_run(run_id) for run_id in run_ids))
        runs, _ = look(client, run_ids)
        if not any(run.info.status in GOING_ON for run in runs):
            return


def jobs_of(runs: Iterable[Run]) -> list[str]:
    """The ids of the runs' jobs; a cell that runs without Slurm has none."""
    return [run.data.tags[tracking.JOB_TAG] for run in runs if tracking.JOB_TAG in run.data.tags]


def wait_to_leave(jobs: Sequence[str], patience_s: float = 60) -> None:
    """Cells close their runs a moment before Slurm closes their jobs: wait, so that both say the same."""
    deadline = time.time() + patience_s
    while jobs and time.time() < deadline and _lines("squeue", "-h", "-j", ",".join(parents(jobs))):
        time.sleep(1)


def leave_or_cancel(client: MlflowClient, run_ids: Sequence[str]) -> None:
    """After Ctrl-C: leave (SystemExit), or cancel where there is another within five seconds."""
    from countdown_kd.status import GOING_ON

    runs = [client.get_run(run_id) for run_id in run_ids]
    jobs = jobs_of(run for run in runs if run.info.status in GOING_ON)
    print("\nThe jobs go on. Ctrl-C again within 5 seconds cancels them.", flush=True)
    try:
        time.sleep(5)
    except KeyboardInterrupt:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        see_out(client, run_ids)
    else:
        print(f"Look at them with: {sys.executable} -m countdown_kd status")
        if jobs:
            print("Cancel them with:  scancel", *parents(jobs))
        raise SystemExit(130) from None


def submit(params: dict[str, Any], cells: Sequence[Cell]) -> list[str]:
    """Submit one job array; returns the cells' job ids, such as 123_0."""
    if not cells:
        return []
    folder = Path(params["submitit_folder"]).absolute()
    jobs = [Job(cell, params["signal_delay_s"], params["max_num_timeout"]) for cell in cells]
    ids = [job.job_id for job in executor(params, folder, cells[0].code).map_array(Job.run, jobs)]
    for cell, job_id in zip(cells, ids, strict=True):
        link = cell.folder / "slurm.log"
        link.unlink(missing_ok=True)
        link.symlink_to(folder / f"{job_id}_0_log.out")
    print(f"submitted {len(ids)} cells as Slurm job {' '.join(parents(ids))}", flush=True)
    return ids


# Python takes seconds to reach the handlers of Job.run, and a signal before that would kill it: USR2 for good. So they
# are blocked, to be heard there; or lost, where env is too old for that (coreutils 8.30) and Slurm has to say it twice.
DEAF = 'trap "" USR2 TERM; block="env --block-signal=USR2,TERM"; $block true 2>/dev/null || block=; exec $block "$@"'


def executor(params: dict[str, Any], folder: Path, code: Path | str):
    """Submitit's executor with hydra-submitit-launcher's parameters; jobs import the package from ``code``."""
    import submitit

    ours = {"submitit_folder", "max_num_timeout", "_target_"}
    base = {each.name for each in dataclasses.fields(BaseQueueConf)}
    given = {key: value for key, value in params.items() if key not in ours and value is not None}
    path = f'export PYTHONSAFEPATH=1 PYTHONPATH="{code}"${{PYTHONPATH:+:$PYTHONPATH}}'  # not the current folder first
    given["setup"] = [*given.get("setup", []), path]
    python = f"sh -c {shlex.quote(DEAF)} sh {shlex.quote(sys.executable)}"
    auto = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=python)
    auto.update_parameters(**{key if key in base else f"slurm_{key}": value for key, value in given.items()})
    return auto


def script(config: DictConfig, cells: int) -> str:
    """The sbatch script of a sweep of so many cells."""
    params = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    folder = Path(params["submitit_folder"]).absolute()
    slurm = executor(params, folder, folder.parent / ".code" / "…")._executor
    if cells > 1:
        slurm.parameters["map_count"] = cells
    return slurm._make_submission_file_text(slurm._submitit_command_str, "")


def parents(jobs: Sequence[str]) -> list[str]:
    """The ids of the arrays that the jobs belong to."""
    return list(dict.fromkeys(job.split("_")[0] for job in jobs))


# ------------------------------------------------------------------------------------------------
# Inside a job


@dataclass
class Job:
    """What a Slurm job runs: a cell's process, and a checkpoint before Slurm ends it."""

    cell: Cell
    signal_delay_s: int
    max_num_timeout: int
    received: dict[int, float] = field(default_factory=dict)  # signals, and when

    def run(self) -> None:
        """Ends with the exit code of the cell's process, so that Slurm calls a failed cell FAILED."""
        import submitit

        # Submitit's own handlers requeue at once; the ranks would not have saved anything yet. And under a job limit of
        # ten minutes it takes every preemption for a time-out.
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self.receive)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
        job_id = submitit.JobEnvironment().job_id
        self.check_store()
        subprocess.run(["scontrol", "update", f"JobId={job_id}", f"JobName={self.cell.name}"], check=False)
        with lock(self.cell.folder) as free:
            if not free:
                sys.exit(f"{self.cell.name} is running already, in {self.cell.folder}")
            self.cell.store.set_tag(self.cell.run_id, tracking.JOB_TAG, job_id)
            if self.received:
                self.interrupted(job_id)
            os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between two states of a progress bar in the log
            process = self.cell.start(ignore=(signal.SIGUSR2, signal.SIGTERM))
            while process.poll() is None:
                time.sleep(0.5)
                if self.received:
                    self.cell.ask_to_stop()  # again: what was asked while the cell started is forgotten
                if self.received and time.time() - min(self.received.values()) > self.patience_s:
                    log.warning("no checkpoint in time: killing the cell")
                    os.killpg(process.pid, signal.SIGKILL)
            code = process.returncode
            if self.received and (code != 0 or self.cell.stopped):
                self.interrupted(job_id)
            log.info("%s: %s", self.cell.name, self.cell.end(code))
        sys.exit(code if code >= 0 else 128 - code)

    def receive(self, number: int, frame: Any) -> None:
        """SIGUSR2: preempted or nearly out of time. SIGTERM: cancelled, or preempted on a cluster that says no more."""
        log.warning("%s: asking the cell to save a checkpoint and stop", signal.Signals(number).name)
        self.received.setdefault(number, time.time())
        self.cell.ask_to_stop()

    @property
    def patience_s(self) -> float:
        return max(20, self.signal_delay_s - 30)

    def interrupted(self, job_id: str) -> NoReturn:
        """The cell has stopped because Slurm asked for it: queue it again where that is wanted; wait for the end.

        Slurm's word for the end counts (``verdict``), so the run stays open until there is one.
        """
        ran_s, limit_s = _times(job_id)
        out_of_time = limit_s - ran_s < self.signal_delay_s + 60  # Slurm may be a minute early
        store, run_id = self.cell.store, self.cell.run_id
        timeouts = int(store.get_run(run_id).data.tags.get(tracking.TIMEOUTS_TAG, 0)) + out_of_time
        store.set_tag(run_id, tracking.TIMEOUTS_TAG, str(timeouts))
        state = "timed out" if out_of_time else "preempted"
        if signal.SIGUSR2 not in self.received:
            store.set_tag(run_id, tracking.STATE_TAG, "stopped")  # cancelled or preempted: SIGTERM does not tell
        elif out_of_time and timeouts > self.max_num_timeout:
            store.set_tag(run_id, tracking.STATE_TAG, state)
        else:
            log.info("%s: goes on from its checkpoint", state)
            store.set_tag(run_id, tracking.STATE_TAG, f"{state}, goes on")
            store.update_run(run_id, status="SCHEDULED")
            done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
            if done.returncode:
                why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
                log.error("Slurm does not queue it again: %s", why)
                store.set_tag(run_id, tracking.STATE_TAG, f"{state}; Slurm does not queue it again: {why}")
                store.update_run(run_id, status="RUNNING")
        # The end is left to Slurm, so that it calls it what it was: TIMEOUT, CANCELLED, PREEMPTED.
        time.sleep(max(600, limit_s - ran_s + 300 if out_of_time else 0))
        sys.exit(128 + signal.SIGTERM)  # it did not: no job that stopped halfway is COMPLETED

    def check_store(self) -> None:
        """Exit with what to do where this node does not reach the MLflow store, before anything is loaded."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            sys.exit("MLFLOW_TRACKING_URI is not set in the job: is sbatch given --export=NONE?")
        try:
            with mock.patch.dict(os.environ, tracking.IMPATIENT):
                self.cell.store.get_run(self.cell.run_id)
        except Exception as error:
            sys.exit(
                f"{os.uname().nodename} does not reach the MLflow store that the sweep was submitted with: {error}\n"
                "A cluster wants `mlflow server --host 0.0.0.0` on a machine that its nodes can reach, and "
                "MLFLOW_TRACKING_URI=http://THAT-MACHINE:5000 where launch.py is called"
            )


# ------------------------------------------------------------------------------------------------
# What Slurm says

PENDING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"}
ENDED = {
    "TIMEOUT": "timed out",
    "DEADLINE": "timed out",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "CANCELLED": "cancelled",
}
NOBODY = "nobody"  # instead of a program's name: Slurm is not here, or its daemons do not answer


@dataclass
class Told:
    """What Slurm tells of a job."""

    state: str  # Slurm's word, such as OUT_OF_MEMORY
    exit_code: str = ""  # CODE:SIGNAL
    reason: str = ""  # why it waits
    ran: bool = True


def refresh(client: MlflowClient, runs: Sequence[Run]) -> str:
    """Bring runs that are not FINISHED up to date with what Slurm says. Returns what it goes by.

    A job that could not close its run itself, because it was killed, timed out or cancelled, is closed here.
    """
    jobs = {run.data.tags[tracking.JOB_TAG]: run for run in runs if run.info.status != "FINISHED"}
    told, source = ask(list(jobs))
    for job_id, run in jobs.items():
        if job_id not in told:
            continue  # no answer: what was known last
        status, state = verdict(run, told[job_id])
        if (status, state) == (run.info.status, run.data.tags.get(tracking.STATE_TAG)):
            continue
        if client.get_run(run.info.run_id).info.status != run.info.status:
            continue  # its job has just said more than Slurm could
        if status in ("SCHEDULED", "RUNNING"):
            client.set_tag(run.info.run_id, tracking.STATE_TAG, state)
            client.update_run(run.info.run_id, status=status)
        else:
            tracking.end_run(client, run.info.run_id, status, state)
    return source


def verdict(run: Run, told: Told | None) -> tuple[str, str]:
    """MLflow's status and a person's word for a run, by what Slurm says of its job and what the job itself said."""
    status, state = run.info.status, run.data.tags.get(tracking.STATE_TAG, "")
    closed = status in ("FAILED", "KILLED")
    goes_on = state.endswith("goes on")
    begun = not state.startswith(("pending", "starting", "never started"))
    stopped = not goes_on and state.startswith(("stopped", "timed out", "preempted"))  # its job waits to be ended
    if told is None:  # neither in the queue nor in any memory of Slurm's
        if closed or stopped:
            return status if closed else "KILLED", state
        return "KILLED", "gone: Slurm does not know its job any more"
    if told.state in PENDING:
        if goes_on or (stopped and not closed):
            return "SCHEDULED", state if goes_on else f"{state}, goes on"
        return "SCHEDULED", f"pending ({told.reason})" if told.reason else "pending"
    if told.state in RUNNING:
        # Between a cell's end and its job's, the job's own word counts.
        return (status, state) if closed or goes_on else ("RUNNING", state if begun else "starting")
    if told.state == "CANCELLED" and not told.ran and not begun:
        return "KILLED", "never started"
    if told.state in ENDED:
        word = ENDED[told.state]
        return "KILLED", state if stopped and state.startswith(word) else word
    if closed:
        return status, state
    if stopped:
        return "KILLED", state
    code, number = (int(part or 0) for part in (told.exit_code or "0:0").split(":"))
    # A job of ours that was not killed ends with 1 or 2. srun makes 128 + N of signal N, and sacct N of that. Before
    # the cell has begun, a small number is an exit code of a setup line.
    number = number or (code - 128 if code > 128 else code if 2 < code <= 64 and begun else 0)
    if number in set(signal.Signals):
        return "KILLED", f"killed by {signal.Signals(number).name}"
    return "FAILED", f"{'failed' if begun else 'never started'} (exit code {told.exit_code.removesuffix(':0')})"


def ask(jobs: Sequence[str]) -> tuple[dict[str, Told | None], str]:
    """What Slurm tells of the jobs, and which of its programs does, or NOBODY. None: a job that it does not know;
    one of which nobody tells anything, not even that, is left out.

    The queue knows what waits and runs; the accounting what has ended, or, on a cluster without one, for some minutes
    the controller.
    """
    told: dict[str, Told | None] = {}
    if not jobs:
        return told, ""
    ids = ",".join(parents(jobs))
    queue = _lines("squeue", "-h", "-r", "-j", ids, "-o", "%i|%T|%r")
    for line in queue or ():
        job_id, state, reason = line.split("|")
        told[job_id] = Told(state, reason="" if reason == "None" else reason)
    if all(job in told for job in jobs):
        return told, "squeue"
    ended = _accounted(ids)
    source = "scontrol" if ended is None else "sacct"
    told = (ended or {}) | told
    if any(job not in told for job in jobs):
        # Accounting that has just come back knows nothing yet.
        controlled = _controlled(jobs)
        told = (controlled or {}) | told
        if queue is not None and controlled is not None:
            told = dict.fromkeys(jobs) | told
    return told, source if all(job in told for job in jobs) else NOBODY


def _accounted(ids: str) -> dict[str, Told] | None:
    from submitit.slurm.slurm import SlurmInfoWatcher

    lines = _lines("sacct", "-X", "-P", "-j", ids, "-o", "JobID,State,ExitCode,Start")
    if lines is None:
        return None
    rows = SlurmInfoWatcher(delay_s=1).read_info("\n".join(lines)) if lines else {}
    return {
        job: Told(row["State"].split()[0], row["ExitCode"], ran=row["Start"] not in ("Unknown", "None", ""))
        for job, row in rows.items()
    }


def _controlled(jobs: Sequence[str]) -> dict[str, Told] | None:
    told = {}
    for parent in parents(jobs):
        records = _controller(parent)
        if records is None:
            return None
        for job in records:
            job_id = f"{job['ArrayJobId']}_{job['ArrayTaskId']}" if "ArrayTaskId" in job else job["JobId"]
            ran = job["RunTime"] != "00:00:00"
            told[job_id] = Told(job["JobState"], job["ExitCode"], ran=ran)
    return told


def _controller(job_id: str) -> list[dict[str, str]] | None:
    """The controller's record of a job, or of every task of an array; None where it does not answer."""
    lines = _lines("scontrol", "-o", "show", "job", job_id)
    return lines and [dict(part.partition("=")[::2] for part in line.split()) for line in lines]


def _times(job_id: str) -> tuple[float, float]:
    """How long a job has run and how long it may run, in seconds. (Its EndTime also moves when it is preempted.)"""
    try:
        job = (_controller(job_id) or [{}])[0]
        return 60 * minutes(job["RunTime"]), 60 * minutes(job["TimeLimit"])
    except KeyError:
        return 0, float("inf")


def minutes(limit: str) -> float:
    """Of Slurm's times and limits: infinite, UNLIMITED, 30:00 (mm:ss), 4:00:00, 1-00:00:00."""
    if not limit[0].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    return int(days or 0) * 1440 + sum(part * 60**power for power, part in enumerate(reversed(parts))) / 60


def _lines(*command: str) -> list[str] | None:
    """A command's output; None where it does not exist, fails or hangs, which says nothing about any job."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode and "Invalid job id" not in result.stderr:  # which is an answer: it is forgotten
        return None
    return [line for line in result.stdout.splitlines() if line.strip()]
