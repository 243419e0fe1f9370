"""Where the time of an optimizer step goes, at the cost of reading a clock.

A step is one line of time, cut where the phase changes; a phase that begins inside another pauses it, so the
phases add up to the step. On a GPU the cuts are CUDA events on the current stream, read once a step: nothing waits
for the device in between. Phases:

    generate   sampling the student            loss       what else compute_loss does: the teacher's tokens,
    sync       pushing weights to vLLM                    alignment, the ULD loss itself
    student    the student's forward pass      backward   what else training_step does
    teacher    the teacher's                   optimizer  clipping, the update, the schedule

Not covered: waiting for the next batch, evaluation, checkpoints and logging lie outside a step.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from transformers import TrainerCallback

PHASES = ("generate", "sync", "student", "teacher", "loss", "backward", "optimizer")
WARMUP_STEPS = 3  # left out of every figure: first calls allocate, compile and fill caches


class StepClock(TrainerCallback):
    """Times optimizer steps as a trainer callback; ``phase`` and ``watch`` say what happens inside them.

    ``steps_per_rollout`` steps share the time of their rollouts.
    """

    def __init__(self, steps_per_rollout: int = 1) -> None:
        self.steps_per_rollout = steps_per_rollout
        self.step_s: list[float] = []
        self.phase_s: list[dict[str, float]] = []
        self.rollout_tokens: list[int] = []
        self.starts = [0]  # the steps at which a process began: each has a warm-up
        self._cuts: list[tuple[str, float | torch.cuda.Event]] = []
        self._phases: list[str] = []  # innermost last; empty between steps

    def _cut(self, phase: str) -> None:
        if torch.cuda.is_available():
            cut = torch.cuda.Event(enable_timing=True)
            cut.record()
        else:
            cut = time.perf_counter()
        self._cuts.append((phase, cut))

    def enter(self, phase: str) -> None:
        if not self._phases:
            return
        if self._phases[-1] == "generate" and phase == "student":
            phase = "generate"  # generate calls the student once a token
        if phase != self._phases[-1]:
            self._cut(phase)
        self._phases.append(phase)

    def leave(self) -> None:
        if not self._phases:
            return
        phase = self._phases.pop()
        if phase != self._phases[-1]:
            self._cut(self._phases[-1])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def watch(self, module: torch.nn.Module, phase: str) -> None:
        """Count every forward pass of ``module`` as ``phase``."""
        module.register_forward_pre_hook(lambda *_: self.enter(phase))
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._cuts, self._phases = [], ["optimizer"]
        self.rollout_tokens.append(0)
        self._cut("optimizer")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._cut("end")
        self._phases = []
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(self._cuts):
            seconds[phase] += start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start
        self.phase_s.append(seconds)
        self.step_s.append(sum(seconds.values()))

    def state(self) -> dict[str, list]:
        """What a checkpoint has to keep; ``load_state`` takes it up in a new process."""
        return {
            "step_s": self.step_s,
            "phase_s": self.phase_s,
            "rollout_tokens": self.rollout_tokens,
            "starts": self.starts,
        }

    def load_state(self, state: dict[str, list]) -> None:
        self.step_s, self.rollout_tokens = state["step_s"], state["rollout_tokens"]
        self.phase_s = [defaultdict(float, seconds) for seconds in state["phase_s"]]
        self.starts = [*state["starts"], len(self.step_s)]

    def metrics(self, samples_per_step: int) -> dict[str, float]:
        """The ``perf/`` metrics; ``samples_per_step`` is the global batch in sequences. Empty without a step."""
        if not self.step_s:
            return {}
        # Steps that share their rollouts count as one, as long as their mean: else the median would be of steps that
        # sample nothing.
        size = self.steps_per_rollout
        warmup = math.ceil(WARMUP_STEPS / size) * size
        ends = [*self.starts[1:], len(self.step_s)]
        shared = [
            range(first, first + size)
            for start, end in zip(self.starts, ends, strict=True)
            for first in range(start + warmup, end - size + 1, size)
        ]
        # A run too short to have anything but warm-up is measured whole rather than not at all.
        shared = shared or [range(len(self.step_s))]
        counted = [i for each in shared for i in each]
        phases = [self.phase_s[i] for i in counted]
        metrics = {
            "perf/s_per_it": statistics.median(statistics.fmean(self.step_s[i] for i in each) for each in shared),
            # Of all steps: where some sample their sequences and others do not, the median is a step of one kind.
            "perf/samples_per_s": samples_per_step / statistics.fmean(self.step_s[i] for i in counted),
            "perf/peak_memory_gib": peak_memory_gib(),
        }
        for phase in PHASES:
            metrics[f"perf/phase/{phase}_s"] = statistics.fmean(step[phase] for step in phases)
        sampling_s = sum(step["generate"] for step in phases)
        if sampling_s > 0:
            metrics["perf/rollout_tokens_per_s"] = sum(self.rollout_tokens[i] for i in counted) / sampling_s
        return metrics


def peak_memory_gib() -> float:
    """The most memory that this process has held: of the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
