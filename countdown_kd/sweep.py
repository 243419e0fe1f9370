"""A sweep as a whole: every cell checked before the first one runs, one parent run, one table at the end.

A Hydra callback, so it serves any launcher and any sweeper. Imports no torch.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from countdown_kd.config import ConfigError, validate


class SweepCallback(Callback):
    """Opens the sweep's MLflow run when a multirun starts; closes it and prints the table when it ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self.start(config)
        except Exception:
            # Hydra would turn it into a warning and go on without a parent run.
            traceback.print_exc()
            raise SystemExit(1) from None

    def start(self, config: DictConfig) -> None:
        """Check every cell, then open the store and the parent run."""
        self.cells = _cells(config)
        _check(config, self.cells)

        from countdown_kd import tracking

        self.uri = config.tracking.uri
        self.folder = Path(config.hydra.sweep.dir).resolve()
        self.client, experiment_id = tracking.open_store(config.tracking)
        swept = [o for o in _overrides(config) if not o.lstrip("+~").startswith(("hydra", "tracking."))]
        self.run_id = tracking.start_run(self.client, experiment_id, " ".join(swept) or "sweep", {}, kind="sweep")
        os.environ[tracking.SWEEP_RUN_ID] = self.run_id
        # Hydra calls on_multirun_end only after a sweep without an error.
        atexit.register(self.finish)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Close the parent run as what the sweep was and show its cells side by side."""
        from countdown_kd import tracking
        from countdown_kd.compare import show

        if os.environ.pop(tracking.SWEEP_RUN_ID, None) is None:
            return
        atexit.unregister(self.finish)
        cells = tracking.cells_of(self.client, self.run_id)
        states = {cell.info.status for cell in cells}
        if states == {"FINISHED"} and len(cells) >= len(self.cells):
            status = "FINISHED"
        else:
            status = "FAILED" if "FAILED" in states else "KILLED"
        self.client.set_terminated(self.run_id, status)
        if cells:
            show(self.client, cells, self.uri, self.folder, self.run_id)
        never = len(self.cells) - len(cells)
        if never > 0:
            print(f"{never} of {len(self.cells)} cells never started")


def _overrides(config: DictConfig) -> list[str]:
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    return params + list(config.hydra.overrides.task)


def _cells(config: DictConfig) -> list[list[str]]:
    """Each cell's overrides, where the sweeper is Hydra's own; another one's cells are not known beforehand."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return []
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(_overrides(config))
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def _check(config: DictConfig, cells: list[list[str]]) -> None:
    loader = GlobalHydra.instance().config_loader()
    wrong: dict[str, list[str]] = {}
    for overrides in cells:
        try:
            validate(loader.load_sweep_config(config, overrides))
        except ConfigError as error:
            wrong.setdefault(str(error), []).append(" ".join(overrides))
    if wrong:
        print("\nNothing was started:", file=sys.stderr)
        for problem, where in wrong.items():
            print("  " + "\n  ".join(problem.splitlines()), file=sys.stderr)
            print("    in " + "\n    in ".join(where), file=sys.stderr)
        raise SystemExit(2)
