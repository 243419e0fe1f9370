"""How long a sweep takes to be submitted: from the command to Slurm's job id, for growing numbers of cells.

    python benchmarks/submit.py

Needs Slurm (tests/slurm.py says which packages) and starts one of its own; the jobs are held and never run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from slurm import Cluster, installed  # noqa: E402

CELLS = (1, 10, 100)


def submit(cluster: Cluster, cells: int) -> float:
    """Seconds from the start of launch.py to the line with Slurm's job id; the store is there, the cells are new."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | cluster.env | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        plan = [sys.executable, str(ROOT / "launch.py"), "plan=true"]  # makes the store
        subprocess.run(plan, cwd=folder, env=environment, check=True, capture_output=True)
        seeds = ",".join(map(str, range(cells)))
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, str(ROOT / "launch.py"), "-m", f"seed={seeds}", "hydra/launcher=slurm",
                "hydra.launcher.mem_gb=1", "+hydra.launcher.additional_parameters.hold=true",
            ],
            cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        cluster.run("scancel", "--me")
    if not line.startswith(f"submitted {cells} cells"):
        raise RuntimeError(line)
    return seconds


def main() -> None:
    if missing := installed():
        sys.exit(f"not installed: {', '.join(missing)}")
    table = Table("cells", "seconds to submit (best and worst of 3)")
    with Cluster() as cluster:
        for cells in CELLS:
            times = sorted(submit(cluster, cells) for _ in range(3))
            table.add_row(str(cells), f"{times[0]:.1f} – {times[-1]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
