"""What a cell may be, and what may become of it."""

import pytest
from omegaconf import OmegaConf

from countdown_kd import tracking
from countdown_kd.launching.states import ALIVE, ENDED, MLFLOW_STATUS, TRANSITIONS, State, describe


def test_every_state_has_a_status_and_a_way_out_and_is_reached():
    assert MLFLOW_STATUS.keys() == TRANSITIONS.keys() == set(State)
    reached = {State.PENDING}
    while (further := reached.union(*(TRANSITIONS[state] for state in reached))) != reached:
        reached = further
    assert reached == set(State)


def test_a_result_stays_and_nothing_finishes_that_did_not_run():
    assert TRANSITIONS[State.FINISHED] == {State.FINISHED}
    assert {state for state in State if State.FINISHED in TRANSITIONS[state]} == {State.RUNNING, State.FINISHED}


def test_an_end_is_an_end_for_mlflow_too():
    assert {MLFLOW_STATUS[state] for state in ENDED} == {"FINISHED", "FAILED", "KILLED"}
    assert {MLFLOW_STATUS[state] for state in ALIVE} == {"SCHEDULED", "RUNNING"}


@pytest.mark.parametrize(
    "state, details, words",
    [
        (State.FAILED, "exit code 1", "failed (exit code 1)"),
        (State.KILLED, "SIGKILL", "killed by SIGKILL"),
        (State.KILLED, "", "killed"),
        (State.STOPPING, "", "stopped"),
        (State.TIMING_OUT, "no requeue", "timed out (no requeue)"),
        (State.PREEMPTED_REQUEUED, "", "preempted, goes on"),
    ],
)
def test_a_state_in_words(state, details, words):
    assert describe(state, details) == words


def test_a_state_that_a_cell_cannot_come_to_is_not_written_but_told(tmp_path, caplog):
    store = OmegaConf.create({"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "countdown_kd"})
    client, experiment_id = tracking.open_store(store)
    run_id = tracking.start_run(client, experiment_id, "cell", "cell")

    def now():
        run = client.get_run(run_id)
        return run.info.status, tracking.described(run)

    assert now() == ("SCHEDULED", "pending")
    tracking.set_state(client, run_id, State.FINISHED)
    assert now() == ("SCHEDULED", "pending") and "it cannot become finished" in caplog.text
    tracking.set_state(client, run_id, State.RUNNING)
    tracking.set_state(client, run_id, State.FINISHED)
    tracking.set_state(client, run_id, State.KILLED, "SIGTERM")
    assert now() == ("FINISHED", "finished") and client.get_run(run_id).info.end_time
