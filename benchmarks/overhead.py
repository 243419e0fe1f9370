"""What our callbacks, records and timers cost, as a share of a step of half a second.

    python benchmarks/overhead.py

A run of the tiny pair, its steps stretched to half a second by waiting, logs to an MLflow store of its own (SQLite, as
by default). Every function of ours that a bare trainer would not call is timed inside that run. The timers are too
short for that: how often a phase begins is counted, and that many beginnings and ends are timed on their own. (Whole
steps with and without all this differ by less than two equal steps do.) Exits with 1 above the bound.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps

from rich.console import Console
from rich.table import Table
from step import QUIET, in_a_process, make_trainer

STEP_S = 0.5
BOUND = 0.01
STEPS = 40


def measure() -> dict[str, float]:
    """Seconds a step by what they are spent on."""
    os.environ |= QUIET | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    import mlflow
    from transformers import TrainerCallback

    from countdown_kd import gold
    from countdown_kd.checkpoint import Checkpoints
    from countdown_kd.perf import StepClock
    from countdown_kd.record import RecordSteps

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    class Stretch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(max(0, STEP_S - (time.perf_counter() - self.start)))

    class CountingClock(StepClock):
        entered = 0

        def enter(self, phase: str) -> None:
            self.entered += bool(self._phases)
            super().enter(phase)

    folder = tempfile.mkdtemp()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    trainer, _ = make_trainer(f"trainer.max_steps={STEPS}", "trainer.lmbda=1.0")
    trainer.clock.__class__ = CountingClock
    for name in ("fingerprints", "rollout_lengths"):
        setattr(gold, name, timed("batches and rollouts looked at", getattr(gold, name)))
    steps = RecordSteps()
    for callback, name in ((steps, "metrics to MLflow"), (Checkpoints(trainer), "asked to stop?")):
        for event in ("on_log", "on_step_end"):
            setattr(callback, event, timed(name, getattr(callback, event)))
        trainer.add_callback(callback)
    for event in ("on_step_begin", "on_step_end"):
        setattr(trainer.clock, event, timed("timers", getattr(trainer.clock, event)))
    trainer.add_callback(Stretch())
    with mlflow.start_run(log_system_metrics=False):
        trainer.train()
        timed("metrics to MLflow", steps.write)()
    found = {name: seconds / STEPS for name, seconds in spent.items()}

    clock = StepClock()
    clock.on_step_begin(None, None, None)
    entered = round(trainer.clock.entered / STEPS)
    costs = []
    for _ in range(20):
        start = time.perf_counter()
        for i in range(entered):
            with clock.phase("student" if i % 2 else "teacher"):  # never the phase it is in: every one is a cut
                pass
        costs.append(time.perf_counter() - start)
    found["timers"] += statistics.median(costs)
    return found


def report(console: Console, found: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """A table; returns a row for a summary: what, the bound, ours, ratio."""
    table = Table(title=f"what a step of {STEP_S} s pays for being watched")
    for header in ("", "ms a step", "share"):
        table.add_column(header, justify="right" if header else "left")
    for name, seconds in sorted(found.items(), key=lambda each: -each[1]):
        table.add_row(name, f"{1000 * seconds:.3f}", f"{seconds / STEP_S:.3%}")
    table.add_section()
    share = sum(found.values()) / STEP_S
    table.add_row("together", f"{1000 * share * STEP_S:.3f}", f"[bold]{share:.3%}[/]")
    console.print(table)
    what = f"records and timers, of a step of {STEP_S} s (bound)"
    return [(what, f"{BOUND:.0%}", f"{share:.2%}", f"{BOUND / share:.1f}")]


def draw(axes, found: dict[str, float]) -> None:
    names, values = zip(*sorted(found.items(), key=lambda each: each[1]), strict=True)
    axes.barh(names, [100 * seconds / STEP_S for seconds in values], color="#009E73", height=0.6)
    axes.axvline(100 * BOUND, color="#D55E00", linestyle="--", label="bound, for all together")
    axes.set(xlabel=f"% of a step of {STEP_S} s", title="Records and timers")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    found = in_a_process(measure)
    report(Console(), found)
    return int(sum(found.values()) > BOUND * STEP_S)


if __name__ == "__main__":
    sys.exit(main())
