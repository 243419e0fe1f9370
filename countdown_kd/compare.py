"""Why do two runs differ? What differs in their configs, where their curves part, what came out of them.

    python -m countdown_kd compare RUN RUN…

A RUN is the beginning of a run id, a run's name, a sweep (its cells), or a file with a config. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import special  # scipy.stats takes a second to import, and MLflow has imported this one

from countdown_kd import tracking
from countdown_kd.config import ConfigError
from countdown_kd.countdown import CORRECT
from countdown_kd.differences import COSMETIC, LOSS, MISSING, NOISE, SPEED, differences
from countdown_kd.printed import flatten, read_configs
from countdown_kd.summary import cell_label, summary_figure, summary_table, swept_params

YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
HEADINGS = {
    LOSS: "can change the loss",
    SPEED: "changes speed or memory, the loss only by rounding",
    COSMETIC: "changes nothing that is computed",
    NOISE: "where, when and under which name",
}


@dataclass
class Side:
    """One of the things compared: a config, and, where it was run, the run."""

    label: str
    config: dict[str, Any]
    run: Run | None = None
    client: MlflowClient | None = None

    def artifact(self, path: str) -> str:
        """An artifact's text; empty where there is none."""
        try:
            return Path(self.client.download_artifacts(self.run.info.run_id, path)).read_text()
        except (MlflowException, OSError):
            return ""

    @cached_property
    def losses(self) -> dict[int, float]:
        history = self.client.get_metric_history(self.run.info.run_id, "train/loss")
        return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}

    @cached_property
    def batches(self) -> dict[str, list]:
        """``on_policy``: flags by step and micro-batch; ``batches``: hashes of prompts and completions."""
        return json.loads(self.artifact("on_policy_draws.json") or "{}")

    @cached_property
    def predictions(self) -> dict[str, list] | None:
        """The columns of the table; None where the run was not evaluated."""
        text = self.artifact("eval_predictions.json")
        if not text:
            return None
        table = json.loads(text)
        return {name: [row[i] for row in table["data"]] for i, name in enumerate(table["columns"])}


def find_sides(client: MlflowClient, experiment_id: str, names: Sequence[str]) -> list[Side]:
    """What the names mean. Raises ConfigError for one that means nothing, or less than two things in all."""
    sides: list[Side] = []
    for name in names:
        file = Path(name).expanduser()
        if file.is_file():
            sides += [Side(label, config) for label, config in read_configs(file)]
        else:
            sides += [run_side(client, run) for run in named_runs(client, experiment_id, name)]
    if len(sides) < 2:
        raise ConfigError(f"{' '.join(names)}: {len(sides)} to compare; give two runs, a sweep, or two configs")
    labels = _labels([side.run for side in sides if side.run])
    for side in sides:
        if side.run:
            side.label = labels[side.run.info.run_id]
    return sides


def named_runs(client: MlflowClient, experiment_id: str, name: str) -> list[Run]:
    def search(pattern: str) -> list[Run]:
        return client.search_runs([experiment_id], pattern, order_by=["attributes.start_time DESC"])

    found = search(f"attributes.run_id LIKE '{name}%'") if re.fullmatch("[0-9a-f]{4,32}", name) else []
    if len(found) > 1:
        raise ConfigError(f"{name}: the ids of {len(found)} runs begin so; give more of it")
    if not found:
        # A name may hold quotes, for which filters have no escape; to LIKE, an underscore is any character.
        alike = search("attributes.run_name LIKE '{}'".format(name.replace("'", "_")))
        found = [run for run in alike if run.info.run_name == name][:1]
    if not found:
        raise ConfigError(f"{name}: no run by that id or name in this store, and no such file")
    if found[0].data.tags.get("countdown_kd.kind") == "sweep":
        return tracking.cells_of(client, found[0].info.run_id)
    return found


def run_side(client: MlflowClient, run: Run) -> Side:
    side = Side(run.info.run_name, {}, run, client)
    side.config = flatten(yaml.load(side.artifact("config/effective.yaml") or "{}", YamlLoader))
    return side


def _labels(runs: list[Run]) -> dict[str, str]:
    """What tells each run from the others; runs of one config are numbered."""
    names, seen = swept_params(runs), defaultdict(int)
    labels = {}
    for run in runs:
        label = cell_label(run, names) if names else run.info.run_id[:8]
        seen[label] += 1
        labels[run.info.run_id] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return labels


def compare(client: MlflowClient, experiment_id: str, names: Sequence[str], show_noise: bool) -> int:
    """Print what differs between the sides. Returns 0, or 2 where there is nothing to compare."""
    console = Console(highlight=False)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        sides = find_sides(client, experiment_id, names)
    except ConfigError as error:
        console.print(f"[red]{error}[/]")
        return 2
    for side in sides:
        if side.run and side.run.info.status != "FINISHED":
            console.print(f"[yellow]{side.label} has not finished ({side.run.info.status}): what it has is compared[/]")
        if side.run and not side.config:
            console.print(f"[yellow]{side.label} has no effective config: it died before, or is of another program[/]")
    show_differences(console, sides, show_noise)
    run = [side for side in sides if side.run]
    if len(run) > 1:
        show_curves(console, run)
        show_outcomes(console, client, run)
        figure = summary_figure(client, [side.run for side in run], Path("compare.png").absolute())
        console.print(f"\nfigure   {figure}", soft_wrap=True)
        sweeps = {side.run.data.tags.get(tracking.PARENT_TAG) for side in run}
        if len(sweeps) == 1 and None not in sweeps:
            client.log_artifact(sweeps.pop(), str(figure))
    return 0


# ------------------------------------------------------------------------------------------------
# Configs


def show_differences(console: Console, sides: list[Side], show_noise: bool) -> None:
    found = differences([side.config for side in sides])
    noise = [each for each in found if each.rank == NOISE and not show_noise]
    # Two frameworks' configs, or two releases', share few keys; what only one has is as often a default as a choice.
    lone = [each for each in found if MISSING in each.values and each not in noise and not show_noise]
    shown = [each for each in found if each not in noise and each not in lone]
    if not shown:
        console.print("The configs are the same.", style="bold")
    for rank, heading in HEADINGS.items():
        rows = [each for each in shown if each.rank == rank]
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=heading, title_justify="left")
        for header in ("key", *(side.label for side in sides), "why"):
            table.add_column(header, overflow="fold")
        for each in rows:
            table.add_row(each.key, *(spelled(value) for value in each.values), each.why)
        console.print(table)
        console.print()
    told = [f"{len(noise)} in folders, names and addresses"] if noise else []
    told += [f"{len(lone)} that not every side has"] if lone else []
    if told:
        console.print(f"Not shown without --all: {', '.join(told)}", style="dim")


def spelled(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


# ------------------------------------------------------------------------------------------------
# Curves


@dataclass
class Parting:
    """Where two runs part: the first step (from 1) of each kind, None where they never do."""

    draws: int | None
    puzzles: int | str | None  # "?" where a run has not recorded them
    rollouts: int | str | None
    losses: dict[str, int | None]  # all, on-policy, off-policy
    steps: int  # that both have


def parting(one: Side, other: Side, noise: float) -> Parting:
    """The first steps at which two runs differ; losses by more than ``noise``, relative to the larger."""
    steps = sorted(set(one.losses) & set(other.losses))

    def first(differ) -> int | None:
        return next((step for step in steps if differ(step)), None)

    def flags(side: Side, step: int) -> list[bool]:
        told = side.batches.get("on_policy", [])
        return told[step - 1] if step <= len(told) else []

    def hashes(side: Side, step: int, part: int) -> list[str]:
        told = side.batches.get("batches", [])
        return [each[part] for each in told[step - 1]] if step <= len(told) else []

    def apart(step: int) -> bool:
        a, b = one.losses[step], other.losses[step]
        return not math.isclose(a, b, rel_tol=noise, abs_tol=0) and not (math.isnan(a) and math.isnan(b))

    recorded = bool(one.batches.get("batches") and other.batches.get("batches"))
    return Parting(
        draws=first(lambda step: flags(one, step) != flags(other, step)),
        puzzles=first(lambda step: hashes(one, step, 0) != hashes(other, step, 0)) if recorded else "?",
        rollouts=first(lambda step: hashes(one, step, 1) != hashes(other, step, 1)) if recorded else "?",
        losses={
            "all": first(apart),
            "on-policy": first(lambda step: any(flags(one, step)) and apart(step)),
            "off-policy": first(lambda step: not any(flags(one, step)) and apart(step)),
        },
        steps=len(steps),
    )


def noise_of(client: MlflowClient, experiment_id: str, sides: Sequence[Side]) -> tuple[float, int]:
    """How far the losses of runs of one and the same config lie apart (relative), and how many pairs tell."""
    largest, pairs = 0.0, 0
    for key in {side.run.data.tags.get(tracking.IDENTITY_TAG) for side in sides} - {None}:
        runs = client.search_runs(
            [experiment_id], f"tags.`{tracking.IDENTITY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        )
        repeats = [Side("", {}, run, client).losses for run in runs]
        for other in repeats[1:]:
            pairs += 1
            for step in set(repeats[0]) & set(other):
                a, b = repeats[0][step], other[step]
                largest = max(largest, abs(a - b) / max(abs(a), abs(b), 1e-12))
    return largest, pairs


def show_curves(console: Console, sides: list[Side]) -> None:
    trained = [side for side in sides if side.losses]
    if len(trained) < 2:
        return
    first = trained[0]
    measured, pairs = noise_of(first.client, first.run.info.experiment_id, trained)
    noise = max(measured, 1e-6)
    source = f"of {pairs} repeated runs" if pairs else "rounding: no run is repeated here, force=true repeats one"
    console.print(f"\n[bold]Curves[/]: the first step that differs from {first.label}'s; noise {noise:.1e} ({source})")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("run", overflow="fold")
    for header in ("draws", "puzzles", "rollouts", "loss", "loss on-\npolicy", "loss off-\npolicy", "of steps"):
        table.add_column(header, justify="right", no_wrap=True)
    for other in trained[1:]:
        part = parting(first, other, noise)
        cells = (part.draws, part.puzzles, part.rollouts, *part.losses.values())
        table.add_row(other.label, *("never" if step is None else str(step) for step in cells), str(part.steps))
    console.print(table)


# ------------------------------------------------------------------------------------------------
# Outcomes


def show_outcomes(console: Console, client: MlflowClient, sides: list[Side]) -> None:
    console.print("\n[bold]Outcomes[/]")
    console.print(summary_table(client, [side.run for side in sides]))
    show_seeds(console, sides)
    told = [side for side in sides if side.predictions is not None]
    if len(told) < 2:
        return
    first = told[0]
    for other in told[1:]:
        if any(first.predictions[name] != other.predictions[name] for name in ("numbers", "target")):
            console.print(f"\n{other.label} was evaluated on other puzzles than {first.label}: not compared one by one")
            continue
        labels = first.predictions["label"], other.predictions["label"]
        gained, lost, p = mcnemar(*labels)
        console.print(
            f"\n[bold]{first.label} → {other.label}[/]: {gained} puzzles gained, {lost} lost of "
            f"{len(labels[0])}; McNemar (exact) p = {p:.2g}"
        )
        console.print(moved_table(*labels))


def mcnemar(one: Sequence[str], other: Sequence[str]) -> tuple[int, int, float]:
    """Puzzles that only the other solves, that only the one solves, and the exact two-sided p-value.

    McNemar (1947), in the exact binomial form: a puzzle that just one of them solves is as likely to be either's.
    """
    solved = Counter((a == CORRECT, b == CORRECT) for a, b in zip(one, other, strict=True))
    gained, lost = solved[False, True], solved[True, False]
    return gained, lost, min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))


def moved_table(one: Sequence[str], other: Sequence[str]) -> Table:
    """How many puzzles went from each class (rows) to each class (columns)."""
    counts = Counter(zip(one, other, strict=True))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("from ↓  to →")
    for after in sorted(set(other)):
        table.add_column(after.replace("_", "\n"), justify="right")
    for before in sorted(set(one)):
        row = [(after, counts[before, after]) for after in sorted(set(other))]
        table.add_row(
            before, *("[dim]·[/]" if not n else f"[bold]{n}[/]" if after == before else str(n) for after, n in row)
        )
    return table


def show_seeds(console: Console, sides: list[Side]) -> None:
    """Where cells differ in nothing but their seed: mean and 95 % t-interval over the seeds."""
    groups: dict[str, list[Side]] = defaultdict(list)
    for side in sides:
        rest = {key: value for key, value in side.run.data.params.items() if key != "seed"}
        groups[json.dumps(rest, sort_keys=True)].append(side)
    groups = {
        key: group for key, group in groups.items() if len({side.run.data.params.get("seed") for side in group}) > 1
    }
    if not groups:
        return
    runs = [side.run for side in sides]
    names = [name for name in swept_params(runs) if name != "seed"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for header in ("over seeds", "seeds", "loss", "solved, %"):
        table.add_column(header, justify="left" if header == "over seeds" else "right")
    for group in groups.values():
        losses = [statistics.fmean(list(side.losses.values())[-10:]) for side in group if side.losses]
        solved = [
            100 * side.run.data.metrics["eval/accuracy"] for side in group if "eval/accuracy" in side.run.data.metrics
        ]
        label = cell_label(group[0].run, names) if names else "all"
        table.add_row(label, str(len(group)), interval(losses, ".4f"), interval(solved, ".1f"))
    console.print(table)


def interval(values: list[float], form: str) -> str:
    """Mean and Student's 95 % interval, as ``0.51 (0.48–0.54)``."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return format(mean, form)
    half = float(special.stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{form}} ({mean - half:{form}}–{mean + half:{form}})"
