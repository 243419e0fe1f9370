"""The cells of a sweep as Slurm jobs: submitting them, following them, leaving them. Imports no torch."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from mlflow import MlflowClient
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from countdown_kd import tracking
from countdown_kd.config import validate
from countdown_kd.launching.cell import Cell, open_cell
from countdown_kd.launching.folder import FolderTaken
from countdown_kd.launching.lookup import Stage, progress_of
from countdown_kd.launching.slurm.job import Job
from countdown_kd.launching.slurm.query import arrays_of, environment, jobs_of, lines_of
from countdown_kd.launching.states import ALIVE, State
from countdown_kd.launching.status import follow, look

log = logging.getLogger(__name__)


def launch(
    loader: ConfigLoader,
    config: DictConfig,
    params: dict[str, Any],
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[JobReturn]:
    """Submit the cells that are not done as a job array, follow them to their end, and return what became of each.

    Ctrl-C leaves the jobs running and raises SystemExit; a second one within five seconds cancels them.
    """
    if missing := [program for program in ("sbatch", "srun") if not shutil.which(program)]:
        absent = f"there is no {' and no '.join(missing)} here"
        print(f"hydra/launcher=slurm: {absent}. Call it on a login node of the cluster", file=sys.stderr)
        raise SystemExit(2)
    one_task(params)
    if "%" in params["submitit_folder"]:
        print(
            f"hydra.sweep.dir={config.hydra.sweep.dir}: Slurm expands a % in the path of a log. Give another folder",
            file=sys.stderr,
        )
        raise SystemExit(2)
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
    # Until the jobs are submitted and their ids are in the store: nobody else may take the cells for new meanwhile.
    with tracking.launching(config.tracking.uri):
        run_ids = open_and_submit(client, experiment_id, params, composed, initial_job_idx)
    try:
        follow_to_end(client, list(dict.fromkeys(run_ids)))
    except KeyboardInterrupt:
        leave_or_cancel(client, list(dict.fromkeys(run_ids)))

    returns = []
    for overrides, run_id in zip(job_overrides, run_ids, strict=True):
        run = client.get_run(run_id)
        done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        done.return_value = run.data.metrics.get("eval/accuracy")
        if tracking.state_of(run) is not State.FINISHED:
            done.return_value = math.nan  # the table tells what became of it
        returns.append(done)
    return returns


def open_and_submit(
    client: MlflowClient, experiment_id: str, params: dict[str, Any], composed: Sequence[DictConfig], first_number: int
) -> list[str]:
    """Open a run for each cell that is neither done nor under way, and submit these; returns every cell's run id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    run_ids: dict[str, str] = {}  # by identity: a cell that is asked for twice runs once
    cells: list[Cell] = []
    progress = progress_of(client, experiment_id, composed)
    under_way = [each.run for each in progress if each.stage in (Stage.FINISHED, Stage.ACTIVE)]
    tracking.share(client, os.environ[tracking.SWEEP_RUN_ID], under_way)
    try:
        with interrupts_between_cells() as interrupted:
            for number, (cfg, each) in enumerate(zip(composed, progress, strict=True), first_number):
                if interrupted:
                    raise KeyboardInterrupt
                if each.stage in (Stage.FINISHED, Stage.ACTIVE):
                    run_ids[each.identity] = each.run.info.run_id
                if each.identity in run_ids:
                    continue
                with read_write(cfg.hydra), read_write(cfg.hydra.runtime), open_dict(cfg.hydra):
                    cfg.hydra.job.num = number
                    cfg.hydra.job.id = str(number)
                    folder = os.path.join(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
                    cfg.hydra.runtime.output_dir = os.path.abspath(folder)
                HydraConfig.instance().cfg = cfg  # for ${hydra:…} in a config
                cell, lock = open_cell(cfg, cfg.hydra, each)
                lock.release()  # for its job to take
                cells.append(cell)
                run_ids[each.identity] = cell.run_id
            # An interrupt would end sbatch too, and leave jobs that nobody knows of.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if interrupted:
                raise KeyboardInterrupt
            for cell, job_id in submit(params, cells):
                client.set_tag(cell.run_id, tracking.JOB_TAG, job_id)
    except BaseException as error:
        for cell in cells:
            if tracking.JOB_TAG not in client.get_run(cell.run_id).data.tags:
                tracking.set_state(client, cell.run_id, State.NEVER_STARTED)
        if isinstance(error, FolderTaken):
            print(f"\nNothing was started: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if not isinstance(error, (FailedJobError, FailedSubmissionError)):
            raise
        print(
            f"\nSlurm did not take the cells: {error}\n"
            "Keys hydra.launcher.* are its options; python -m countdown_kd doctor hydra/launcher=slurm looks at them",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    return [run_ids[each.identity] for each in progress]


@contextmanager
def interrupts_between_cells() -> Iterator[list[int]]:
    """Ctrl-C is only noted, in the list: in the middle of what MLflow writes it would leave the store locked."""
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


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


def follow_to_end(client: MlflowClient, run_ids: Sequence[str]) -> None:
    """Follow the cells until Slurm has let go of their jobs: a cell's own last word may not be the job's."""
    while True:
        follow(client, run_ids)
        wait_to_leave(jobs_of(client.get_run(run_id) for run_id in run_ids))
        runs, _ = look(client, run_ids)
        if not any(tracking.state_of(run) in ALIVE for run in runs):
            return


def wait_to_leave(jobs: Sequence[str], patience_s: float = 60) -> None:
    """Cells close their runs a moment before Slurm closes their jobs: wait, so that both say the same."""
    deadline = time.time() + patience_s
    while jobs and time.time() < deadline and lines_of("squeue", "-h", "-j", ",".join(arrays_of(jobs))):
        time.sleep(1)


def leave_or_cancel(client: MlflowClient, run_ids: Sequence[str]) -> None:
    """After Ctrl-C: leave (SystemExit), or cancel where there is another within five seconds."""
    runs = [client.get_run(run_id) for run_id in run_ids]
    jobs = jobs_of(run for run in runs if tracking.state_of(run) in ALIVE)
    print("\nThe jobs go on. Ctrl-C again within 5 seconds cancels them.", flush=True)
    try:
        time.sleep(5)
    except KeyboardInterrupt:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        follow_to_end(client, run_ids)
    else:
        print(f"Look at them with: {sys.executable} -m countdown_kd status")
        if jobs:
            print("Cancel them with:  scancel", *arrays_of(jobs))
        raise SystemExit(130) from None


def submit(params: dict[str, Any], cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
    """Submit a job array, or several where the cluster takes none that large; yields cells with ids such as 123_0."""
    folder = Path(params["submitit_folder"]).absolute()
    largest = largest_array()
    arrays = [cells[first : first + largest] for first in range(0, len(cells), largest)]
    if parallelism := params.get("array_parallelism"):  # of all cells, however many arrays they take
        params = params | {"array_parallelism": max(1, parallelism // max(1, len(arrays)))}
    ids = []
    for array in arrays:
        jobs = [Job(cell, params["signal_delay_s"], params["max_num_timeout"]) for cell in array]
        with mock.patch.dict(os.environ, environment(), clear=True):
            submitted = executor(params, folder, cells[0].code).map_array(Job.run, jobs)
        for cell, job in zip(array, submitted, strict=True):
            link = cell.folder / "slurm.log"
            link.unlink(missing_ok=True)
            link.symlink_to(folder / f"{job.job_id}_0_log.out")
            ids.append(job.job_id)
            yield cell, job.job_id
    if ids:
        print(f"submitted {len(ids)} cells as Slurm job {' '.join(arrays_of(ids))}", flush=True)


def largest_array() -> int:
    """How many jobs the cluster takes as one array: its MaxArraySize is the first index that it refuses."""
    for line in lines_of("scontrol", "show", "config") or ():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdigit():
            return max(1, int(value))
    return 1001  # Slurm's own default


# Python takes seconds to reach the handlers of Job.run, and a signal before that would kill it: USR2 for good. So they
# are blocked, to be heard there; or lost, where env is too old for that (coreutils 8.30) and Slurm has to say it twice.
BLOCK_SIGNALS = (
    'trap "" USR2 TERM; block="env --block-signal=USR2,TERM"; $block true 2>/dev/null || block=; exec $block "$@"'
)


def executor(params: dict[str, Any], folder: Path, code: Path | str):
    """Submitit's executor with hydra-submitit-launcher's parameters; jobs import the package from ``code``."""
    import submitit

    ours = {"submitit_folder", "max_num_timeout", "_target_"}
    base = {each.name for each in dataclasses.fields(BaseQueueConf)}
    given = {key: value for key, value in params.items() if key not in ours and value is not None}
    path = f'export PYTHONSAFEPATH=1 PYTHONPATH="{code}"${{PYTHONPATH:+:$PYTHONPATH}}'  # not the current folder first
    given["setup"] = [*given.get("setup", []), path]
    python = f"sh -c {shlex.quote(BLOCK_SIGNALS)} sh {shlex.quote(sys.executable)}"
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
