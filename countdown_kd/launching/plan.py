"""What a command would run, before anything is spent. Imports no torch."""

from __future__ import annotations

import shutil

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from countdown_kd import tracking
from countdown_kd.config import problems, substance
from countdown_kd.launching.cell import cell_name
from countdown_kd.launching.lookup import Progress, Stage, progress_of
from countdown_kd.launching.slurm.submit import script


def show_plan(cells: list[DictConfig], config: DictConfig) -> None:
    """Print each cell's difference from the defaults and what is left to do for it, and what sbatch would be given."""
    console = Console()
    wrong = problems(cells)
    client, experiment_id = tracking.open_store(config.tracking)
    default = flat(GlobalHydra.instance().config_loader().load_sweep_config(config, []))
    changes = [difference(default, flat(cell)) for cell in cells]
    common = {key: value for key, value in changes[0].items() if all(each.get(key) == value for each in changes)}
    if common and len(cells) > 1:
        console.print("In every cell:", describe(common), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("#", justify="right")
    table.add_column("to do", no_wrap=not any(wrong), overflow="fold")
    table.add_column("cell", overflow="fold")
    table.add_column("differs from the defaults in", overflow="fold")
    found = iter(progress_of(client, experiment_id, [c for c, p in zip(cells, wrong, strict=True) if not p]))
    names = [cell_name(cell.hydra) for cell in cells]
    left = 0
    for number, (name, change, problem) in enumerate(zip(names, changes, wrong, strict=True)):
        own = change if len(cells) == 1 else {key: value for key, value in change.items() if key not in common}
        todo = f"[red]invalid: {escape(problem)}[/]" if problem else to_do(next(found))
        left += todo.startswith(("run", "go on"))
        table.add_row(str(number), todo, name, describe(own) or "–")
    console.print(table)
    invalid = sum(map(bool, wrong))
    console.print(f"{left} of {len(cells)} cells would run{f'; {invalid} invalid: nothing would' if invalid else ''}.")
    if "submitit" in config.hydra.launcher._target_ or "Slurm" in config.hydra.launcher._target_:
        if not shutil.which("srun"):
            print("\nThe sbatch script is made on a login node of the cluster: there is no srun here")
            return
        console.print("\nTo be submitted with sbatch:\n", style="bold")
        print(script(config, max(left, 1)))


def to_do(progress: Progress) -> str:
    """What is left to do for a cell, in a few words."""
    if progress.stage is Stage.NEW:
        return "run"
    run = progress.run
    run_id = run.info.run_id[:8]
    if progress.stage is Stage.FINISHED:
        accuracy = run.data.metrics.get("eval/accuracy")
        return f"done, {100 * accuracy:.0f} % solved (run {run_id})" if accuracy is not None else f"done (run {run_id})"
    if progress.stage is Stage.ACTIVE:
        job = run.data.tags.get(tracking.JOB_TAG)
        return f"under way (Slurm job {job})" if job else f"under way (run {run_id})"
    state = tracking.described(run)
    if not progress.folder:
        return f"run again ({state}, its folder is not here)"
    return f"go on from step {progress.step} ({state})" if progress.step else f"run again from the start ({state})"


def flat(cfg: DictConfig) -> dict[str, object]:
    """The values that matter to a cell's result, by their dotted keys."""
    values = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            values[path] = node

    walk(substance(cfg), "")
    return values


def difference(default: dict[str, object], cell: dict[str, object]) -> dict[str, object]:
    """The cell's values where they are not the defaults'; None for a key that it lacks."""
    return {key: cell.get(key) for key in {**default, **cell} if default.get(key) != cell.get(key)}


def describe(change: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in change.items())
