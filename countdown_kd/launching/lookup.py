"""How far cells are, by the store, their folders and Slurm. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import DictConfig

from countdown_kd import tracking
from countdown_kd.config import identity
from countdown_kd.launching.folder import CONFIG, is_held, last_checkpoint, owner, step_of
from countdown_kd.launching.slurm.query import refresh
from countdown_kd.launching.states import ALIVE, State


class Stage(Enum):
    NEW = "new"
    ACTIVE = "active"  # running or queued
    INTERRUPTED = "interrupted"  # begun, and ended before its end
    FINISHED = "finished"


@dataclass
class Progress:
    """How far a cell is."""

    identity: str
    run: Run | None
    stage: Stage

    @property
    def folder(self) -> Path | None:
        """The folder that the cell goes on in: where its run lies, if that is here and still this run's."""
        folder = self.run and Path(self.run.data.tags.get(tracking.FOLDER_TAG, ""))
        if not folder or not (folder / CONFIG).exists():
            return None
        return folder if owner(folder).get("run_id") in (None, self.run.info.run_id) else None

    @property
    def step(self) -> int:
        """The optimizer step that the cell goes on from."""
        folder = self.folder if self.stage is Stage.INTERRUPTED else None
        return step_of(folder and last_checkpoint(folder, self.run.info.run_id))


def progress_of(client: MlflowClient, experiment_id: str, cells: Sequence[DictConfig]) -> list[Progress]:
    """Look composed cells up in the store; Slurm is asked once, about all jobs that seem to be alive.

    ``force=true``: a cell is new, whatever is there.
    """
    found = [_look_up(client, experiment_id, cfg) for cfg in cells]
    jobs = {cell.run.info.run_id: cell.run for cell in found if cell.stage is Stage.ACTIVE and _job(cell.run)}
    if jobs:
        refresh(client, list(jobs.values()))
        found = [_look_up(client, experiment_id, cfg) for cfg in cells]
    return found


def _look_up(client: MlflowClient, experiment_id: str, cfg: DictConfig) -> Progress:
    key = identity(cfg)
    run = None if cfg.force else tracking.find(client, experiment_id, key)
    if run is None:
        return Progress(key, None, Stage.NEW)
    return Progress(key, run, stage_of(run))


def stage_of(run: Run) -> Stage:
    state = tracking.state_of(run)
    if state is State.FINISHED:
        return Stage.FINISHED
    if _job(run) and state in ALIVE:  # refresh has asked Slurm
        return Stage.ACTIVE
    return Stage.ACTIVE if is_held(Path(run.data.tags.get(tracking.FOLDER_TAG, ""))) else Stage.INTERRUPTED


def _job(run: Run) -> str | None:
    return run.data.tags.get(tracking.JOB_TAG)
