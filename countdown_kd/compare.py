"""Why do two runs differ? What differs in their configs, where their curves part, what came out of them.

    python -m countdown_kd compare RUN RUN…

A RUN is the beginning of a run id, a run's name, a sweep (its cells), or a file with a config. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import special  # scipy.stats takes a second to import, and MLflow has imported this one

from countdown_kd import tracking
from countdown_kd.config import ConfigError
from countdown_kd.countdown import CORRECT
from countdown_kd.differences import ACCURACY, COSMETIC, LOSS, MISSING, NOISE, SPEED, differences
from countdown_kd.printed import flatten, read_configs
from countdown_kd.summary import PHASE_COLOURS, cell_label, summary_figure, summary_table, swept_params

YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
HEADINGS = {
    LOSS: "can change the loss",
    ACCURACY: "changes how accuracy is measured, not the loss",
    SPEED: "changes speed or memory, the loss only by rounding",
    COSMETIC: "changes nothing that is computed",
    NOISE: "where, when and under which name",
}
MOST_COLUMNS = 4  # sides that a wide table has a column for; of more it says which have which value
ROUNDING = 1e-6  # relative: what a loss may differ by where no repeated run tells
LOGGED_TO = 1.01e-4  # TRL rounds the on- and the off-policy loss of a mixed step to four digits, train/loss not
IDS = "[0-9a-f]{4,32}"

Store = Callable[[], tuple[MlflowClient, str]]  # opens it: two files need none, and should not make one


@dataclass
class Side:
    """One of the things compared: a config, and, where it was run, the run."""

    label: str
    config: dict[str, Any]
    run: Run | None = None
    client: MlflowClient | None = None
    sweep: str | None = None  # the run id of the sweep that was named

    def artifact(self, path: str) -> str:
        """An artifact's text; empty where there is none."""
        try:
            return Path(self.client.download_artifacts(self.run.info.run_id, path)).read_text()
        except (MlflowException, OSError):
            return ""

    def curve(self, metric: str) -> dict[int, float]:
        history = self.client.get_metric_history(self.run.info.run_id, metric)
        return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}

    @cached_property
    def losses(self) -> dict[int, float]:
        return self.curve("train/loss")

    @cached_property
    def kinds(self) -> dict[str, dict[int, tuple[float, float]]]:
        """The losses of on-policy and of off-policy micro-batches by step, and how far each may be off by rounding."""
        own, text = self.curve("train/on_policy_loss"), self.curve("train/off_policy_loss")

        def one(curve: dict[int, float], other: dict[int, float]) -> dict[int, tuple[float, float]]:
            # Where a step is all of one kind, train/loss is that kind's, and is not rounded.
            pure = self.losses.keys() - other.keys()
            return {step: (self.losses[step], 0.0) if step in pure else (curve[step], LOGGED_TO) for step in curve}

        return {"on-policy": one(own, text), "off-policy": one(text, own)}

    @cached_property
    def repeats(self) -> list[Side]:
        """Other finished runs of the same effective config, code and versions."""
        key = self.run.data.tags.get(tracking.IDENTITY_TAG)
        if key is None or not self.config:
            return []
        same = f"tags.`{tracking.IDENTITY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        runs = self.client.search_runs([self.run.info.experiment_id], same)
        sides = [run_side(self.client, run) for run in runs if run.info.run_id != self.run.info.run_id]
        return [
            side
            for side in sides
            if not any(each.rank != NOISE or each.key == "code" for each in differences([self.config, side.config]))
        ]

    @cached_property
    def went_on(self) -> dict[str, Any] | None:
        """The effective config of the process that went on last from a checkpoint; None where none did."""
        names = [file.path for file in self.client.list_artifacts(self.run.info.run_id, "config")]
        steps = {
            int(found[1]): found[0] for name in names if (found := re.search(r"effective_from_step_(\d+).yaml", name))
        }
        return self.read_config(steps[max(steps)]) if steps else None

    def read_config(self, name: str) -> dict[str, Any]:
        """A config's flat keys; empty where there is none."""
        return flatten(yaml.load(self.artifact(f"config/{name}") or "{}", YamlLoader))

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


def find_sides(store: Store, names: Sequence[str]) -> list[Side]:
    """What the names mean. Raises ConfigError for one that means nothing, or less than two things in all."""
    sides: list[Side] = []
    for name in names:
        file = os.path.expanduser(name)
        if os.path.isfile(file):  # Path would raise where a run's name is longer than a file's may be
            sides += [Side(label, config) for label, config in read_configs(Path(file))]
            continue
        client, experiment_id = store()
        run = named_run(client, experiment_id, name)
        sweep = run.info.run_id if is_sweep(run) else None
        sides += [run_side(client, each, sweep) for each in (tracking.cells_of(client, sweep) if sweep else [run])]
    if len(sides) < 2:
        raise ConfigError(f"{' '.join(names)}: {len(sides)} to compare; give two runs, a sweep, or two configs")
    labels = _labels([side.run for side in sides if side.run])
    for side in sides:
        if side.run:
            side.label = labels[side.run.info.run_id]
    return sides


def is_sweep(run: Run) -> bool:
    return run.data.tags.get("countdown_kd.kind") == "sweep"


def named_run(client: MlflowClient, experiment_id: str, name: str) -> Run:
    """The run, or the sweep, whose id begins so or that is called so. Raises ConfigError for none and for several."""

    def search(pattern: str) -> list[Run]:
        return client.search_runs([experiment_id], pattern, order_by=["attributes.start_time DESC"])

    found = search(f"attributes.run_id LIKE '{name}%'") if re.fullmatch(IDS, name) else []
    if not found:
        # A name may hold quotes, for which filters have no escape; to LIKE, an underscore is any character.
        alike = search("attributes.run_name LIKE '{}'".format(name.replace("'", "_")))
        found = [run for run in alike if run.info.run_name == name]
    if len(found) > 1:
        ids = ", ".join(f"{run.info.run_id[:8]} ({run.info.status.lower()})" for run in found[:10])
        raise ConfigError(f"{name}: {len(found)} runs are called so or have ids that begin so: {ids}. Give one's id")
    if not found:
        names = {run.info.run_name for run in search("")}
        near = ", ".join(difflib.get_close_matches(name, names))
        uri = re.sub(r"//[^/@]*@", "//", client.tracking_uri)  # a password in it is not shown
        raise ConfigError(
            f"{name}: no run by that id or name in {uri}, and no such file{f'. Near: {near}' if near else ''}. "
            "Give a run's name, or the first 4 or more of its id's 32 hex digits; tracking.uri=… is another store"
        )
    return found[0]


def run_side(client: MlflowClient, run: Run, sweep: str | None = None) -> Side:
    side = Side(run.info.run_name, {}, run, client, sweep)
    side.config = side.read_config("effective.yaml")
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


def compare(store: Store, names: Sequence[str], show_noise: bool) -> int:
    """Print what differs between the sides. Returns 0, or 2 where there is nothing to compare."""
    console = Console(highlight=False)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        sides = find_sides(store, names)
    except ConfigError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 2
    run = [side for side in sides if side.run]
    for side in run:
        show_state(console, side)
    show_differences(console, sides, show_noise)
    if len(run) > 1:
        client = run[0].client
        show_curves(console, run)
        show_outcomes(console, client, run)
        labels = [side.label for side in run]
        figure = summary_figure(client, [side.run for side in run], Path("compare.png").absolute(), labels)
        console.print(f"\nfigure   {escape(str(figure))}", soft_wrap=True)
        for sweep in sweeps_of(run):
            client.log_artifact(sweep, str(figure))
    return 0


def sweeps_of(run: list[Side]) -> set[str]:
    """The sweeps that a figure of these runs belongs to: those that were named, else the one that has all of them."""
    named = {side.sweep for side in run if side.sweep}
    parents = {side.run.data.tags.get(tracking.PARENT_TAG) for side in run}
    return named or (parents if len(parents) == 1 and None not in parents else set())


def show_state(console: Console, side: Side) -> None:
    """Say what a reader of the tables would not expect of a run."""
    label, status = escape(side.label), side.run.info.status
    if status != "FINISHED":
        console.print(f"[yellow]{label} has not finished ({status}): what it has is compared[/]")
    if not side.config:
        console.print(f"[yellow]{label} has no effective config: it died before, or is of another program[/]")
    elif side.went_on:
        other = [each for each in differences([side.config, side.went_on]) if each.rank != NOISE or each.key == "code"]
        changes = ", ".join(f"{each.key}: {' → '.join(map(spelled, each.values))}" for each in other)
        if changes:
            console.print(f"[yellow]{label} went on from a checkpoint with other values: {escape(changes)}[/]")


# ------------------------------------------------------------------------------------------------
# Configs


def show_differences(console: Console, sides: list[Side], show_noise: bool) -> None:
    sides = [side for side in sides if side.config]
    if len(sides) < 2:
        console.print(f"{len(sides)} of them has a config: there is none to compare it with.", style="bold")
        return
    found = differences([side.config for side in sides])
    noise = [each for each in found if each.rank == NOISE and not show_noise]
    # Two frameworks' configs, or two releases', share few keys; what only one has is as often a default as a choice.
    hide = not show_noise and not all(side.run for side in sides)
    lone = [each for each in found if hide and MISSING in each.values and each not in noise]
    shown = [each for each in found if each not in noise and each not in lone]
    if not shown:
        same = "The configs are the same." if not lone else "The configs are the same in every key that all sides have."
        console.print(same, style="bold")
    many = len(sides) > min(MOST_COLUMNS, max(2, (console.width - 50) // 15))
    if many and shown:
        for number, side in enumerate(sides, start=1):
            console.print(f"[bold]{number}[/]  {escape(side.label)}", soft_wrap=True)
        console.print()
    for rank, heading in HEADINGS.items():
        rows = [each for each in shown if each.rank == rank]
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=heading, title_justify="left")
        for header in ("key", *(["value: sides"] if many else [side.label for side in sides]), "why"):
            table.add_column(escape(header), overflow="fold")
        for each in rows:
            values = [by_value(each.values)] if many else map(spelled, each.values)
            table.add_row(*map(escape, (each.key, *values, each.why)))
        console.print(table)
        console.print()
    told = [f"{len(noise)} in folders, names and addresses"] if noise else []
    told += [f"{len(lone)} that not every side has"] if lone else []
    if told:
        console.print(f"Not shown without --all: {', '.join(told)}", style="dim")


def by_value(values: Sequence[Any]) -> str:
    """Which sides have which value, a line each: ``True: 1, 3–5``."""
    sides: dict[str, list[int]] = defaultdict(list)
    spelling = {repr(value): spelled(value) for value in values}
    for number, value in enumerate(values, start=1):
        sides[repr(value)].append(number)

    def ranges(numbers: list[int]) -> str:
        starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
        ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
        return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))

    return "\n".join(f"{spelling[value]}: {ranges(numbers)}" for value, numbers in sides.items())


def spelled(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


# ------------------------------------------------------------------------------------------------
# Curves


@dataclass
class Parting:
    """Where two runs part: the first step (from 1) of each kind, None where they never do, "?" where one lacks it."""

    draws: int | str | None
    puzzles: int | str | None
    rollouts: int | str | None
    losses: dict[str, int | str | None]  # all, on-policy, off-policy
    steps: int  # that both have


def parting(one: Side, other: Side, noise: dict[int, float]) -> Parting:
    """The first steps at which two runs differ; losses by more than the step's ``noise``, relative to the larger."""
    steps = sorted(set(one.losses) & set(other.losses))

    def told(name: str, part: Callable[[Any], Any]) -> int | str | None:
        a, b = one.batches.get(name), other.batches.get(name)
        if not a or not b:
            return "?"
        return next((step for step in steps if part(a[step - 1 : step]) != part(b[step - 1 : step])), None)

    def hashes(number: int) -> Callable[[list], list]:
        return lambda step: [[each[number] for each in batches] for batches in step]

    def apart(a: dict[int, tuple[float, float]], b: dict[int, tuple[float, float]]) -> int | str | None:
        both = [step for step in steps if step in a and step in b]
        for step in both:
            (x, rounded), (y, also_rounded) = a[step], b[step]
            close = math.isclose(x, y, rel_tol=noise[step], abs_tol=max(rounded, also_rounded))
            if not close and not (math.isnan(x) and math.isnan(y)):
                return step
        return None if both else "?"

    whole = [{step: (loss, 0.0) for step, loss in side.losses.items()} for side in (one, other)]
    kinds = {kind: apart(one.kinds[kind], other.kinds[kind]) for kind in one.kinds}
    return Parting(
        draws=told("on_policy", lambda step: step),
        puzzles=told("batches", hashes(0)),
        rollouts=told("batches", hashes(1)),
        losses={"all": apart(*whole), **kinds},
        steps=len(steps),
    )


def noise_of(one: Side, other: Side) -> tuple[dict[int, float], int]:
    """How far losses of repeated runs lie apart (relative) up to each step, and how many pairs tell.

    Pairs are of either side with its repeats; the two themselves are what is judged, and do not count.
    """
    compared = {one.run.info.run_id, other.run.info.run_id}
    pairs = [
        (side.losses, repeat.losses)
        for side in (one, other)
        for repeat in side.repeats
        if repeat.run.info.run_id not in compared
    ]
    largest, noise = ROUNDING, {}
    for step in sorted(set(one.losses) | set(other.losses)):
        for a, b in pairs:
            if step in a and step in b:
                largest = max(largest, abs(a[step] - b[step]) / max(abs(a[step]), abs(b[step]), 1e-12))
        noise[step] = largest
    return noise, len(pairs)


def show_curves(console: Console, sides: list[Side]) -> None:
    trained = [side for side in sides if side.losses]
    for side in sides:
        if not side.losses:
            console.print(f"\n{escape(side.label)} has logged no train/loss: it is not among the curves")
    if len(trained) < 2:
        return
    first = trained[0]
    console.print(f"\n[bold]Curves[/]: the first step that differs from {escape(first.label)}'s")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("run", overflow="fold")
    of = "noise", "pairs", "draws", "puzzles", "roll-\nouts", "loss", "on-\npolicy", "off-\npolicy", "of\nsteps"
    for header in of:
        table.add_column(header, justify="right", no_wrap=True)
    unrecorded = False
    for other in trained[1:]:
        noise, pairs = noise_of(first, other)
        part = parting(first, other, noise)
        cells = (part.draws, part.puzzles, part.rollouts, *part.losses.values())
        unrecorded |= "?" in cells
        table.add_row(
            escape(other.label), f"{noise[max(noise)]:.0e}", str(pairs),
            *("never" if step is None else str(step) for step in cells), str(part.steps),
        )  # fmt: skip
    console.print(table)
    told = (
        "noise: how far repeated runs of one config and code have parted by the last step, in so many pairs of them; "
    )
    told += "without one (force=true repeats a run) it is rounding"
    told += "; ?: a run has not recorded it (that is written when it ends)" if unrecorded else ""
    console.print(told, style="dim")


# ------------------------------------------------------------------------------------------------
# Outcomes


def show_outcomes(console: Console, client: MlflowClient, sides: list[Side]) -> None:
    console.print("\n[bold]Outcomes[/]")
    runs = [side.run for side in sides]
    names = swept_params(runs)
    alike = len({cell_label(run, names) for run in runs}) < len(runs)
    console.print(summary_table(client, runs, [side.label for side in sides] if alike else None))
    show_phases(console, sides)
    show_seeds(console, sides)
    told = [side for side in sides if side.predictions is not None]
    for side in sides:
        if side.predictions is None:
            console.print(f"\n{escape(side.label)} has no predictions: not compared puzzle by puzzle")
    for other in told[1:]:
        first, a, b = told[0], escape(told[0].label), escape(other.label)
        if any(first.predictions[name] != other.predictions[name] for name in ("numbers", "target")):
            console.print(f"\n{b} was evaluated on other puzzles than {a}: not compared one by one")
            continue
        labels = first.predictions["label"], other.predictions["label"]
        gained, lost, p = mcnemar(*labels)
        console.print(
            f"\n[bold]{a} → {b}[/]: {gained} puzzles gained, {lost} lost of {len(labels[0])}; "
            f"McNemar (exact) p = {p:.2g}"
        )
        console.print(moved_table(*labels))


def show_phases(console: Console, sides: list[Side]) -> None:
    """Where an optimizer step's time goes, of the runs that have timed it."""
    timed = [side for side in sides if any(name.startswith("perf/phase/") for name in side.run.data.metrics)]
    if not timed:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("seconds a step", overflow="fold")
    for phase in PHASE_COLOURS:
        table.add_column(phase, justify="right", no_wrap=True)
    for side in timed:
        seconds = (side.run.data.metrics.get(f"perf/phase/{phase}_s") for phase in PHASE_COLOURS)
        table.add_row(escape(side.label), *("–" if each is None else f"{each:.3g}" for each in seconds))
    console.print()
    console.print(table)


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
        table.add_row(escape(label), str(len(group)), interval(losses, ".4f"), interval(solved, ".1f", 0, 100))
    console.print()
    console.print(table)


def interval(values: list[float], form: str, least: float = -math.inf, most: float = math.inf) -> str:
    """Mean and Student's 95 % interval, as ``0.51 (0.48–0.54)``; of less than three the values: theirs says nothing.

    The interval ends where values do, at ``least`` and ``most``.
    """
    if len(values) < 3:
        return ", ".join(format(value, form) for value in values) or "–"
    mean = statistics.fmean(values)
    half = float(special.stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{form}} ({max(least, mean - half):{form}}–{min(most, mean + half):{form}})"
