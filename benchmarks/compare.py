"""How long `python -m countdown_kd compare RUN RUN` takes for two runs with 10,000 predictions each.

    python benchmarks/compare.py

Writes two runs into a new SQLite store, with made-up configs, losses and answers, and times the real command from its
start to its last table and to its end, with the figure drawn. Exits with code 1 if the last table takes 5 s or more
(median).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from countdown_kd import tracking
from countdown_kd.countdown import CORRECT, FAILURES, public_puzzles

PUZZLES, STEPS, KEYS, RUNS = 10_000, 500, 200, 7
BOUND_S = 5


def make_run(client: MlflowClient, experiment_id: str, seed: int) -> str:
    """A finished run with everything that a cell logs; of the configs' keys every tenth differs between seeds."""
    rng = random.Random(seed)
    run_id = tracking.start_run(client, experiment_id, f"seed={seed}", "cell", {"seed": str(seed)})
    config = {f"key_{i}": i + seed * (i % 10 == 0) for i in range(KEYS)}
    client.log_dict(run_id, {"trainer": config, "seed": seed}, "config/effective.yaml")
    losses = [Metric("train/loss", rng.random(), int(time.time() * 1000), step) for step in range(1, STEPS + 1)]
    client.log_batch(run_id, metrics=losses)
    batches = [[[f"{rng.getrandbits(64):x}"] * 2 for _ in range(16)] for _ in range(STEPS)]
    client.log_dict(run_id, {"on_policy": [[True]] * STEPS, "batches": batches}, "on_policy_draws.json")
    rows = []
    for puzzle in islice(public_puzzles(seed=0), PUZZLES):
        completion = "<think>" + f"Let me try {puzzle.target} + {rng.random()}. " * 15 + "</think>\n<answer>1</answer>"
        label = rng.choice((CORRECT, *FAILURES))
        rows.append([list(puzzle.numbers), puzzle.target, label, "", completion, len(completion) // 3, False])
    columns = ["numbers", "target", "label", "detail", "completion", "tokens", "truncated"]
    client.log_text(run_id, json.dumps({"columns": columns, "data": rows}), "eval_predictions.json")
    solved = sum(row[2] == CORRECT for row in rows) / PUZZLES
    for name, value in (("accuracy", solved), ("accuracy_low", solved - 0.01), ("accuracy_high", solved + 0.01)):
        client.log_metric(run_id, f"eval/{name}", value)
    for label in FAILURES:
        client.log_metric(run_id, f"eval/failures/{label}", sum(row[2] == label for row in rows))
    tracking.end_run(client, run_id, "FINISHED", "finished")
    return run_id


def compare(runs: list[str], folder: str, uri: str) -> tuple[float, float]:
    """Seconds to the last table, and to the end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "countdown_kd", "compare", *runs],
        cwd=folder, env=os.environ | {"MLFLOW_TRACKING_URI": uri}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    times = {line: time.perf_counter() - start for line in process.stdout}
    process.wait()
    whole = time.perf_counter() - start
    if process.returncode or "McNemar" not in "".join(times):
        raise RuntimeError("".join(times))
    return max(seconds for line, seconds in times.items() if "figure" not in line and line.strip()), whole


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        client, experiment_id = tracking.open_store(OmegaConf.create({"uri": uri, "experiment": "countdown_kd"}))
        runs = [make_run(client, experiment_id, seed) for seed in (1, 2)]
        size = sum(file.stat().st_size for file in Path(folder).rglob("eval_predictions.json")) / 1e6
        compare(runs, folder, uri)  # once before: files that the system has not read yet would count
        told, whole = zip(*(compare(runs, folder, uri) for _ in range(RUNS)), strict=True)
    table = Table("seconds", "min", "median", "max", title=f"2 runs, {PUZZLES:,} answers each, {size:.0f} MB in all")
    for name, times in (("to the last table", told), ("to the end", whole)):
        table.add_row(name, *(f"{each:.2f}" for each in (min(times), statistics.median(times), max(times))))
    Console().print(table)
    return int(statistics.median(told) >= BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
