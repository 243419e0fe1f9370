"""What a command would run, as launch.py prints it over a store in which some cells are done or begun."""

import pytest

from countdown_kd import tracking
from countdown_kd.config import identity
from countdown_kd.launching.folder import claim, mark_whole
from countdown_kd.launching.states import State

ANYWAY = "trainer.learning_rate=1e-4"


@pytest.fixture
def plan(launch):
    """``plan(...)``: the lines that a plan prints. No Slurm answers here, also where one is installed."""
    launch.environment = {"PATH": "/nowhere", "COLUMNS": "160"}

    def printed(*arguments: str) -> list[str]:
        result = launch(*arguments, "plan=true")
        assert result.returncode == 0, result.stderr
        return [" ".join(line.split()) for line in result.stdout.splitlines()]

    return printed


def test_a_plan_says_of_every_cell_how_far_it_is_and_counts_what_is_left(cell, launch, plan):
    seeds = {seed: cell(f"seed={seed}", ANYWAY) for seed in range(1, 6)}
    done = launch.put(seeds[1], State.FINISHED, metrics={"eval/accuracy": 0.525})
    begun = launch.folder / "begun"
    stopped = launch.put(seeds[2], State.STOPPED, folder=begun)
    for step, run_id in ((8, stopped), (10, stopped), (12, None), (14, "another run's")):
        (begun / f"checkpoint-{step}").mkdir()
        if run_id:
            mark_whole(begun / f"checkpoint-{step}", run_id, code="", state={})
    launch.put(seeds[3], State.FAILED, "exit code 1")  # on another machine
    running = launch.put(seeds[4], State.RUNNING, folder=launch.folder / "running")
    launch.put(seeds[5], State.PENDING, folder=launch.folder / "queued", **{tracking.JOB_TAG: "12_0"})

    held = claim(launch.folder / "running", identity(seeds[4]), "cell", running)
    lines = plan("-m", "seed=1,2,3,4,5,6", ANYWAY)
    held.release()
    assert lines[0] == "In every cell: trainer.learning_rate=0.0001", "and not again in every row"
    todo = [
        f"done, 52 % solved (run {done[:8]})", "go on from step 10 (stopped)",
        "run again (failed (exit code 1), its folder is not here)", f"under way (run {running[:8]})",
        "under way (Slurm job 12_0)", "run",
    ]  # fmt: skip
    for number, (row, what) in enumerate(zip(lines[3:-1], todo, strict=True)):
        assert row.startswith(f"{number} {what} seed-{number + 1} ") and "learning_rate" not in row
    assert lines[-1] == "3 of 6 cells would run."


def test_the_plan_of_one_cell_has_all_its_changes_beside_what_is_wrong_with_it(plan):
    lines = plan("trainer.num_generations=5", "precision=bf16")
    assert not any("In every cell" in line for line in lines)
    text = " ".join(lines)
    assert "invalid: 5 rollouts of" in text and "trainer.bf16=True" in text and "trainer.num_generations=5" in text
    assert lines[-1] == "0 of 1 cells would run; 1 invalid: nothing would."
