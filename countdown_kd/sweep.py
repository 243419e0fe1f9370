"""A sweep as a whole: every cell checked before the first one runs, one parent run, one table at the end.

A Hydra callback, so it serves any launcher and any sweeper. Imports no torch.
"""

from __future__ import annotations

import atexit
import copy
import gc
import hashlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from countdown_kd.config import ConfigError, validate


class SweepCallback(Callback):
    """Opens the sweep's MLflow run when a multirun starts; closes it and prints the table when it ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        loudly(self.start_alone, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        loudly(self.start, config)

    def start_alone(self, config: DictConfig) -> None:
        """One cell: tell the plan, or have Hydra use the folder in which it was begun."""
        from countdown_kd import tracking
        from countdown_kd.cell import standing
        from countdown_kd.plan import show_plan

        if "Slurm" in config.hydra.launcher._target_:
            print("hydra/launcher=slurm submits sweeps, also of one cell: add -m", file=sys.stderr)
            raise SystemExit(2)
        if config.plan:
            show_plan([config], config)
            raise SystemExit(0)
        try:
            validate(config)
        except ConfigError:
            return  # run_cell tells
        client, experiment_id = tracking.open_store(config.tracking)
        if folder := standing(client, experiment_id, config).folder:
            config.hydra.run.dir = str(folder)

    def start(self, config: DictConfig) -> None:
        """Check every cell, then open the store and the parent run."""
        gc.freeze()  # a config is thousands of objects: collecting garbage takes a fifth of submitting a large sweep
        gc.set_threshold(100_000)
        cells = grid(config)
        composed = compose_all(config, cells)
        first = composed[0] if composed else config
        if first.plan and composed:
            from countdown_kd.plan import show_plan

            show_plan(composed, config)
            raise SystemExit(0)
        check(cells, composed)

        from countdown_kd import tracking
        from countdown_kd.cell import CODE, lock, look_up_once, snapshot, standings

        self.uri = config.tracking.uri
        self.client, experiment_id = tracking.open_store(config.tracking)
        found = standings(self.client, experiment_id, composed)
        look_up_once(composed, found)
        self.identities = {cell.identity for cell in found}
        key = hashlib.sha256(" ".join(sorted(self.identities)).encode()).hexdigest()[:16]
        earlier = None
        if composed and not first.force:
            earlier = tracking.find(self.client, experiment_id, key)
        self.folder = Path(config.hydra.sweep.dir).resolve()
        if earlier and Path(earlier.data.tags[tracking.FOLDER_TAG]).is_dir():
            self.folder = Path(earlier.data.tags[tracking.FOLDER_TAG])
        for cfg in (config, *composed):
            cfg.hydra.sweep.dir = str(self.folder)
        if earlier:
            self.run_id = earlier.info.run_id
        else:
            swept = [o for o in overrides_of(config) if not o.lstrip("+~").startswith(("hydra", "tracking.", "force"))]
            tags = {tracking.FOLDER_TAG: str(self.folder)} | ({tracking.IDENTITY_TAG: key} if composed else {})
            self.run_id = tracking.start_run(self.client, experiment_id, " ".join(swept) or "sweep", "sweep", tags=tags)
        self.client.set_tag(self.run_id, tracking.CELLS_TAG, str(len(self.identities)))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = lock(self.folder)  # as long as we live: status tells by it whether more cells are to come
        self.held.__enter__()
        self.client.update_run(self.run_id, status="RUNNING")
        done = {cell.run.info.run_id: cell.run for cell in found if cell.what in ("done", "active")}
        shared = [key for key, run in done.items() if run.data.tags.get(tracking.PARENT_TAG) != self.run_id]
        self.client.set_tag(self.run_id, tracking.SHARED_TAG, " ".join(shared))
        if done:
            print(
                f"{len(done)} of {len(self.identities)} cells are done or under way; force=true runs them again",
                flush=True,
            )
        os.environ[tracking.SWEEP_RUN_ID] = self.run_id
        os.environ[CODE] = str(snapshot(self.folder))
        # Hydra calls on_multirun_end only after a sweep without an error.
        atexit.register(self.finish)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Close the parent run as what the sweep was and show its cells side by side."""
        from countdown_kd import tracking
        from countdown_kd.summary import show

        if os.environ.pop(tracking.SWEEP_RUN_ID, None) is None:
            return
        atexit.unregister(self.finish)
        cells = tracking.cells_of(self.client, self.run_id)
        never = max(0, len(self.identities) - len(cells))  # another sweeper's cells are not known beforehand
        if not close_sweep(self.client, self.run_id, cells, complete=never == 0):
            return  # whoever left the jobs to themselves has been told how to come back
        if cells:
            show(self.client, cells, self.uri, self.folder, self.run_id)
        if never:
            print(f"{never} of {len(self.identities)} cells never started")
        if missing := never + sum(cell.info.status != "FINISHED" for cell in cells):
            print(f"The same command again runs what is missing ({missing} cells), from the last checkpoints")


def close_sweep(client, run_id: str, cells: Sequence, complete: bool = True) -> bool:
    """Close a sweep's MLflow run as what its cells were; False where one of them is still under way."""
    states = {cell.info.status for cell in cells}
    if states & {"RUNNING", "SCHEDULED"}:
        return False
    if states == {"FINISHED"} and complete:
        status = "FINISHED"
    else:
        status = "FAILED" if "FAILED" in states else "KILLED"
    client.set_terminated(run_id, status)
    return True


def loudly(function: Any, config: DictConfig) -> None:
    """Hydra turns what a callback raises into a warning and goes on; here it ends the program."""
    from countdown_kd.tracking import StoreError

    try:
        function(config)
    except StoreError as error:
        print(f"\nNothing was started: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def overrides_of(config: DictConfig) -> list[str]:
    """What was given on the command line and in the sweep's file."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    return params + list(config.hydra.overrides.task)


def grid(config: DictConfig) -> list[list[str]]:
    """Each cell's overrides, where the sweeper is Hydra's own; another one's cells are not known beforehand."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return []
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(overrides_of(config))
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def compose_all(config: DictConfig, cells: list[list[str]]) -> list[DictConfig]:
    """Compose every cell, and have Hydra, which would do it twice more, find what is composed here.

    Hydra takes 0.1 s a cell, most of it for reading the same files again. Which files those are depends on the options
    chosen alone: the cells with the same options are copies of one, to which Hydra applies their values.
    """
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    parse = cache(parser.parse_override)
    hydra_overrides = list(config.hydra.overrides.hydra)
    by_options: dict[tuple, DictConfig] = {}
    composed: dict[tuple, DictConfig] = {}
    compose = loader.load_sweep_config
    for cell in cells:
        parsed = [parse(override) for override in (*hydra_overrides, *cell)]
        # As Hydra tells them apart: trainer=gold is an option, trainer={lmbda: 1} and trainer.lmbda=1 are values.
        values = [
            o for o in parsed if isinstance(o.value(), dict) or not loader.repository.group_exists(o.key_or_group)
        ]
        options = [o.input_line for o in parsed[len(hydra_overrides) :] if o not in values]
        key = tuple(options)
        if key not in by_options:
            by_options[key] = compose(config, options)
        cfg = composed[tuple(cell)] = copy.deepcopy(by_options[key])
        ConfigLoaderImpl._apply_overrides_to_config([o for o in values if o.input_line not in hydra_overrides], cfg)
        naming = cfg.hydra.job.config.override_dirname
        with open_dict(cfg.hydra):
            cfg.hydra.overrides.task = cell
            cfg.hydra.job.override_dirname = get_overrides_dirname(
                overrides=[o for o in parsed if not o.is_hydra_override()],
                kv_sep=naming.kv_sep,
                item_sep=naming.item_sep,
                exclude_keys=naming.exclude_keys,
            )

    def look_up(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found = composed.get(tuple(sweep_overrides))
        return compose(master_config, sweep_overrides) if found is None else found

    loader.load_sweep_config = look_up
    return [composed[tuple(cell)] for cell in cells]


def check(cells: list[list[str]], composed: list[DictConfig]) -> None:
    """Exit with every problem of every cell, if there is one."""
    wrong: dict[str, list[str]] = {}
    for overrides, cfg in zip(cells, composed, strict=True):
        try:
            validate(cfg)
        except ConfigError as error:
            wrong.setdefault(str(error), []).append(" ".join(overrides))
    if wrong:
        print("\nNothing was started:", file=sys.stderr)
        for problem, where in wrong.items():
            print("  " + "\n  ".join(problem.splitlines()), file=sys.stderr)
            print("    in " + "\n    in ".join(where), file=sys.stderr)
        raise SystemExit(2)
