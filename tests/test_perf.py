"""Where a step's time goes; the clock inside a trainer is looked at in test_gold.py."""

import json

import torch

from countdown_kd import perf


def test_peak_memory_is_in_gib():
    held = torch.ones(2**26, device="cuda" if torch.cuda.is_available() else "cpu")  # a quarter of a GiB
    assert held.nbytes / 2**30 < perf.peak_memory_gib() < 64


def test_every_process_of_a_run_has_a_warm_up_of_its_own_that_does_not_count():
    """Two interruptions; a checkpoint keeps the clock as JSON."""
    clock = perf.StepClock()
    for begun, seconds in enumerate([[9.0, 9.0, 9.0, 1.0, 3.0], [8.0, 8.0, 8.0, 2.0], [7.0, 7.0, 7.0, 1.0, 3.0]]):
        if begun:
            kept = json.loads(json.dumps(clock.state()))
            clock = perf.StepClock()
            clock.load_state(kept)
        clock.step_s += seconds
        clock.phase_s += [{phase: 0.0 for phase in perf.PHASES} | {"generate": each / 2} for each in seconds]
        clock.rollout_tokens += [100 if each > 3 else 10 for each in seconds]
    metrics = clock.metrics(samples_per_step=4)
    assert metrics["perf/s_per_it"] == 2.0 and metrics["perf/samples_per_s"] == 2.0
    assert metrics["perf/phase/generate_s"] == 1.0 and metrics["perf/rollout_tokens_per_s"] == 10.0
