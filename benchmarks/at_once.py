"""Twelve commands at once: does every cell end as itself, and none twice?

    python benchmarks/at_once.py          # ten minutes on two CPU cores

In the same second start: five single cells in the default folder, of which two are the same; three different cells in
one and the same hydra.run.dir, of which one at most may have it; two equal sweeps; and, of a cell that was finished
before, the same command once more and with force=true in its folder. A while later one of the single cells and one
sweep are ended with SIGKILL, and given once more.

Then every finished run is held against its cell run alone: config, seed, steps, losses, weights, all to be equal. Exits
with 1 where one is not, where a cell ran twice, or where a command that was refused was not told why.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from countdown_kd.config import ROOT

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
CELL = ("trainer.max_steps=8", "trainer.per_device_train_batch_size=4", "eval.num_puzzles=20", "trainer.save_steps=2")


class Store:
    """A folder with an MLflow store of its own, in which commands run."""

    def __init__(self, folder: Path):
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        folder.mkdir(parents=True)

    def start(self, *overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *overrides, *CELL],
            cwd=self.folder, env=os.environ | {"MLFLOW_TRACKING_URI": self.uri, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *overrides: str) -> None:
        process = self.start(*overrides)
        _, err = process.communicate()
        if process.returncode:
            sys.exit(f"{' '.join(overrides)} ended with {process.returncode}:\n{err[-2000:]}")

    def cells(self) -> list:
        client = MlflowClient(self.uri)
        (experiment,) = [each for each in client.search_experiments() if each.name == "countdown_kd"]
        return client.search_runs([experiment.experiment_id], "tags.`countdown_kd.kind` = 'cell'")

    def result(self, run) -> dict:
        """What a run recorded, and what lies in its folder."""
        client = MlflowClient(self.uri)
        folder = Path(run.data.tags["countdown_kd.folder"])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        composed = yaml.safe_load(Path(client.download_artifacts(run.info.run_id, "config/composed.yaml")).read_text())
        composed["trainer"].pop("output_dir")
        weights = folder / "student" / "model.safetensors"
        return {
            "config": composed,
            "seed": run.data.params["seed"],
            "losses": sorted((point.step, point.value) for point in history),
            "accuracies": [run.data.metrics.get(f"{name}/accuracy") for name in ("eval_before", "eval")],
            "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:12],
        }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        crowd, alone = (Store(Path(folder) / name) for name in ("crowd", "alone"))
        crowd.run("seed=9", "hydra.run.dir=nine")
        commands = {
            "seed 1": ("seed=1",), "seed 2": ("seed=2",), "seed 3": ("seed=3",), "seed 3 too": ("seed=3",),
            "killed": ("seed=4",), "shared 5": ("seed=5", "hydra.run.dir=shared"),
            "shared 6": ("seed=6", "hydra.run.dir=shared"), "shared 7": ("seed=7", "hydra.run.dir=shared"),
            "sweep": ("-m", "seed=1,8"), "sweep too": ("-m", "seed=1,8"),
            "seed 9 again": ("seed=9",), "seed 9 anew": ("seed=9", "hydra.run.dir=nine", "force=true"),
        }  # fmt: skip
        begun = time.time()
        processes = {name: crowd.start(*overrides) for name, overrides in commands.items()}
        atexit.register(lambda: [process.kill() for process in processes.values()])  # where this ends by an error
        while not any(run.data.params.get("seed") == "4" and run.data.metrics for run in crowd.cells()):
            if processes["killed"].poll() is not None or time.time() > begun + 900:
                sys.exit("the cell that was to be killed has ended before:\n" + processes["killed"].communicate()[1])
            time.sleep(0.2)
        for name in ("killed", "sweep"):
            processes[name].kill()
        ends = {name: (*process.communicate(), process.returncode) for name, process in processes.items()}
        console.print(f"twelve commands: {time.time() - begun:.0f} s")
        for name, (_, err, code) in ends.items():
            refused = ("belongs to" in err, "is running already" in err)
            if code > 0 and not any(refused):
                wrong.append(f"{name} ended with {code}: {err[-500:]}")
            console.print(f"  {name}: {code}{', refused' if any(refused) else ''}", highlight=False)
        for overrides in (commands["killed"], commands["sweep"], commands["seed 9 again"]):
            crowd.run(*overrides)

        runs = crowd.cells()
        finished: dict[str, list] = {}
        for run in runs:
            if run.info.status != "FINISHED":
                wrong.append(f"run {run.info.run_id[:8]} (seed {run.data.params['seed']}) is {run.info.status}")
            finished.setdefault(run.data.params["seed"], []).append(run)
        table = Table(title="each cell against itself alone")
        for header in ("seed", "runs", "steps", "the same"):
            table.add_column(header)
        for seed, own in sorted(finished.items()):
            expected = 2 if seed == "9" else 1  # forced once
            if len(own) != expected:
                wrong.append(f"seed {seed} ran {len(own)} times instead of {expected}")
            alone.run(f"seed={seed}")
            (reference,) = [alone.result(run) for run in alone.cells() if run.data.params["seed"] == seed]
            for run in own:
                found = crowd.result(run)
                if seed == "9" and run is own[-1]:  # the older one's folder holds the newer one's student
                    found["weights"] = reference["weights"]
                apart = [name for name in reference if found[name] != reference[name]]
                wrong += [f"seed {seed}, run {run.info.run_id[:8]}: another {name}" for name in apart]
                table.add_row(
                    seed, run.info.run_id[:8], str(len(found["losses"])), "no: " + ", ".join(apart) if apart else "yes"
                )
        console.print(table)
        if {"5", "6", "7"} & finished.keys() and len({"5", "6", "7"} & finished.keys()) != 1:
            wrong.append("one folder held more than one cell")
    for each in wrong:
        console.print(f"[red]{each}[/]", highlight=False)
    if wrong:
        sys.exit(1)
    console.print("every finished run is that of its own cell, and none ran twice")


if __name__ == "__main__":
    main()
