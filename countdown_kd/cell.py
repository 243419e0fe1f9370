"""One cell, seen from the launcher: what it is known by, how far it has got, and the process that runs it.

A process of its own because two vLLM engines or two process groups do not fit one after the other in one process,
because peak memory is then this cell's, and because a cell that is killed leaves somebody to tell.
Imports no torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import DictConfig

from countdown_kd import tracking
from countdown_kd.config import ROOT, ConfigError, identity, plain, validate

log = logging.getLogger(__name__)

YamlDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # OmegaConf's own takes 20 ms a cell
PATIENCE_S = 60  # what a cell has after Ctrl-C to reach the end of a step and save a checkpoint
STOP_FILE = "stop"  # in the cell's folder: asks the run to save a checkpoint and stop
STOPPED_FILE = "stopped"  # the run's answer (torchrun passes on no exit code but 0 and 1)
MARKER = "countdown_kd.json"  # in a checkpoint, written last: it is whole
CODE = "COUNTDOWN_KD_CODE"  # environment: the snapshot of the code that a sweep's cells run


class CellFailed(RuntimeError):
    """The cell's process ended with an error; what it printed says which."""


@dataclass
class Cell:
    """One cell as it was submitted: nothing that is edited later changes it."""

    name: str
    folder: Path  # cell.yaml, run.log, checkpoints, student/
    run_id: str
    code: Path  # the snapshot of countdown_kd that runs
    nproc_per_node: int | str
    environment: dict[str, str]
    keep_checkpoints: bool

    @property
    def store(self) -> MlflowClient:
        """The store that MLFLOW_TRACKING_URI names: its address may hold a password, so it is in no file."""
        return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])

    @property
    def command(self) -> list[str]:
        run = ["-m", "countdown_kd.run", str(self.folder / "cell.yaml")]
        if self.nproc_per_node == 1:
            return [sys.executable, *run]
        return [
            # A free port of its own, so that jobs on one node do not collide. SIGTERM is ours to handle: torchrun
            # would end the ranks on it, in the middle of a step.
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--signals-to-handle", "SIGINT",
            "--nproc_per_node", str(self.nproc_per_node), *run,
        ]  # fmt: skip

    def start(self, ignore: Sequence[int] = ()) -> subprocess.Popen:
        """Start the cell's process, which ignores some signals. It dies with us, whatever we die of."""
        for file in (STOP_FILE, STOPPED_FILE):
            (self.folder / file).unlink(missing_ok=True)
        self.store.set_tag(self.run_id, tracking.STATE_TAG, "running")
        self.store.update_run(self.run_id, status="RUNNING")
        environment = os.environ | self.environment | {"MLFLOW_RUN_ID": self.run_id}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.code), environment.get("PYTHONPATH")]))
        environment["PYTHONSAFEPATH"] = "1"  # python -m would look in the current folder first: is it the checkout?
        libc = ctypes.CDLL(None)

        def in_child() -> None:
            die_with_parent(libc)
            for number in ignore:
                signal.signal(number, signal.SIG_IGN)

        return subprocess.Popen(
            self.command,
            env=environment,
            # A session of its own: Ctrl-C reaches us alone, and we decide what the cell and its ranks are sent.
            start_new_session=True,
            preexec_fn=in_child,
        )

    def ask_to_stop(self) -> None:
        """Have the run save a checkpoint at the end of its step and stop."""
        (self.folder / STOP_FILE).touch()

    @property
    def stopped(self) -> bool:
        """The run has stopped because it was asked to."""
        return (self.folder / STOPPED_FILE).exists()

    def end(self, code: int) -> str:
        """Close the MLflow run by the process's exit code. Returns what became of the cell, in a person's words."""
        if code == 0 and self.stopped:
            status, state = "KILLED", "stopped"
        elif code == 0:
            tracking.end_run(self.store, self.run_id, "FINISHED", "finished")
            if not self.keep_checkpoints:
                for checkpoint in self.folder.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
            return "finished"
        elif code > 0:
            status, state = "FAILED", f"failed (exit code {code})"
        else:
            status, state = "KILLED", f"killed by {signal.Signals(-code).name}"
        tracking.end_run(self.store, self.run_id, status, state)
        return state


def die_with_parent(libc: ctypes.CDLL) -> None:
    """Linux: be killed when the process that started this one ends. Nobody else would stop an orphan's training."""
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------------------
# How far a cell has got


@dataclass
class Standing:
    """How far a cell has got. ``what``: new, done, active (running or queued) or begun (ended before its end)."""

    identity: str
    run: Run | None
    what: str

    @property
    def folder(self) -> Path | None:
        """Where the cell's run lies, if that is here."""
        folder = self.run and Path(self.run.data.tags.get(tracking.FOLDER_TAG, ""))
        return folder if folder and (folder / "cell.yaml").exists() else None

    @property
    def step(self) -> int:
        """The optimizer step that the cell goes on from."""
        checkpoint = self.what == "begun" and self.folder and last_checkpoint(self.folder)
        return step_of(checkpoint or None)


def standing(client: MlflowClient, experiment_id: str, cfg: DictConfig) -> Standing:
    """Look a composed cell up in the store. ``force=true``: it is new, whatever is there."""
    key = identity(cfg)
    run = None if cfg.force else tracking.find(client, experiment_id, key)
    if run is None:
        return Standing(key, None, "new")
    if run.info.status == "FINISHED":
        return Standing(key, run, "done")
    found = Standing(key, run, "begun")
    if _job(run):
        if run.info.status in ("SCHEDULED", "RUNNING"):  # slurm.refresh has asked Slurm
            found.what = "active"
    elif found.folder and locked(found.folder):
        found.what = "active"
    return found


def _job(run: Run) -> str | None:
    return run.data.tags.get(tracking.JOB_TAG)


# By a composed config's id: what a sweep's start has just found, for the launcher, which gets the same objects.
_looked_up: dict[int, Standing] = {}


def standings(client: MlflowClient, experiment_id: str, cells: Sequence[DictConfig]) -> list[Standing]:
    """``standing`` of many cells, after asking Slurm once about all jobs that seem to be alive."""
    found = [_looked_up.pop(id(cfg), None) or standing(client, experiment_id, cfg) for cfg in cells]
    jobs = {cell.run.info.run_id: cell.run for cell in found if cell.what == "active" and _job(cell.run)}
    if jobs:
        from countdown_kd.slurm import refresh

        refresh(client, list(jobs.values()))
        found = [standing(client, experiment_id, cfg) for cfg in cells]
    return found


def look_up_once(cells: Sequence[DictConfig], found: Sequence[Standing]) -> None:
    """Spare the next call of ``standings`` the looking up; a second a hundred cells."""
    _looked_up.update((id(cfg), each) for cfg, each in zip(cells, found, strict=True))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a cell's folder; one that was being written when the run died has no marker."""
    whole = [marker.parent for marker in folder.glob(f"checkpoint-*/{MARKER}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step after which a checkpoint was saved; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold a cell's folder; yields False where another process holds it. The kernel lets go when we die."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        yield free


def locked(folder: Path) -> bool:
    """Whether a process holds the folder."""
    with lock(folder) as free:
        return not free


# ------------------------------------------------------------------------------------------------
# From a composed config to a cell that can run


def prepare(cfg: DictConfig, hydra: DictConfig, found: Standing) -> Cell:
    """Fix a composed cell: its folder, its config, its code and its MLflow run, new or the one it goes on in."""
    client, experiment_id = tracking.open_store(cfg.tracking)
    folder = found.folder or Path(hydra.runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = plain(cfg)
    resolved["trainer"]["output_dir"] = str(folder)
    (folder / "cell.yaml").write_text(yaml.dump(resolved, Dumper=YamlDumper, sort_keys=False))

    code = Path(os.environ.get(CODE) or snapshot(folder))
    commit = (code / "commit").read_text()
    # A run whose checkpoints are gone starts anew in a run of its own: its metrics are not mixed with the old ones.
    if found.folder:
        run_id = found.run.info.run_id
        if found.run.data.tags.get(tracking.CODE_TAG) != code.name:
            log.warning("%s goes on with other code than it was started with (now commit %s)", cell_name(hydra), commit)
            client.set_tag(run_id, "countdown_kd.resumed_with_code", f"{code.name} {commit}")
        client.set_tag(run_id, tracking.STATE_TAG, "pending")
        client.set_tag(run_id, tracking.TIMEOUTS_TAG, "0")
        if _job(found.run):
            client.delete_tag(run_id, tracking.JOB_TAG)  # that job is over
        if os.environ.get(tracking.SWEEP_RUN_ID):
            client.set_tag(run_id, tracking.PARENT_TAG, os.environ[tracking.SWEEP_RUN_ID])
        client.update_run(run_id, status="SCHEDULED")
    else:
        tags = {
            tracking.IDENTITY_TAG: found.identity,
            tracking.FOLDER_TAG: str(folder),
            tracking.CODE_TAG: code.name,
            tracking.STATE_TAG: "pending",
            "mlflow.source.git.commit": commit,
        }
        run_id = tracking.start_run(client, experiment_id, cell_name(hydra), "cell", cell_params(cfg, hydra), tags)
    os.environ["MLFLOW_TRACKING_URI"] = cfg.tracking.uri
    return Cell(
        name=cell_name(hydra),
        folder=folder,
        run_id=run_id,
        code=code,
        nproc_per_node=cfg.dist.nproc_per_node,
        environment={key: str(value) for key, value in hydra.job.env_set.items()},
        keep_checkpoints=cfg.trainer.get("save_total_limit") is None,
    )


def snapshot(folder: Path) -> Path:
    """Copy the package's code, its commit and what is not committed below ``folder``; what runs is the copy.

    Named by a hash of the code, so the same code is copied once.
    """
    files = sorted((ROOT / "countdown_kd").rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    code = folder / ".code" / digest.hexdigest()[:12]
    if not code.exists():
        making = code.with_name(f"{code.name}.{os.getpid()}")
        for file in files:
            copy = making / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        (making / "commit").write_text(tracking.git("rev-parse", "HEAD"))
        (making / "code.diff").write_text(tracking.git("diff", "HEAD"))
        making.rename(code)
    return code


def cell_name(hydra: DictConfig) -> str:
    """What tells the cell from its neighbours: hydra.job.name where it was set, or the overrides as they were typed."""
    if hydra.job.name != "launch":
        return hydra.job.name
    return hydra.job.override_dirname or "default"


def cell_params(cfg: DictConfig, hydra: DictConfig) -> dict[str, str]:
    """Short MLflow params: the choice in each group, the seed, and every other key that was set by hand."""
    groups = ("task", "model", "teacher", "precision", "gen", "dist", "eval")
    params = {group: hydra.runtime.choices[group] for group in groups}
    params["seed"] = str(cfg.seed)
    for override in hydra.overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in ("sweeps", "force", "plan") and not key.startswith("tracking."):
            params.setdefault(key, value)
    return params


# ------------------------------------------------------------------------------------------------
# Running it here


def run_cell(cfg: DictConfig) -> float:
    """Run the composed cell here, unless it is done, and return its held-out accuracy.

    Raises CellFailed if its process fails, and KeyboardInterrupt after closing the run as KILLED. A config that
    cannot work ends the program with a message and exit code 2.
    """
    hydra = HydraConfig.get()
    try:
        validate(cfg)
    except ConfigError as error:
        problems = "\n  ".join(str(error).splitlines())
        print(f"\nThis cell cannot run:\n  {problems}", file=sys.stderr)
        raise SystemExit(2) from None
    client, experiment_id = tracking.open_store(cfg.tracking)
    (found,) = standings(client, experiment_id, [cfg])
    if found.what == "active":
        raise CellFailed(f"{cell_name(hydra)} is running already, in {found.folder or 'another folder'}")
    if found.what == "done":
        run_id = found.run.info.run_id
        log.info("done before, in %s; force=true runs it again", found.run.data.tags[tracking.FOLDER_TAG])
    else:
        cell = prepare(cfg, hydra, found)
        run_id = cell.run_id
        supervise(cell, found.step)

    if not os.environ.get(tracking.SWEEP_RUN_ID):
        from countdown_kd.summary import show

        show(client, [client.get_run(run_id)], cfg.tracking.uri, Path(hydra.runtime.output_dir))
    return client.get_run(run_id).data.metrics["eval/accuracy"]


def supervise(cell: Cell, step: int) -> None:
    """Run a cell's process to its end and close its MLflow run as what it was.

    Ctrl-C and SIGTERM let it save a checkpoint first (PATIENCE_S at most; a second one ends it at once).
    """
    if step:
        log.info("going on from step %d", step)
    log.info("starting a process for the cell; importing torch, TRL and vLLM takes it a while")
    with lock(cell.folder) as free:
        if not free:
            raise CellFailed(f"{cell.name} is running already, in {cell.folder}")
        code = -signal.SIGKILL
        try:
            with _terminate_as_interrupt(), cell.start() as process:
                try:
                    code = process.wait()
                except KeyboardInterrupt:
                    code = _stop(cell, process)
                    raise
        finally:
            state = cell.end(code)
    if state != "finished":
        raise CellFailed(f"cell {cell.name}: {state}; see {cell.folder / 'run.log'}")


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM, which would end us on the spot, like Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(cell: Cell, process: subprocess.Popen) -> int:
    log.info("stopping the cell at the end of its step, with a checkpoint (%d s at most)", PATIENCE_S)
    cell.ask_to_stop()
    try:
        process.wait(PATIENCE_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
