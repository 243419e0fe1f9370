"""Runs side by side: the table that ends a sweep, and its figure. Imports no torch."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from countdown_kd.countdown import FAILURES
from countdown_kd.tracking import FOLDER_TAG, JOB_TAG, described, ui_command

MOST_LOGS = 10  # how many dead cells' logs a summary shows the end of
LAST_STEPS = 10  # the final loss is their mean: on- and off-policy steps differ several-fold
FEWEST_LOOKS = 6  # at a GPU, ten seconds apart: fewer say nothing of how busy it was
BUSY = 50  # per cent of the time; below it a GPU waits more than it works

# Okabe and Ito's palette, told apart with every kind of colour vision; and one colour a phase, sampling in warm
# colours, models in cold ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
PHASE_COLOURS = {
    "generate": "#D55E00",
    "sync": "#E69F00",
    "student": "#0072B2",
    "teacher": "#56B4E9",
    "loss": "#CC79A7",
    "backward": "#009E73",
    "optimizer": "#999999",
}
FAILURE_COLOURS = dict(zip(FAILURES, ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7"), strict=True))


def show(
    client: MlflowClient,
    cells: list[Run],
    uri: str,
    folder: Path,
    sweep_run_id: str | None = None,
) -> None:
    """Print the cells as a table, draw the figure into ``folder`` and say where everything is."""
    console = Console()
    console.print()
    table = summary_table(client, cells)
    needed = console.measure(table, options=console.options.update(width=500)).maximum
    # A line may be long, but no column is cut off.
    (console if needed <= console.width else Console(width=needed)).print(table)
    console.print(
        f"loss: mean of the last {LAST_STEPS} steps; s/it: median after warm-up; solved: Wilson 95 %",
        style="dim",
    )
    names = swept_params(cells)
    for cell in cells:
        if sentence := idle_gpus(client, cell):
            console.print(f"\n{cell_label(cell, names)}: {sentence}", style="yellow", markup=False, highlight=False)
    dead = [cell for cell in cells if cell.info.status in ("FAILED", "KILLED") and last_lines(log_of(cell))]
    for cell in dead[:MOST_LOGS]:
        show_death(console, cell, cell_label(cell, names))
    if len(dead) > MOST_LOGS:
        console.print(
            f"\n… and {len(dead) - MOST_LOGS} more; python -m countdown_kd status names their logs", style="dim"
        )
    if any("perf/s_per_it" in cell.data.metrics for cell in cells):
        figure = summary_figure(client, cells, folder / "summary.png")
        client.log_artifact(sweep_run_id or cells[0].info.run_id, str(figure))
        print(f"\nfigure   {figure}")
    print(f"MLflow   {ui_command(uri)}")


def show_death(console: Console, cell: Run, label: str) -> None:
    """What became of a cell that did not finish, where its log is, and how that ends."""
    console.print(f"\n[red]{escape(f'{label}: {described(cell)}')}[/]; its log ends with", highlight=False)
    for line in last_lines(log_of(cell)):
        console.print(f"  │ {line}", style="dim", markup=False, highlight=False, overflow="ellipsis", no_wrap=True)
    print(f"  {log_of(cell)}")


def log_of(cell: Run) -> Path:
    """Where to read what a cell said: its Slurm job's log, which has everything, or its own."""
    return Path(cell.data.tags.get(FOLDER_TAG, "")) / ("slurm.log" if JOB_TAG in cell.data.tags else "run.log")


def last_lines(file: Path, count: int = 8) -> list[str]:
    """The end of a log without its progress bars; empty where there is none."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - 20_000))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip() and "%|" not in line][-count:]


def cause_in(log: Path) -> str:
    """The error that a log ends with, ``ValueError: beta must be …``; empty where there is none."""
    lines = last_lines(log, count=200)
    if not (starts := [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]):
        return ""
    after = [line for line in lines[starts[-1] + 1 :] if not line.startswith(" ")]
    return " ".join(after)[:400]


def swept_params(cells: list[Run]) -> list[str]:
    """The params that differ between the cells, in the order they were recorded; all the same: none."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.data.params))
    return [
        name for name in names if name != "global_batch" and len({cell.data.params.get(name) for cell in cells}) > 1
    ]


def cell_label(cell: Run, names: list[str]) -> str:
    """What tells a cell from its neighbours: its name, unless they share it; then the params that differ."""
    return cell.info.run_name if not names else "+".join(f"{name}-{cell.data.params.get(name, '')}" for name in names)


def final_loss(client: MlflowClient, cell: Run) -> float | None:
    """The mean train/loss of the last steps, None for a cell that did not train."""
    history = client.get_metric_history(cell.info.run_id, "train/loss")
    last = sorted(history, key=lambda metric: metric.step)[-LAST_STEPS:]
    return statistics.fmean(metric.value for metric in last) if last else None


def idle_gpus(client: MlflowClient, cell: Run) -> str:
    """What to do about GPUs that waited while the cell trained; empty where they worked, or were not watched.

    MLflow asks the driver every ten seconds in what share of the last moment a GPU ran any kernel at all (NVML's
    ``utilization.gpu``), so a GPU that is busy may still be filled badly. All GPUs that the node shows us are watched.
    """
    watched = [name for name in cell.data.metrics if re.fullmatch(r"system/gpu_\d+_utilization_percentage", name)]
    if not watched or "train/loss" not in cell.data.metrics:
        return ""
    steps = [metric.timestamp for metric in client.get_metric_history(cell.info.run_id, "train/loss")]
    first, last = min(steps), max(steps)
    busy = []  # the share of the time in which it trained, in per cent, of each GPU
    for name in watched:
        looks = client.get_metric_history(cell.info.run_id, name)
        shares = [look.value for look in looks if first <= look.timestamp <= last]
        if len(shares) >= FEWEST_LOOKS:
            busy.append(statistics.fmean(shares))
    idle = [share for share in busy if share < 1]
    waiting = [share for share in busy if 1 <= share < BUSY]
    sentences = []
    if idle:
        remedy = "" if cell.data.params.get("dist") == "ddp" else "; dist=ddp trains on all that it is given"
        sentences.append(f"{len(idle)} of {len(busy)} GPUs did nothing while it trained{remedy}.")
    if waiting:
        phases = {phase: cell.data.metrics.get(f"perf/phase/{phase}_s", 0.0) for phase in PHASE_COLOURS}
        longest = max(phases, key=phases.get)
        if longest == "generate" and cell.data.params.get("gen") == "hf":
            remedy = "gen=vllm samples faster"
        elif longest == "generate":
            remedy = "a larger batch or gen.steps_per_rollout gives it more to sample at once"
        else:
            remedy = "a larger trainer.per_device_train_batch_size gives it more to do at once"
        shares = " to ".join(dict.fromkeys(f"{share:.0f}%" for share in (min(waiting), max(waiting))))
        sentences.append(
            f"{'A GPU' if len(waiting) == 1 else f'{len(waiting)} GPUs'} worked {shares} of the time; "
            f"{phases[longest] / (sum(phases.values()) or 1):.0%} of a step is {longest}: {remedy}."
        )
    return " ".join(sentences)


def summary_table(client: MlflowClient, cells: list[Run], labels: Sequence[str] | None = None) -> Table:
    """A row a cell; s/it never without the batch that an iteration trains. Fits 80 columns for two swept groups.

    ``labels`` name the rows where what was swept does not tell them apart.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    names = swept_params(cells)
    for name in ["run"] if labels else names:
        header = escape(name.removeprefix("trainer."))
        table.add_column(header, overflow="fold", min_width=len(header), max_width=max(24, len(header)))
    for header in ("loss", "s/it", "samples\n/s", "global\nbatch", "peak\nGiB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("solved, %\nbefore → after", min_width=24)
    table.add_column("cut\noff", justify="right", no_wrap=True)

    for number, cell in enumerate(cells):
        metrics = cell.data.metrics

        def shown(name: str, form: str, metrics=metrics) -> str:
            return format(metrics[name], form) if name in metrics else "–"

        loss = final_loss(client, cell)
        before, after = solved(metrics, "eval_before"), solved(metrics, "eval")
        accuracy = f"{before} → {after}" if before and after else after or before or "–"
        if cell.info.status != "FINISHED":
            accuracy = described(cell)  # it has no result to compare, whatever it got to
        row = [labels[number]] if labels else [_short(cell.data.params.get(name, "–")) for name in names]
        row += [
            f"{loss:.4f}" if loss is not None else "–",
            shown("perf/s_per_it", ".2f"),
            shown("perf/samples_per_s", ".1f"),
            cell.data.params.get("global_batch", "–") if loss is not None else "–",
            shown("perf/peak_memory_gib", ".1f"),
            accuracy,
            shown("eval/truncated_frac", ".0%"),
        ]
        table.add_row(*map(escape, row))
    return table


def _short(value: str) -> str:
    """A param as a table has room for it: an optimizer proposes numbers of twenty digits."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def solved(metrics: dict[str, float], prefix: str) -> str:
    """An accuracy with its interval in per cent, ``52 (47–57)``; empty where it was not measured."""
    if f"{prefix}/accuracy" not in metrics:
        return ""
    value, low, high = _percentages(metrics, prefix)
    return f"{value:.0f} ({low:.0f}–{high:.0f})"


def _percentages(metrics: dict[str, float], prefix: str) -> tuple[float, ...]:
    """An accuracy and the two ends of its interval, in per cent."""
    return tuple(100 * metrics[f"{prefix}/{name}"] for name in ("accuracy", "accuracy_low", "accuracy_high"))


def summary_figure(client: MlflowClient, cells: list[Run], file: Path, labels: Sequence[str] | None = None) -> Path:
    """Loss by step, accuracy before and after with intervals, what failed and how, where an iteration's time goes."""
    from matplotlib.figure import Figure

    names = swept_params(cells)
    labels = labels or [cell_label(cell, names) for cell in cells]
    wrap = textwrap.TextWrapper(32, max_lines=3, break_on_hyphens=False).fill
    labels = [wrap(each.replace("+", "+ ")).replace("+ ", "+") for each in labels]  # a name has no space to break at
    rows = range(len(cells))
    figure = Figure(figsize=(13, 4.4 + 0.8 * max(4, len(cells))), layout="constrained")
    (losses, accuracies), (times, failures) = figure.subplots(2, 2)

    for cell, label, colour in zip(cells, labels, cycle(COLOURS)):
        history = sorted(client.get_metric_history(cell.info.run_id, "train/loss"), key=lambda m: m.step)
        if not history:
            continue
        steps, values = [m.step for m in history], [m.value for m in history]
        smooth = [statistics.fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        losses.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        losses.plot(steps, smooth, color=colour, linewidth=1.8, label=label)
    losses.set(title="Training loss (thick: mean of 10 steps)", xlabel="optimizer step", yscale="log")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.grid(alpha=0.25)
    if losses.lines:
        losses.legend(fontsize=8, frameon=False)

    for row, cell, colour in zip(rows, cells, cycle(COLOURS)):
        for prefix, filled, above in (("eval_before", False, 0.12), ("eval", True, -0.12)):  # intervals that overlap
            metrics = cell.data.metrics
            if f"{prefix}/accuracy" not in metrics:
                continue
            value, low, high = _percentages(metrics, prefix)
            accuracies.errorbar(
                value, row - above, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3,
                markersize=7, markerfacecolor=colour if filled else "white",
            )  # fmt: skip
    accuracies.set(
        title="Puzzles solved: ○ before, ● after (95 %)", xlabel="%", xlim=(0, 100),
        yticks=list(rows), yticklabels=labels, ylim=(len(cells) - 0.5, -0.5),
    )  # fmt: skip
    accuracies.grid(axis="x", alpha=0.25)

    starts = [0.0] * len(cells)
    for phase, colour in PHASE_COLOURS.items():
        seconds = [cell.data.metrics.get(f"perf/phase/{phase}_s", 0.0) for cell in cells]
        times.barh(list(rows), seconds, left=starts, color=colour, label=phase, height=0.6)
        starts = [start + s for start, s in zip(starts, seconds, strict=True)]
    for row, cell, end in zip(rows, cells, starts, strict=True):
        if "perf/samples_per_s" in cell.data.metrics:
            rate = cell.data.metrics["perf/samples_per_s"]
            times.text(end, row, f" {rate:.1f} samples/s", va="center", fontsize=9)
    times.set(
        title="Where an iteration's time goes", xlabel="seconds an optimizer step",
        yticks=list(rows), yticklabels=labels, ylim=(len(cells) - 0.5, -0.5),
        xlim=(0, 1.35 * max(starts) or 1),
    )  # fmt: skip
    below = {"fontsize": 8, "frameon": False, "ncols": 4, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    times.legend(**below)

    starts = [0.0] * len(cells)
    for label, colour in FAILURE_COLOURS.items():
        counts = [cell.data.metrics.get(f"eval/failures/{label}", 0.0) for cell in cells]
        failures.barh(list(rows), counts, left=starts, color=colour, label=label, height=0.6)
        starts = [start + n for start, n in zip(starts, counts, strict=True)]
    failures.set(
        title="Answers that fail, and how", xlabel="held-out puzzles",
        yticks=list(rows), yticklabels=[], ylim=(len(cells) - 0.5, -0.5),
    )  # fmt: skip
    failures.xaxis.get_major_locator().set_params(integer=True)
    failures.legend(**below | {"ncols": 2})

    for axes in (losses, accuracies, times, failures):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    return file
