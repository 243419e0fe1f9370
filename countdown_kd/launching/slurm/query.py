"""What Slurm says of jobs: asked of its programs, and turned into a cell's state. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Run

from countdown_kd import tracking
from countdown_kd.launching.states import BEGUN, ENDED, ENDS_AS, REQUEUES_AS, State

# Slurm's words (man squeue, JOB STATE CODES), each mapped once.
QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"}
ENDED_AS = {
    "TIMEOUT": State.TIMED_OUT,
    "DEADLINE": State.TIMED_OUT,
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
    "PREEMPTED": State.PREEMPTED,
    "NODE_FAIL": State.NODE_FAILED,
    "BOOT_FAIL": State.NODE_FAILED,
    "CANCELLED": State.CANCELLED,
}  # COMPLETED and FAILED: the exit code says more
NOBODY = "nobody"  # instead of a program's name: Slurm is not here, or its daemons do not answer


@dataclass
class JobRecord:
    """What Slurm has on a job."""

    state: str  # Slurm's word, such as OUT_OF_MEMORY
    exit_code: str = ""  # CODE:SIGNAL
    reason: str = ""  # why it waits
    ran: bool = True


def refresh(client: MlflowClient, runs: Sequence[Run]) -> str:
    """Bring runs that are not FINISHED up to date with what Slurm says. Returns the program that it goes by.

    A job that could not close its run itself, because it was killed, timed out or cancelled, is closed here.
    """
    jobs = {run.data.tags[tracking.JOB_TAG]: run for run in runs if run.info.status != "FINISHED"}
    records, source = ask(list(jobs))
    for job_id, run in jobs.items():
        if job_id not in records:
            continue  # no answer: what was known last
        before = tracking.state_of(run), run.data.tags.get(tracking.DETAILS_TAG, "")
        after = state_by(records[job_id], *before)
        if after == before:
            continue
        if tracking.state_of(client.get_run(run.info.run_id)) != before[0]:
            continue  # its job has just said more than Slurm could
        tracking.set_state(client, run.info.run_id, *after)
    return source


def state_by(record: JobRecord | None, known: State, details: str = "") -> tuple[State, str]:
    """A cell's state and details, by what Slurm has on its job (None: nothing) and what the job itself said last."""
    as_known = known, details
    stopping = known in ENDS_AS  # its process has stopped, its job waits to be ended
    ends_as = ENDS_AS.get(known, known), details
    if record is None:  # neither in the queue nor in any memory of Slurm's
        return ends_as if stopping or known in ENDED else (State.LOST, "Slurm does not know its job any more")
    if record.state in QUEUED:
        if stopping:
            return REQUEUES_AS[known], ""
        # Also a job that an administrator has queued again.
        return as_known if known in REQUEUES_AS.values() else (State.PENDING, record.reason)
    if record.state in RUNNING:
        # Between a cell's end and its job's, the job's own word counts.
        return (State.STARTING, "") if known is State.PENDING else as_known
    if record.state == "CANCELLED" and not record.ran and known not in BEGUN:
        return State.NEVER_STARTED, ""
    if record.state in ENDED_AS:
        ended = ENDED_AS[record.state]
        return ends_as if stopping and ends_as[0] == ended else (ended, "")
    if stopping or (known in ENDED and known is not State.NEVER_STARTED):
        return ends_as
    begun = known in BEGUN
    code, number = (int(part or 0) for part in (record.exit_code or "0:0").split(":"))
    # A job of ours that was not killed ends with 1 or 2. srun makes 128 + N of signal N, and sacct N of that. Before
    # the cell has begun, a small number is an exit code of a setup line.
    number = number or (code - 128 if code > 128 else code if 2 < code <= 64 and begun else 0)
    if number in set(signal.Signals):
        return State.KILLED, signal.Signals(number).name
    shown = f"exit code {record.exit_code.removesuffix(':0')}"
    return (State.FAILED if begun else State.FAILED_TO_START), shown


def ask(jobs: Sequence[str]) -> tuple[dict[str, JobRecord | None], str]:
    """What Slurm has on the jobs, and which of its programs says so, or NOBODY. None: a job that it does not know;
    one of which nobody says anything, not even that, is left out.

    The queue knows what waits and runs; the accounting what has ended, or, on a cluster without one, for some minutes
    the controller.
    """
    records: dict[str, JobRecord | None] = {}
    if not jobs:
        return records, ""
    ids = ",".join(arrays_of(jobs))
    queue = lines_of("squeue", "-h", "-r", "-j", ids, "-o", "%i|%T|%r")
    for line in queue or ():
        job_id, state, reason = line.split("|")
        records[job_id] = JobRecord(state, reason="" if reason == "None" else reason)
    if all(job in records for job in jobs):
        return records, "squeue"
    ended = _accounted(ids)
    source = "scontrol" if ended is None else "sacct"
    records = (ended or {}) | records
    if any(job not in records for job in jobs):
        # Accounting that has just come back knows nothing yet.
        controlled = _controlled(jobs)
        records = (controlled or {}) | records
        if queue is not None and controlled is not None:
            records = dict.fromkeys(jobs) | records
    return records, source if all(job in records for job in jobs) else NOBODY


def _accounted(ids: str) -> dict[str, JobRecord] | None:
    from submitit.slurm.slurm import SlurmInfoWatcher

    lines = lines_of("sacct", "-X", "-P", "-j", ids, "-o", "JobID,State,ExitCode,Start")
    if lines is None:
        return None
    rows = SlurmInfoWatcher(delay_s=1).read_info("\n".join(lines)) if lines else {}
    return {
        job: JobRecord(row["State"].split()[0], row["ExitCode"], ran=row["Start"] not in ("Unknown", "None", ""))
        for job, row in rows.items()
    }


def _controlled(jobs: Sequence[str]) -> dict[str, JobRecord] | None:
    records = {}
    for array in arrays_of(jobs):
        tasks = _controller(array)
        if tasks is None:
            return None
        for task in tasks:
            job_id = f"{task['ArrayJobId']}_{task['ArrayTaskId']}" if "ArrayTaskId" in task else task["JobId"]
            records[job_id] = JobRecord(task["JobState"], task["ExitCode"], ran=task["RunTime"] != "00:00:00")
    return records


def _controller(job_id: str) -> list[dict[str, str]] | None:
    """The controller's record of a job, or of every task of an array; None where it does not answer."""
    lines = lines_of("scontrol", "-o", "show", "job", job_id)
    return lines and [dict(part.partition("=")[::2] for part in line.split()) for line in lines]


def times(job_id: str) -> tuple[float, float]:
    """How long a job has run and how long it may run, in seconds. (Its EndTime also moves when it is preempted.)"""
    try:
        job = (_controller(job_id) or [{}])[0]
        return 60 * minutes(job["RunTime"]), 60 * minutes(job["TimeLimit"])
    except KeyError:
        return 0, float("inf")


def jobs_of(runs: Iterable[Run]) -> list[str]:
    """The ids of the runs' jobs; a cell that runs without Slurm has none."""
    return [run.data.tags[tracking.JOB_TAG] for run in runs if tracking.JOB_TAG in run.data.tags]


def arrays_of(jobs: Sequence[str]) -> list[str]:
    """The ids of the arrays that the jobs belong to: of 123_0 and 123_1 the one id 123."""
    return list(dict.fromkeys(job.split("_")[0] for job in jobs))


def minutes(limit: str) -> float:
    """Of Slurm's times and limits: infinite, UNLIMITED, 30:00 (mm:ss), 4:00:00, 1-00:00:00."""
    if not limit[0].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    return int(days or 0) * 1440 + sum(part * 60**power for power, part in enumerate(reversed(parts))) / 60


def environment() -> dict[str, str]:
    """What Slurm's programs are started with: from inside a job or an allocation its SLURM_* would be theirs too.

    A new job would get the memory of another, or take itself for a task of another array.
    """
    keep = {"SLURM_CONF", "SLURM_CLUSTERS"}  # which cluster is asked
    return {
        name: value
        for name, value in os.environ.items()
        if name in keep or not name.startswith(("SLURM_", "SLURMD_", "SBATCH_ARRAY", "SBATCH_MEM", "SRUN_"))
    }


def lines_of(*command: str) -> list[str] | None:
    """A command's output; None where it does not exist, fails or hangs, which says nothing about any job."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode and "Invalid job id" not in result.stderr:  # which is an answer: it is forgotten
        return None
    return [line for line in result.stdout.splitlines() if line.strip()]
