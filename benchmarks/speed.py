"""How fast a step is, and against what: the whole suite, a table and a figure.

    python benchmarks/speed.py           # half an hour on two CPU cores

The loss alone (loss.py), a whole step by phase (step.py), vLLM's rollouts (rollouts.py), and what watching costs
(overhead.py); each can be run by itself. On a GPU the same command takes the widths of Qwen2.5-1.5B and Qwen3-4B.
Writes speed.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import loss
import overhead
import rollouts
import step
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side (%(default)s)")
    rounds = parser.parse_args().rounds
    console = Console()
    device = "cuda" if step.in_a_process(step.has_gpu) else "cpu"
    watched = step.in_a_process(overhead.measure)
    rows = overhead.report(console, watched)
    with tempfile.TemporaryDirectory() as folder:
        cells = step.cells_here(Path(folder))
        runs = step.collect(cells, rounds)
    rows += step.report(console, cells, runs)
    sampled = rollouts.collect(rounds)
    rows += rollouts.report(console, sampled)
    losses = loss.collect(device=device)
    rows += loss.report(console, losses, f"{loss.COMPLETIONS} completions, {loss.PADDED:,} columns, {device}")

    table = Table(title="ours against TRL's (or what stands in brackets)")
    for header in ("", "TRL", "ours", "times better"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    left, right = above.subplots(1, 2, width_ratios=(3, 2))
    step.draw(left, cells, runs)
    overhead.draw(right, watched)
    *of_loss, last = below.subplots(1, 3)
    loss.draw(of_loss, losses)
    rollouts.draw(last, sampled)
    figure.savefig("speed.png", dpi=120)
    console.print(f"figure   {Path('speed.png').absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main()
