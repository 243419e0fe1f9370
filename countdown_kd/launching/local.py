"""A cell that runs here, in a process of its own that this one watches. Imports no torch."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from mlflow import MlflowClient
from omegaconf import DictConfig

from countdown_kd import tracking
from countdown_kd.config import ConfigError, validate
from countdown_kd.launching.cell import Cell, CellFailed, cell_name, open_cell
from countdown_kd.launching.folder import FolderTaken
from countdown_kd.launching.lookup import Stage, progress_of
from countdown_kd.launching.states import State, describe
from countdown_kd.summary import cause_in, show

log = logging.getLogger(__name__)

PATIENCE_S = 60  # what a cell has after Ctrl-C to reach the end of a step and save a checkpoint


def run_cell(cfg: DictConfig) -> float:
    """Run the composed cell here, unless it is done, and return its held-out accuracy; NaN where a sweep's cell failed.

    A single cell that fails ends the program with its cause and exit code 1; a config that cannot work, or a folder
    that is another cell's, with exit code 2. Raises KeyboardInterrupt after closing the run as STOPPED.
    """
    hydra = HydraConfig.get()
    try:
        validate(cfg)
    except ConfigError as error:
        _refuse(str(error))
    client, experiment_id = tracking.open_store(cfg.tracking)
    try:
        run_id = _run(cfg, hydra, client, experiment_id)
    except CellFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        if os.environ.get(tracking.SWEEP_RUN_ID):
            return math.nan
        raise SystemExit(1) from None
    run = client.get_run(run_id)
    if not os.environ.get(tracking.SWEEP_RUN_ID):
        show(client, [run], cfg.tracking.uri, Path(hydra.runtime.output_dir))
    return run.data.metrics["eval/accuracy"]


def _run(cfg: DictConfig, hydra: DictConfig, client: MlflowClient, experiment_id: str) -> str:
    """The id of the cell's finished run: one from before, or one that runs now."""
    with tracking.launching(cfg.tracking.uri):
        (progress,) = progress_of(client, experiment_id, [cfg])
        if progress.stage is Stage.ACTIVE:
            where = progress.run.data.tags.get(tracking.FOLDER_TAG)
            raise CellFailed(f"{cell_name(hydra)} is running already, in {where} (run {progress.run.info.run_id[:8]})")
        if progress.stage is Stage.FINISHED:
            log.info("done before, in %s; force=true runs it again", progress.run.data.tags[tracking.FOLDER_TAG])
            if sweep := os.environ.get(tracking.SWEEP_RUN_ID):
                tracking.share(client, sweep, [progress.run])
            return progress.run.info.run_id
        step = progress.step
        try:
            cell, lock = open_cell(cfg, hydra, progress)
        except FolderTaken as error:
            _refuse(str(error))
    if step:
        log.info("going on from step %d", step)
    try:
        supervise(cell)
    finally:
        lock.release()
    return cell.run_id


def _refuse(problems: str) -> NoReturn:
    lines = "\n  ".join(problems.splitlines())
    print(f"\nThis cell cannot run:\n  {lines}", file=sys.stderr)
    raise SystemExit(2) from None


def supervise(cell: Cell) -> None:
    """Run a claimed cell's process to its end and close its MLflow run as what it was.

    Ctrl-C and SIGTERM let it save a checkpoint first (PATIENCE_S at most; a second one ends it at once).
    """
    log.info("starting a process for the cell; importing torch, TRL and vLLM takes it a while")
    code = -signal.SIGKILL
    try:
        with _terminate_as_interrupt(), cell.start() as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                code = _stop(cell, process)
                raise
    finally:
        state, details = cell.end(code)
    if state is not State.FINISHED:
        log_file = cell.folder / "run.log"
        told = f": {cause}" if (cause := cause_in(log_file)) and state is State.FAILED else ""
        raise CellFailed(f"{cell.name}: {describe(state, details)}{told}\n  {log_file}")


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
