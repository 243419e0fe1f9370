"""What happens inside a Slurm job: a cell's process, and a checkpoint before Slurm ends it. Imports no torch.

What a job is given is fixed: a pickled Cell, its resolved config and a snapshot of the code.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn
from unittest import mock

from countdown_kd import tracking
from countdown_kd.launching.cell import Cell
from countdown_kd.launching.folder import TIMEOUTS_FILE, FolderTaken
from countdown_kd.launching.slurm.query import times
from countdown_kd.launching.states import REQUEUES_AS, State, describe

log = logging.getLogger(__name__)


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
        try:
            lock = self.cell.claim()
        except FolderTaken as error:
            sys.exit(str(error))
        try:
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
            log.info("%s: %s", self.cell.name, describe(*self.cell.end(code)))
        finally:
            lock.release()
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

        Slurm's word for the end counts (query.state_by), so the run stays open until there is one. Slurm comes first,
        the store second: a store that is away must not keep a job from going on.
        """
        ran_s, limit_s = times(job_id)
        out_of_time = limit_s - ran_s < self.signal_delay_s + 60  # Slurm may be a minute early
        state, details = (State.TIMING_OUT if out_of_time else State.PREEMPTING), ""
        timeouts = self.count_timeouts(out_of_time)
        if signal.SIGUSR2 not in self.received:
            state = State.STOPPING
        elif not out_of_time or timeouts <= self.max_num_timeout:
            done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
            if done.returncode:
                why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
                details = f"Slurm does not queue it again: {why}"
                log.error("%s", details)
            else:
                state = REQUEUES_AS[state]
                log.info("%s from its checkpoint", state)
        try:
            tracking.set_state(self.cell.store, self.cell.run_id, state, details)
        except Exception as error:
            log.warning("the store does not know it yet: %s", error)
        # The end is left to Slurm, so that it calls it what it was: TIMEOUT, CANCELLED, PREEMPTED.
        time.sleep(max(600, limit_s - ran_s + 300 if out_of_time else 0))
        sys.exit(128 + signal.SIGTERM)  # it did not: no job that stopped halfway is COMPLETED

    def count_timeouts(self, out_of_time: bool) -> int:
        """How often the cell has hit the limit, this time counted."""
        file = self.cell.folder / TIMEOUTS_FILE
        timeouts = (int(file.read_text()) if file.exists() else 0) + out_of_time
        file.write_text(str(timeouts))
        return timeouts

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
