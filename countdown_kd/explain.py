"""Which of the keys that differ between two configs carry the difference of their results?

    python launch.py -m hydra/sweeper=explain experiment=lab_native,lab_oumi

Delta debugging (Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), the
algorithm ddmin) over short runs: A with some of B's values, until no smaller set of them does what all of them do. A
and B and every probe between them are cells like any other, paired by seed: same puzzles, same on-policy draws. Imports
no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from countdown_kd import tracking
from countdown_kd.config import ConfigError, identity, substance, validate
from countdown_kd.countdown import FAILURES
from countdown_kd.differences import MISSING, RANKS, Difference, differences
from countdown_kd.launching.lookup import Stage, progress_of
from countdown_kd.launching.sweep import overrides_of
from countdown_kd.summary import PHASE_COLOURS

# Keys that validate() allows only together: one word of the command line sets each of these.
TOGETHER = {
    "precision": ("model.dtype", "trainer.bf16", "gen.dtype"),
    "gen": ("trainer.use_vllm", "trainer.vllm_", "gen.max_num_seqs", "gen.cache_implementation"),
}
# What every run logs; TRL logs some more.
EVALUATED = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "truncated_frac",
    *(f"failures/{label}" for label in FAILURES),
)
METRICS = (
    "train/loss", "train/on_policy_loss", "train/off_policy_loss", "train/matched_loss", "train/unmatched_loss",
    "train/grad_norm", "train/learning_rate", "rollout/mean_tokens", "rollout/truncated_frac",
    "perf/s_per_it", "perf/samples_per_s", "perf/rollout_tokens_per_s", "perf/peak_memory_gib",
    *(f"perf/phase/{phase}_s" for phase in PHASE_COLOURS),
    *(f"{prefix}/{name}" for prefix in ("eval", "eval_before") for name in EVALUATED),
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Keys that differ and are switched together, mostly one; ``values`` are A's and B's."""

    name: str
    values: dict[str, tuple[Any, Any]] = field(hash=False)
    rank: str
    why: str
    overrides: tuple[str, ...] = field(hash=False)  # that give A's config B's values

    @property
    def called(self) -> str:
        """``precision (model.dtype, trainer.bf16)``."""
        keys = ", ".join(self.values)
        return self.name if keys == self.name else f"{self.name} ({keys})"


def explain(sweeper: Any) -> None:
    """Search, and say what was found. ``sweeper`` has Hydra's context and launcher and the search's settings."""
    console = Console(highlight=False)
    loader = sweeper.hydra_context.config_loader
    try:
        check_settings(sweeper)
        a, b = ends(overrides_of(sweeper.config), loader)
        config_a, config_b = (loader.load_sweep_config(sweeper.config, each) for each in (a, b))
        validate(config_a)
        validate(config_b)
        units = differing(sweeper, a, config_a, config_b)
    except (ValueError, HydraException) as error:  # Hydra raises both
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        discard(sweeper.config)
        raise SystemExit(2) from None
    show_units(console, units)
    if not units:
        console.print("A and B are one and the same config.", style="bold")
        return discard(sweeper.config)
    if config_a.plan:
        runs = 2 + (sweeper.seeds - 1 if sweeper.tolerance is None else 0)
        console.print(f"{runs} runs, then about {2 * math.ceil(math.log2(len(units) + 1))} probes for a single cause")
        return discard(sweeper.config)
    if identity(compose(sweeper, [*a, *all_of(units)])) != identity(config_b):
        discard(sweeper.config)
        raise SystemExit("A with all of B's values is not B: their groups differ in more than their keys tell")
    search = Search(sweeper, console, a, units)
    search.begin(b, int(config_a.seed))
    if not search.agree:
        search.narrow()
    sentence = search.sentence()
    show_units(console, units, search)
    console.print(f"\n{sentence}", style="bold", soft_wrap=True, markup=False)
    figure = draw(search, Path(sweeper.config.hydra.sweep.dir) / "explain.png")
    console.print(f"\nfigure   {escape(str(figure))}", soft_wrap=True)
    console.print(f"MLflow   {escape(tracking.ui_command(sweeper.config.tracking.uri))}", soft_wrap=True)
    run_id = os.environ[tracking.SWEEP_RUN_ID]
    search.client.log_artifact(run_id, str(figure))
    search.client.set_tag(run_id, "mlflow.note.content", sentence)  # the run's description in MLflow's UI
    end(sweeper.config)


def end(config: DictConfig) -> None:
    """Close the sweep's run here: the table of cells that ends other sweeps would bury the answer."""
    client, _ = tracking.open_store(config.tracking)
    run_id = os.environ.pop(tracking.SWEEP_RUN_ID)
    client.set_tag(run_id, "mlflow.runName", " ".join(["explain", *config.hydra.overrides.task]))
    tracking.close_sweep(client, run_id, tracking.cells_of(client, run_id))


def discard(config: DictConfig) -> None:
    """Remove the sweep's run, which was opened before it was known that nothing would run."""
    client, _ = tracking.open_store(config.tracking)
    client.delete_run(os.environ.pop(tracking.SWEEP_RUN_ID))


def check_settings(sweeper: Any) -> None:
    """Raise ConfigError for a setting that would be found wrong only after A and B have run."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    if not (isinstance(sweeper.seeds, int) and sweeper.seeds >= 2):
        raise ConfigError(
            f"hydra.sweeper.seeds={sweeper.seeds}: it must be an integer of 2 or more, for runs of A to lie apart. "
            "hydra.sweeper.tolerance does without them"
        )
    if sweeper.tolerance is not None and not (number(sweeper.tolerance) and sweeper.tolerance >= 0):
        raise ConfigError(
            f"hydra.sweeper.tolerance={sweeper.tolerance}: it must be a number of 0 or more, in units of "
            f"{sweeper.metric}, or null for A's spread over its seeds"
        )
    if not (number(sweeper.share) and 0 < sweeper.share <= 1):
        raise ConfigError(
            f"hydra.sweeper.share={sweeper.share}: it must be above 0 and not above 1, as in 0.9 for 90 %"
        )
    if sweeper.metric not in METRICS:
        client, experiment_id = tracking.open_store(sweeper.config.tracking)
        done = client.search_runs([experiment_id], "attributes.status = 'FINISHED'", max_results=100)
        known = {*METRICS, *(name for run in done for name in run.data.metrics)}
        if sweeper.metric not in known:
            near = difflib.get_close_matches(str(sweeper.metric), sorted(known), n=1)
            raise ConfigError(
                f"hydra.sweeper.metric={sweeper.metric}: no run logs it. "
                + (f"Did you mean {near[0]}?" if near else f"Give one of {', '.join(sorted(known))}")
            )


# ------------------------------------------------------------------------------------------------
# Two configs, and what lies between them


def ends(arguments: Sequence[str], loader: Any) -> tuple[list[str], list[str]]:
    """A's and B's overrides: the first and the second value of each that has two. Raises ConfigError."""
    a, b = [], []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(arguments)):
        values = BasicSweeper.split_arguments([override], max_batch_size=None)[0]
        if len(values) > 2:
            raise ConfigError(f"{override.input_line}: {len(values)} values; explain compares two, as in KEY=A,B")
        a += values[0]
        b += values[-1]
    return a, b


def differing(sweeper: Any, a: list[str], one: DictConfig, other: DictConfig) -> list[Unit]:
    """What differs between two composed configs, ``one`` of A's overrides; what can change the loss comes first."""
    found = _differences(one, other)
    groups: dict[str, list[str]] = {}
    for key in found:
        group = next((name for name, starts in TOGETHER.items() if key.startswith(starts)), None)
        section = key.partition(".")[0]
        if group is None and f"{section}._target_" in found:  # other arguments belong to another function
            group = section
        groups.setdefault(group or key, []).append(key)
    units = []
    for name, keys in groups.items():
        first = min((found[key] for key in keys), key=lambda each: RANKS.index(each.rank))
        left, overrides = found, []
        choice = other.hydra.runtime.choices.get(name)
        if name == "gen" and one.hydra.runtime.choices.gen != choice:
            overrides = [f"gen={choice}"]  # it sets an environment too
            left = _differences(compose(sweeper, [*a, *overrides]), other)
        overrides += [override for key in keys if key in left for override in _overrides(key, *left[key].values)]
        units.append(Unit(name, {key: found[key].values for key in keys}, first.rank, first.why, tuple(overrides)))
    return sorted(units, key=lambda unit: RANKS.index(unit.rank))


def _differences(one: DictConfig, other: DictConfig) -> dict[str, Difference]:
    told = differences([_keys(one), _keys(other)])
    return {each.key: each for each in told if not _follows(one, other, each.key)}


def _follows(one: DictConfig, other: DictConfig, key: str) -> bool:
    """The key only repeats another one, as trainer.seed repeats seed."""
    section, _, last = key.rpartition(".")
    nodes = [OmegaConf.select(cfg, section) if section else cfg for cfg in (one, other)]
    return all(
        isinstance(node, DictConfig) and last in node and OmegaConf.is_interpolation(node, last) for node in nodes
    )


def _keys(cfg: DictConfig) -> dict[str, Any]:
    """``trainer.lmbda`` and the like; a dictionary below is one value."""
    found = {}
    for group, node in substance(cfg).items():
        if isinstance(node, dict):
            found |= {f"{group}.{key}": value for key, value in node.items()}
        else:
            found[group] = node
    return found


def _overrides(key: str, a: Any, b: Any) -> list[str]:
    """The overrides that take a key from A's value to B's."""
    if b is MISSING:
        return [f"++{key}=0", f"~{key}"] if a is None else [f"~{key}"]  # to Hydra a null is not there to be deleted
    # A dictionary would be merged into the one that is there.
    return [*([f"~{key}"] if isinstance(a, dict) else []), f"++{key}={_grammar(b)}"]


def _grammar(value: Any) -> str:
    """A value as Hydra's overrides spell it: JSON, but for the quotes around a dictionary's keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_grammar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_grammar, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def all_of(units: Sequence[Unit]) -> list[str]:
    return [override for unit in units for override in unit.overrides]


def compose(sweeper: Any, overrides: list[str]) -> DictConfig:
    return sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, _last_choice(overrides))


def _last_choice(overrides: Sequence[str]) -> list[str]:
    """Hydra takes one choice a group: the last."""
    choices = {each.partition("=")[0]: each for each in overrides if not each.startswith(("+", "~"))}
    kept = [each for each in overrides if each.startswith(("+", "~"))]
    return [*choices.values(), *kept]


# ------------------------------------------------------------------------------------------------
# The search


def minimal(units: Sequence[Unit], carries: Callable[[list[Sequence[Unit]]], list[bool]], at_once: bool) -> list[Unit]:
    """The smallest set that ddmin finds to carry what all units carry: none of its units can be left out.

    ``carries`` tells of each of several sets; with ``at_once`` all sets of a round are asked about together (they run
    in parallel), otherwise one by one until one does.
    """

    def first(sets: list[Sequence[Unit]]) -> Sequence[Unit] | None:
        for batch in [sets] if at_once else [[each] for each in sets]:
            for each, enough in zip(batch, carries(batch), strict=True):
                if enough:
                    return each
        return None

    units, parts = list(units), 2
    while len(units) > 1:
        borders = [round(i * len(units) / parts) for i in range(parts + 1)]
        subsets = [units[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
        if found := first(subsets):
            units, parts = list(found), 2
        elif parts > 2 and (found := first([[u for u in units if u not in subset] for subset in subsets])):
            units, parts = list(found), parts - 1
        elif parts == len(units):
            break
        else:
            parts = min(len(units), 2 * parts)
    return units


class Search:
    """The runs between A and B and what they measured."""

    def __init__(self, sweeper: Any, console: Console, a: list[str], units: list[Unit]):
        self.sweeper, self.console, self.a, self.units = sweeper, console, a, units
        self.metric, self.tolerance, self.share = sweeper.metric, sweeper.tolerance, sweeper.share
        self.client, self.experiment_id = tracking.open_store(sweeper.config.tracking)
        self.at_once = "BasicLauncher" not in sweeper.config.hydra.launcher._target_
        self.runs: dict[str, str] = {}  # by name, the ids of A, B and the probes
        self.values: dict[str, float | None] = {}
        self.sets: dict[str, Sequence[Unit]] = {}
        self.launched = 0
        self.cause: list[Unit] = []
        self.noise = 0.0

    def begin(self, b: list[str], seed: int) -> None:
        """Run A and B, and A with other seeds where no tolerance is given."""
        again = (
            {} if self.tolerance is not None else {f"A_seed_{seed + i}": seed + i for i in range(1, self.sweeper.seeds)}
        )
        self.run({"A": self.a, "B": b, **{name: [*self.a, f"++seed={value}"] for name, value in again.items()}})
        if failed := [name for name in ("A", "B") if not math.isfinite(self.values[name] or math.nan)]:
            self.fail(f"{' and '.join(failed)} has no {self.metric} to compare ({self.values[failed[0]]})")
        spread = [self.values[name] for name in ("A", *again) if self.values[name] is not None]
        self.noise = self.tolerance if self.tolerance is not None else max(spread) - min(spread)

    def narrow(self) -> None:
        """Find the cause, then what the other keys do without it and what each of its keys does alone."""
        self.cause = minimal(self.units, self.carry, self.at_once)
        rest = [unit for unit in self.units if unit not in self.cause]
        self.probe([each for each in (rest, *([unit] for unit in self.cause)) if each])

    @property
    def gap(self) -> float:
        return self.values["B"] - self.values["A"]

    @property
    def agree(self) -> bool:
        return abs(self.gap) <= self.noise

    def part(self, units: Sequence[Unit]) -> float | None:
        """The part of the gap that A covers with B's values of these units; None where that cannot run."""
        value = self.values.get(self.name(units))
        return None if value is None else (value - self.values["A"]) / self.gap

    def carry(self, sets: list[Sequence[Unit]]) -> list[bool]:
        self.probe(sets)
        # The spread over seeds is wide beside what paired runs differ by: it may not hide half of the gap.
        left = max((1 - self.share) * abs(self.gap), min(self.noise, abs(self.gap) / 2))
        values = [self.values[self.name(each)] for each in sets]
        return [value is not None and abs(value - self.values["B"]) <= left for value in values]

    def name(self, units: Sequence[Unit]) -> str:
        """Short enough for a folder, and the same when the search is called again."""
        if len(units) == len(self.units):
            return "B"
        if len(units) == 1:
            return f"A+{units[0].name}"
        digest = hashlib.sha256(" ".join(sorted(unit.name for unit in units)).encode()).hexdigest()[:4]
        return f"A+{len(units)}_keys_{digest}"

    def probe(self, sets: list[Sequence[Unit]]) -> None:
        """Run A with B's values of each set of units."""
        new = {self.name(units): units for units in sets if self.name(units) not in self.values}
        self.sets |= new
        self.run({name: [*self.a, *all_of(units)] for name, units in new.items()})
        for name, units in new.items():
            part = self.part(units)
            said = "cannot run" if part is None else f"{part:.0%} of the gap"
            keys = escape(", ".join(unit.name for unit in units))
            self.console.print(f"[bold]{escape(name)}[/] ({keys}): {said}", soft_wrap=True)

    def run(self, named: dict[str, list[str]]) -> None:
        """Run what is not finished yet, through the launcher; ``values`` has None where that did not work."""
        cells: dict[str, DictConfig] = {}
        batch = []
        for name, overrides in named.items():
            self.values[name] = None
            # Not named by their overrides: with many keys those are too long for a folder.
            overrides = [*_last_choice(overrides), f'hydra.job.name="{name}"', f'hydra.sweep.subdir="{name}"']
            try:
                cfg = self.sweeper.hydra_context.config_loader.load_sweep_config(self.sweeper.config, overrides)
                validate(cfg)
            except (ConfigError, HydraException) as error:
                self.console.print(f"{name} is no valid config: {error}", style="dim", soft_wrap=True, markup=False)
                continue
            cells[name] = cfg
            batch.append(overrides)
        progress = progress_of(self.client, self.experiment_id, list(cells.values()))
        todo = [o for o, each in zip(batch, progress, strict=True) if each.stage is not Stage.FINISHED]
        before = [each.run for each in progress if each.stage is Stage.FINISHED]
        tracking.share(self.client, os.environ[tracking.SWEEP_RUN_ID], before)
        if todo:
            self.sweeper.launcher.launch(todo, initial_job_idx=self.launched)
            self.launched += len(todo)
        for name, cfg in cells.items():
            run = tracking.find(self.client, self.experiment_id, identity(cfg))
            if run is not None and run.info.status == "FINISHED":
                self.runs[name] = run.info.run_id
                curve = self.curve(name)
                self.values[name] = statistics.fmean(curve.values()) if curve else None

    def curve(self, name: str) -> dict[int, float]:
        history = self.client.get_metric_history(self.runs[name], self.metric)
        return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}

    def fail(self, why: str) -> None:
        self.console.print(f"[red]{escape(why)}[/]", soft_wrap=True)
        raise SystemExit(1)

    def sentence(self) -> str:
        """What was found, in words."""
        a, b = self.values["A"], self.values["B"]
        gap = f"gap of {abs(self.gap):.3g} in {self.metric}"
        over = "the tolerance" if self.tolerance is not None else f"A's own spread over {self.sweeper.seeds} seeds"
        if self.agree:
            told = f"A and B agree: the {gap} ({a:.4g}, {b:.4g}) is not above {over} ({self.noise:.3g})"
            more = " hydra.sweeper.tolerance=0 looks for what makes them differ at all." if self.gap else ""
            return f"{told}.{more}"
        named = " and ".join(f"`{unit.called}`" for unit in self.cause)
        part = 1.0 if len(self.cause) == len(self.units) else self.part(self.cause)
        verb = "explains" if len(self.cause) == 1 else "together explain"
        told = f"{named} {verb} {part:.0%} of the {gap} ({a:.4g} → {b:.4g}; {over}: {self.noise:.3g})"
        rest = [unit for unit in self.units if unit not in self.cause]
        if not rest:
            return f"{told}."
        covered = self.part(rest)
        others = f"the other {len(rest)} differing keys" if len(rest) > 1 else f"`{rest[0].called}`"
        verb = "explain" if len(rest) > 1 else "explains"
        if covered is None:
            return f"{told}; {others} cannot be switched without {'it' if len(self.cause) == 1 else 'them'}."
        return f"{told}; {others} {verb} {'none of it' if abs(covered) < 0.005 else f'{covered:.0%} without that'}."


# ------------------------------------------------------------------------------------------------
# What is shown


def show_units(console: Console, units: Sequence[Unit], search: Search | None = None) -> None:
    """The keys that differ; after a search, those that were found first, with what each carries alone."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for header in ("key", "A", "B"):
        table.add_column(header, overflow="fold")
    if search and not search.agree:
        table.add_column("of the gap", justify="right")
        units = sorted(units, key=lambda unit: unit not in search.cause)
    table.add_column("what it can change", overflow="fold")
    for unit in units:
        found = search is not None and unit in search.cause
        part = search.part([unit]) if found else None
        for number, (key, values) in enumerate(unit.values.items()):
            row = [key, *(str(value) for value in values)]
            if search and not search.agree:
                row.append(("–" if part is None else f"{part:.0%}") if number == 0 and found else "")
            row.append(unit.why if number == 0 else "")
            table.add_row(*map(escape, row), style="bold" if found else None)
    if units:
        console.print()
        console.print(table)


def draw(search: Search, file: Path) -> Path:
    """The curves of A, B, and A with the cause; and how much of the gap every probe covers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    probes = [(name, search.part(units)) for name, units in search.sets.items() if search.part(units) is not None]
    figure, (curves, parts) = plt.subplots(1, 2, figsize=(13, max(4.2, 0.36 * len(probes) + 2)), layout="constrained")
    cause = search.name(search.cause) if search.cause else None
    styles = {
        "A": {"color": "#0072B2", "label": "A", "linewidth": 2},
        "B": {"color": "#D55E00", "label": "B", "linewidth": 2},
        cause: {
            "color": "black",
            "label": f"A with {cause and cause.removeprefix('A+')} of B",
            "linestyle": (0, (2, 2)),
        },
    }
    for name in sorted(search.runs, key=lambda name: name in styles):
        curve = search.curve(name)
        if name.startswith("A_seed"):
            style = {"color": "#0072B2", "alpha": 0.3, "linewidth": 1, "label": "A, other seeds"}
        elif name in styles:
            style = styles[name]
        else:
            continue
        curves.plot(list(curve), list(curve.values()), marker="o" if len(curve) == 1 else None, **style)
    curves.set(title=f"{search.metric}: the gap is {search.gap:+.3g}", xlabel="optimizer step")
    handles = {handle.get_label(): handle for handle in curves.get_legend_handles_labels()[0]}
    curves.legend(handles.values(), handles.keys(), frameon=False)
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.25)

    names = []
    for name, _ in probes:
        keys = [unit.name for unit in search.sets[name]]
        is_rest = not set(search.cause) & set(search.sets[name]) and len(keys) + len(search.cause) == len(search.units)
        names.append(", ".join(keys) if len(keys) < 3 else f"{'the other ' if is_rest else ''}{len(keys)} keys")
    colours = ["black" if name == cause else "#999999" for name, _ in probes]
    bars = parts.barh(range(len(probes)), [100 * part for _, part in probes], color=colours, height=0.6)
    parts.bar_label(bars, fmt="%.0f %%", padding=4)
    parts.margins(x=0.12)
    parts.axvline(100, color="#D55E00", linewidth=1)
    parts.axvline(0, color="#0072B2", linewidth=1)
    title = "Part of the gap that A covers with keys of B" if probes else "No probes: A and B agree"
    lowest = max(len(probes), 1) - 0.5
    parts.set(title=title, xlabel="%", yticks=range(len(probes)), yticklabels=names, ylim=(lowest, -0.5))
    for axes in (curves, parts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
