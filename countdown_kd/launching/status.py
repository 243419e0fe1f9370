"""The cells of a sweep while they run: state, step, loss, s/it, log. Imports no torch."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from countdown_kd import tracking
from countdown_kd.launching.folder import CONFIG, is_held
from countdown_kd.launching.slurm.query import NOBODY, refresh
from countdown_kd.launching.states import ALIVE, WAITING, State
from countdown_kd.summary import cell_label, log_of, swept_params

POLL_S = 5  # Slurm's controllers do not like to be asked more often
SOURCES = {  # what query.refresh goes by, where that has to be said
    "scontrol": "sacct does not answer: what became of a job is what Slurm's controller still remembers\n",
    NOBODY: "Slurm does not answer here: states are the last known\n",
}
STYLES = {"RUNNING": "bold", "FAILED": "red", "KILLED": "red", "SCHEDULED": "dim", "FINISHED": "green"}


def follow(client: MlflowClient, run_ids: Sequence[str]) -> None:
    """Show the cells until every one has ended: a live table, or, where nobody looks, a line for every change."""
    console = Console()
    before: dict[str, str] = {}
    said = ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            runs, source = look(client, run_ids)
            if console.is_terminal:
                live.update(Group(status_table(client, runs), SOURCES.get(source, "")), refresh=True)
            elif source != said:
                print(SOURCES.get(source, ""), end="", flush=True)
            said = source
            for run in runs:
                state = tracking.described(run)
                if not console.is_terminal and before.get(run.info.run_id) != state:
                    label = cell_label(run, swept_params(runs))
                    print(f"{time.strftime('%H:%M:%S')}  {label}: {state}", flush=True)
                before[run.info.run_id] = state
            if not any(tracking.state_of(run) in ALIVE for run in runs):
                break
            time.sleep(POLL_S)
    if console.is_terminal:  # the table is gone
        print(SOURCES.get(source, ""), end="")


def look(client: MlflowClient, run_ids: Sequence[str]) -> tuple[list[Run], str]:
    """The runs, after asking Slurm about those that have not finished, and what it goes by.

    One that is said to run here, and whose folder nobody holds, is closed: it died with who had started it.
    """
    source = ""
    runs = [client.get_run(run_id) for run_id in run_ids]
    opening = None
    for i, run in enumerate(runs):
        state = tracking.state_of(run)
        folder = Path(run.data.tags.get(tracking.FOLDER_TAG, "nowhere"))
        if state not in ALIVE or tracking.JOB_TAG in run.data.tags or not folder.is_dir() or is_held(folder):
            continue
        if opening is None:
            opening = tracking.lock_of(client.tracking_uri, "launching").is_held()
        if state in WAITING and opening:
            continue  # a launcher has opened it and is about to submit it
        tracking.set_state(client, run.info.run_id, State.NEVER_STARTED if state in WAITING else State.KILLED)
        runs[i] = client.get_run(run.info.run_id)
    unfinished = [run for run in runs if run.info.status != "FINISHED" and tracking.JOB_TAG in run.data.tags]
    if unfinished:
        source = refresh(client, unfinished)
        runs = [client.get_run(run_id) for run_id in run_ids]
    return runs, source


def status_table(client: MlflowClient, runs: Sequence[Run]) -> Table:
    """A row a cell, what runs first: a terminal may not be long enough for all; s/it is that of the last ten steps."""
    counts = Counter(tracking.state_of(run) for run in runs)
    caption = f"{len(runs)} cells: " + ", ".join(f"{number} {state}" for state, number in counts.items())
    table = Table(title=caption, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("cell", overflow="fold")
    table.add_column("state", overflow="fold")
    for header in ("step", "loss", "s/it"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("log", overflow="fold")
    names = swept_params(runs)
    for run in sorted(runs, key=lambda run: list(STYLES).index(run.info.status)):
        points = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda point: point.step)
        folder = Path(run.data.tags.get(tracking.FOLDER_TAG, ""))
        times = [(after.timestamp - point.timestamp) / 1000 for point, after in pairwise(points[-11:])]
        table.add_row(
            cell_label(run, names),
            f"[{STYLES[run.info.status]}]{tracking.described(run)}[/]",
            f"{points[-1].step if points else 0}{_of_steps(folder)}",
            f"{points[-1].value:.4f}" if points else "–",
            f"{statistics.median(times):.2f}" if times else "–",
            os.path.relpath(log_of(run)),
        )
    return table


def _of_steps(folder: Path) -> str:
    file = folder / CONFIG
    steps = yaml.safe_load(file.read_text())["trainer"]["max_steps"] if file.exists() else -1
    return f"/{steps}" if steps > 0 else ""


def status(client: MlflowClient, experiment_id: str, sweep: str | None, live: bool) -> int:
    """Show a sweep (the newest, or one by the beginning of its id); returns 0 where every cell has finished."""
    sweeps = client.search_runs(
        [experiment_id], "tags.`countdown_kd.kind` = 'sweep'", order_by=["attributes.start_time DESC"]
    )
    found = [run for run in sweeps if run.info.run_id.startswith(sweep or "")]
    if not found:
        print(f"no sweep {sweep} in this store" if sweep else "no sweep in this store yet")
        return 2
    parent = found[0]
    run_ids = [run.info.run_id for run in tracking.cells_of(client, parent.info.run_id)]
    if live:
        try:
            follow(client, run_ids)
        except KeyboardInterrupt:
            pass
    runs, source = look(client, run_ids)
    print(f"sweep {parent.info.run_id[:8]}: {parent.info.run_name}\n")
    Console().print(status_table(client, runs))
    print(SOURCES.get(source, ""), end="")

    total = int(parent.data.tags.get(tracking.CELLS_TAG, 0))  # none: another sweeper's are not known beforehand
    never = max(0, total - len(runs))
    folder = Path(parent.data.tags.get(tracking.FOLDER_TAG, "nowhere"))
    launching = is_held(folder) if folder.is_dir() else never > 0  # elsewhere: not to be told
    if never:
        print(f"{never} of {total} cells {'have not started yet' if launching else 'never started'}")
    if not launching:
        tracking.close_sweep(client, parent.info.run_id, runs, complete=never == 0)
    return int(never > 0 or any(run.info.status != "FINISHED" for run in runs))
