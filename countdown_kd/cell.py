"""One cell, seen from the launcher: check it, open its MLflow run, run it in a process of its own, close the run.

A process of its own because two vLLM engines or two process groups do not fit one after the other in one process,
because peak memory is then this cell's, and because a cell that is killed leaves somebody to tell.
Imports no torch.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from countdown_kd.config import ROOT, ConfigError, validate

log = logging.getLogger(__name__)

PATIENCE_S = 20  # what a cell's process has to end after Ctrl-C before it is killed


class CellFailed(RuntimeError):
    """The cell's process ended with an error; what it printed says which."""


def run_cell(cfg: DictConfig) -> float:
    """Run the composed cell and return its held-out accuracy.

    Raises CellFailed if its process fails, and KeyboardInterrupt after closing the run as KILLED. A config that
    cannot work ends the program with a message and exit code 2.
    """
    try:
        validate(cfg)
    except ConfigError as error:
        problems = "\n  ".join(str(error).splitlines())
        print(f"\nThis cell cannot run:\n  {problems}", file=sys.stderr)
        raise SystemExit(2) from None

    from countdown_kd import tracking

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    config_file = folder / "cell.yaml"
    resolved = OmegaConf.to_container(cfg, resolve=True)
    del resolved["tracking"]  # the store's address may hold a password; the cell gets it in its environment
    OmegaConf.save(OmegaConf.create(resolved), config_file)

    client, experiment_id = tracking.open_store(cfg.tracking)
    run_id = tracking.start_run(client, experiment_id, cell_name(hydra), cell_params(cfg, hydra), kind="cell")
    environment = os.environ | {
        "MLFLOW_RUN_ID": run_id,
        "MLFLOW_TRACKING_URI": cfg.tracking.uri,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    log.info("starting a process for the cell; importing torch, TRL and vLLM takes it a while")
    status = "KILLED"
    try:
        # A session of its own: Ctrl-C reaches us alone, and we decide what the cell and its ranks are sent.
        with (
            _terminate_as_interrupt(),
            subprocess.Popen(_command(cfg, config_file), env=environment, start_new_session=True) as process,
        ):
            try:
                code = process.wait()
            except KeyboardInterrupt:
                _stop(process)
                raise
        status = "FINISHED" if code == 0 else "FAILED" if code > 0 else "KILLED"
    finally:
        client.set_terminated(run_id, status)
    if code != 0:
        how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        raise CellFailed(f"cell {cell_name(hydra)}: {how}; see {folder / 'run.log'}")

    if not os.environ.get(tracking.SWEEP_RUN_ID):
        from countdown_kd.compare import show

        show(client, [client.get_run(run_id)], cfg.tracking.uri, folder)
    return client.get_run(run_id).data.metrics["eval/accuracy"]


def cell_name(hydra: DictConfig) -> str:
    """What tells the cell from its neighbours: its overrides, as they were typed."""
    return hydra.job.override_dirname or "default"


def cell_params(cfg: DictConfig, hydra: DictConfig) -> dict[str, str]:
    """Short MLflow params: the choice in each group, the seed, and every other key that was set by hand."""
    groups = ("task", "model", "teacher", "precision", "gen", "dist", "eval")
    params = {group: hydra.runtime.choices[group] for group in groups}
    params["seed"] = str(cfg.seed)
    for override in hydra.overrides.task:
        key, _, value = override.lstrip("+~").partition("=")
        if key != "sweeps" and not key.startswith("tracking."):
            params.setdefault(key, value)
    return params


def _command(cfg: DictConfig, config_file: Path) -> list[str]:
    if cfg.dist.nproc_per_node == 1:
        return [sys.executable, "-m", "countdown_kd.run", str(config_file)]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(cfg.dist.nproc_per_node), "-m", "countdown_kd.run", str(config_file),
    ]  # fmt: skip


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


def _stop(process: subprocess.Popen) -> None:
    log.info("stopping the cell (%d s at most)", PATIENCE_S)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(PATIENCE_S)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
