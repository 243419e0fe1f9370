"""What timing the phases of a step costs, as a share of the step.

    python benchmarks/clock.py

Runs real steps of the tiny pair and counts how often a phase begins, then times that many beginnings and ends on
their own. (Whole steps with and without the clock differ by less than two equal steps do.)
"""

import statistics
import sys
import tempfile
import time

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict
from rich.console import Console

from countdown_kd.config import ROOT, register_resolvers
from countdown_kd.gold import CountdownTrainer
from countdown_kd.perf import WARMUP_STEPS, StepClock
from countdown_kd.run import load

BOUND = 0.01


class CountingClock(StepClock):
    entered = 0

    def enter(self, phase: str) -> None:
        self.entered += bool(self._phases)
        super().enter(phase)


def main() -> int:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["trainer.max_steps=20", "trainer.lmbda=1.0"])
    with open_dict(cfg):
        cfg.trainer.output_dir = tempfile.mkdtemp()
    student, tokenizer = load(cfg.model)
    teacher, _ = load(cfg.teacher)
    trainer = CountdownTrainer(
        model=student,
        teacher_model=teacher,
        args=instantiate(cfg.trainer, use_cpu=True),
        gen=cfg.gen,
        step=cfg.step,
        train_dataset=instantiate(cfg.task).conversations(),
        processing_class=tokenizer,
    )
    trainer.clock.__class__ = CountingClock
    trainer.train()
    step_s = statistics.median(trainer.clock.step_s[WARMUP_STEPS:])
    entered = trainer.clock.entered / len(trainer.clock.step_s)

    clock, repeats = StepClock(), 20
    costs = []
    for _ in range(repeats):
        clock.on_step_begin(None, None, None)
        start = time.perf_counter()
        for i in range(round(entered)):
            with clock.phase("student" if i % 2 else "teacher"):  # never the phase it is in: every one is a cut
                pass
        clock.on_step_end(None, None, None)
        costs.append(time.perf_counter() - start)
    share = statistics.median(costs) / step_s
    Console().print(
        f"a step takes {step_s:.3f} s and enters {entered:.0f} phases, which costs "
        f"{1e6 * statistics.median(costs):.0f} µs: {share:.3%} of the step (bound: {BOUND:.0%})"
    )
    return int(share > BOUND)


if __name__ == "__main__":
    sys.exit(main())
