"""One cell: from a composed config to a process that runs it, and what became of that.

A process of its own because two vLLM engines or two process groups do not fit one after the other in one process,
because peak memory is then this cell's, and because a cell that is killed leaves somebody to tell. Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from mlflow import MlflowClient
from omegaconf import DictConfig

from countdown_kd import tracking
from countdown_kd.config import ROOT, name_of, plain
from countdown_kd.launching.folder import (
    CONFIG,
    STOP_FILE,
    STOPPED_FILE,
    TIMEOUTS_FILE,
    claim,
    discard_unusable,
)
from countdown_kd.launching.lock import Lock
from countdown_kd.launching.lookup import Progress
from countdown_kd.launching.states import State

log = logging.getLogger(__name__)

YamlDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # OmegaConf's own takes 20 ms a cell
CODE = "COUNTDOWN_KD_CODE"  # environment: the snapshot of the code that a sweep's cells run


class CellFailed(RuntimeError):
    """The cell's process ended with an error; what it printed says which."""


@dataclass
class Cell:
    """One cell as it was submitted: nothing that is edited later changes it."""

    name: str
    identity: str
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
        run = ["-m", "countdown_kd.run", str(self.folder / CONFIG)]
        if self.nproc_per_node == 1:
            return [sys.executable, *run]
        return [
            # A free port of its own, so that jobs on one node do not collide. SIGTERM is ours to handle: torchrun
            # would end the ranks on it, in the middle of a step.
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--signals-to-handle", "SIGINT",
            "--nproc_per_node", str(self.nproc_per_node), *run,
        ]  # fmt: skip

    def claim(self) -> Lock:
        """Take the folder, to run here; raises FolderTaken where another process, or another run, has it."""
        return claim(self.folder, self.identity, self.name, self.run_id)

    def start(self, ignore: Sequence[int] = ()) -> subprocess.Popen:
        """Start the cell's process, which ignores some signals. It dies with us, whatever we die of.

        The folder must be claimed.
        """
        for file in (STOP_FILE, STOPPED_FILE):
            (self.folder / file).unlink(missing_ok=True)
        discard_unusable(self.folder, self.run_id)
        tracking.set_state(self.store, self.run_id, State.RUNNING)
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

    def end(self, code: int) -> tuple[State, str]:
        """Close the MLflow run by the process's exit code. Returns what became of the cell: its state, and details."""
        if code == 0:
            state, details = (State.STOPPED if self.stopped else State.FINISHED), ""
        elif code > 0:
            state, details = State.FAILED, f"exit code {code}"
        else:
            state, details = State.KILLED, signal.Signals(-code).name
        tracking.set_state(self.store, self.run_id, state, details)
        if state is State.FINISHED and not self.keep_checkpoints:
            for checkpoint in self.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return state, details


def die_with_parent(libc: ctypes.CDLL) -> None:
    """Linux: be killed when the process that started this one ends. Nobody else would stop an orphan's training."""
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------------------
# From a composed config to a cell that can run


def open_cell(cfg: DictConfig, hydra: DictConfig, progress: Progress) -> tuple[Cell, Lock]:
    """Fix a composed cell: its folder, its config, its code and its MLflow run, new or the one it goes on in.

    Call it while ``tracking.launching`` is held. The folder is claimed, and the caller's to release. Raises FolderTaken
    where it is another cell's.
    """
    client, experiment_id = tracking.open_store(cfg.tracking)
    name = cell_name(hydra)
    folder = progress.folder or Path(hydra.runtime.output_dir)
    # A run whose folder is gone starts anew in a run of its own: its metrics are not mixed with the old ones.
    run_id = progress.run.info.run_id if progress.folder else ""
    lock = claim(folder, progress.identity, name, run_id)
    try:
        (folder / TIMEOUTS_FILE).unlink(missing_ok=True)
        code = Path(os.environ.get(CODE) or snapshot(folder))
        commit = (code / "commit").read_text()
        if run_id:
            _reopen(client, progress, name, code, commit)
        else:
            tags = {
                tracking.IDENTITY_TAG: progress.identity,
                tracking.FOLDER_TAG: str(folder),
                tracking.CODE_TAG: code.name,
                "mlflow.source.git.commit": commit,
            }
            run_id = tracking.start_run(client, experiment_id, name, "cell", cell_params(cfg, hydra), tags)
            lock.note = lock.note | {"run_id": run_id}
        resolved = plain(cfg)
        resolved["trainer"]["output_dir"] = str(folder)
        (folder / CONFIG).write_text(yaml.dump(resolved, Dumper=YamlDumper, sort_keys=False))
    except BaseException:
        lock.release()
        raise
    os.environ["MLFLOW_TRACKING_URI"] = cfg.tracking.uri
    cell = Cell(
        name=name,
        identity=progress.identity,
        folder=folder,
        run_id=run_id,
        code=code,
        nproc_per_node=cfg.dist.nproc_per_node,
        environment={key: str(value) for key, value in hydra.job.env_set.items()},
        keep_checkpoints=cfg.trainer.get("save_total_limit") is None,
    )
    return cell, lock


def _reopen(client: MlflowClient, progress: Progress, name: str, code: Path, commit: str) -> None:
    """Make the run of an interrupted cell wait once more."""
    run_id, tags = progress.run.info.run_id, progress.run.data.tags
    if tags.get(tracking.CODE_TAG) != code.name:
        log.warning("%s goes on with other code than it was started with (now commit %s)", name, commit)
        client.set_tag(run_id, "countdown_kd.resumed_with_code", f"{code.name} {commit}")
    if tracking.JOB_TAG in tags:
        client.delete_tag(run_id, tracking.JOB_TAG)  # that job is over
    if os.environ.get(tracking.SWEEP_RUN_ID):
        client.set_tag(run_id, tracking.PARENT_TAG, os.environ[tracking.SWEEP_RUN_ID])
    tracking.set_state(client, run_id, State.PENDING)


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
    """What tells the cell from its neighbours: hydra.job.name where it was set, or what was swept or typed."""
    return name_of(hydra.job.name if hydra.job.name != "launch" else hydra.job.override_dirname) or "default"


def cell_params(cfg: DictConfig, hydra: DictConfig) -> dict[str, str]:
    """Short MLflow params: what was typed, in that order, then the other groups' choices and the seed."""
    params = {}
    for override in hydra.overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in ("sweeps", "force", "plan") and not key.startswith("tracking."):
            params[key] = value
    for group in ("task", "model", "teacher", "precision", "gen", "dist", "eval"):
        params[group] = hydra.runtime.choices[group]
    return params | {"seed": str(cfg.seed)}
