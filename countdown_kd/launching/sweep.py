"""A sweep as a whole: every cell checked before the first one runs, one parent run, one table at the end.

It serves any launcher and any sweeper (callback.py). Imports no torch.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from countdown_kd import tracking
from countdown_kd.config import ConfigError, problems, validate
from countdown_kd.launching.cell import CODE, snapshot
from countdown_kd.launching.folder import FolderTaken, check_free, claim
from countdown_kd.launching.lookup import Progress, Stage, progress_of
from countdown_kd.launching.plan import show_plan
from countdown_kd.summary import show


def start_alone(config: DictConfig) -> None:
    """One cell: tell the plan, or have Hydra use its folder: the one in which it was begun, or one of its own."""
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
    (progress,) = progress_of(client, experiment_id, [config])
    if progress.folder:
        config.hydra.run.dir = str(progress.folder)
    elif not typed(config, "hydra.run.dir"):
        # Two commands may be given in the same second.
        config.hydra.run.dir = f"{config.hydra.run.dir}-{progress.identity[:8]}"


class Sweep:
    """A multirun from its start to its end. Making one checks every cell, then opens the store and the parent run."""

    def __init__(self, config: DictConfig):
        gc.freeze()  # a config is thousands of objects: collecting garbage takes a fifth of submitting a large sweep
        gc.set_threshold(100_000)
        cells = grid(config)
        composed = compose_all(config, cells)
        first = composed[0] if composed else config
        sweeper = config.hydra.sweeper._target_
        if first.plan and composed:
            show_plan(composed, config)
            raise SystemExit(0)
        if first.plan and "countdown_kd" not in sweeper:  # explain has a plan of its own
            print(f"{sweeper} chooses its cells as it goes: there is no plan to show")
            raise SystemExit(0)
        check(cells, composed)

        self.uri = config.tracking.uri
        self.client, experiment_id = tracking.open_store(config.tracking)
        with tracking.launching(self.uri):
            self.open(config, composed, experiment_id, force=first.force)
        os.environ[tracking.SWEEP_RUN_ID] = self.run_id

    def open(self, config: DictConfig, composed: list[DictConfig], experiment_id: str, force: bool) -> None:
        """Take the sweep's folder and its parent run, new ones or those in which it was begun.

        Raises FolderTaken where the folder is another sweep's, or where a cell's is another cell's.
        """
        progress = progress_of(self.client, experiment_id, composed)
        self.identities = {cell.identity for cell in progress}
        # Another sweeper's cells are not known beforehand: such a sweep is never found again.
        key = hashlib.sha256(" ".join(sorted(self.identities)).encode() or os.urandom(16)).hexdigest()[:16]
        earlier = None if force or not composed else tracking.find(self.client, experiment_id, key)
        if earlier and Path(earlier.data.tags[tracking.FOLDER_TAG]).is_dir():
            self.folder = Path(earlier.data.tags[tracking.FOLDER_TAG])
        else:
            folder = Path(config.hydra.sweep.dir).resolve()
            # Two sweeps may be given in the same second.
            self.folder = folder if typed(config, "hydra.sweep.dir") else folder.with_name(f"{folder.name}-{key[:8]}")
        for cfg in (config, *composed):
            cfg.hydra.sweep.dir = str(self.folder)
        if not composed:  # another sweeper's cells are composed anew, from what was typed
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{self.folder}'")
        check_folders(composed, progress)
        swept = [o for o in overrides_of(config) if not o.lstrip("+~").startswith(("hydra", "tracking.", "force"))]
        name = " ".join(swept) or "sweep"
        # Held as long as we live: status tells by it whether more cells are to come.
        self.lock = claim(self.folder, key, name, earlier.info.run_id if earlier else "")
        os.environ[CODE] = str(snapshot(self.folder))
        if earlier:
            self.run_id = earlier.info.run_id
        else:
            tags = {tracking.FOLDER_TAG: str(self.folder)} | ({tracking.IDENTITY_TAG: key} if composed else {})
            self.run_id = tracking.start_run(self.client, experiment_id, name, "sweep", tags=tags)
            self.lock.note = self.lock.note | {"run_id": self.run_id}
        self.client.set_tag(self.run_id, tracking.CELLS_TAG, str(len(self.identities)))
        self.client.update_run(self.run_id, status="RUNNING")
        under_way = {cell.identity: cell.run for cell in progress if cell.stage in (Stage.FINISHED, Stage.ACTIVE)}
        tracking.share(self.client, self.run_id, list(under_way.values()))
        if under_way:
            print(
                f"{len(under_way)} of {len(self.identities)} cells are done or under way; force=true runs them again",
                flush=True,
            )

    def finish(self) -> int:
        """Close the parent run as what the sweep was and show its cells side by side; returns how many are missing.

        The first call counts.
        """
        if os.environ.pop(tracking.SWEEP_RUN_ID, None) is None:
            return 0
        cells = tracking.cells_of(self.client, self.run_id)
        never = max(0, len(self.identities) - len(cells))  # another sweeper's cells are not known beforehand
        if not tracking.close_sweep(self.client, self.run_id, cells, complete=never == 0):
            return 0  # whoever left the jobs to themselves has been told how to come back
        if cells:
            show(self.client, cells, self.uri, self.folder, self.run_id)
        if never:
            print(f"{never} of {len(self.identities)} cells never started")
        missing = never + sum(cell.info.status != "FINISHED" for cell in cells)
        if missing:
            print(f"The same command again runs what is missing ({missing} cells), from the last checkpoints")
        return missing


def typed(config: DictConfig, key: str) -> bool:
    """Whether a key was given by hand."""
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def check_folders(composed: Sequence[DictConfig], progress: Sequence[Progress]) -> None:
    """Raise FolderTaken where two cells of a sweep would have one folder, or where a cell's is another cell's."""
    cells: dict[Path, tuple[str, DictConfig]] = {}
    for number, (cfg, each) in enumerate(zip(composed, progress, strict=True)):
        with open_dict(cfg.hydra):
            cfg.hydra.job.num = number
        folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
        if each.stage is Stage.FINISHED or each.folder:
            continue
        name = " ".join(cfg.hydra.overrides.task)
        other_identity, other = cells.setdefault(folder, (each.identity, cfg))
        if other_identity != each.identity:
            raise FolderTaken(
                f"{' '.join(other.hydra.overrides.task)} and {name} would both lie in {folder}, and one folder holds "
                "one cell. Leave hydra.sweep.subdir to its default, or put ${hydra.job.num} into it"
            )
        check_free(folder, each.identity, name)


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
    # A cell is named by what was swept, in the order in which it was typed; where nothing was, by all that was.
    swept = [o.key_or_group for o in parser.parse_overrides(overrides_of(config)) if o.is_sweep_override()]
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
        excluded = {key.lstrip("+") for key in naming.exclude_keys}
        with open_dict(cfg.hydra):
            cfg.hydra.overrides.task = cell
            cfg.hydra.job.override_dirname = naming.item_sep.join(
                o.input_line.lstrip("+").replace("=", naming.kv_sep, 1)
                for o in parsed
                if not o.is_hydra_override()
                and (o.key_or_group in swept or not (swept or o.get_key_element().lstrip("+~") in excluded))
            )

    def look_up(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found = composed.get(tuple(sweep_overrides))
        return compose(master_config, sweep_overrides) if found is None else found

    loader.load_sweep_config = look_up
    return [composed[tuple(cell)] for cell in cells]


def check(cells: list[list[str]], composed: list[DictConfig]) -> None:
    """Exit with every problem of every cell, if there is one."""
    wrong: dict[str, list[str]] = {}
    for overrides, problem in zip(cells, problems(composed), strict=True):
        if problem:
            wrong.setdefault(problem, []).append(" ".join(overrides))
    if wrong:
        print("\nNothing was started:", file=sys.stderr)
        for problem, where in wrong.items():
            print("  " + "\n  ".join(problem.splitlines()), file=sys.stderr)
            print("    in " + "\n    in ".join(where), file=sys.stderr)
        raise SystemExit(2)
