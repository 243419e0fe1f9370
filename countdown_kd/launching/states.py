"""What a cell may be, and what may become of it. Imports nothing.

A state is stored as a tag of the cell's MLflow run, with details (an exit code, why it waits) in a tag beside it; the
run's own status follows from it. Words for people are made of both (``describe``) and never read back.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    PENDING = "pending"  # opened, waiting for its turn or for Slurm
    STARTING = "starting"  # its job runs, its own process does not yet
    RUNNING = "running"
    # Its process has stopped because Slurm asked for it, with a checkpoint; what its job ends as is for Slurm to say.
    STOPPING = "stopping"  # by SIGTERM, which does not tell a cancellation from a preemption
    TIMING_OUT = "timing out"
    PREEMPTING = "preempting"
    # Queued again, to go on from its checkpoint.
    STOPPED_REQUEUED = "stopped, goes on"
    TIMED_OUT_REQUEUED = "timed out, goes on"
    PREEMPTED_REQUEUED = "preempted, goes on"
    # Ends.
    FINISHED = "finished"
    FAILED = "failed"
    FAILED_TO_START = "failed to start"  # its job ended before its process began
    KILLED = "killed"
    OUT_OF_MEMORY = "out of memory"
    NODE_FAILED = "node failed"
    TIMED_OUT = "timed out"
    PREEMPTED = "preempted"
    STOPPED = "stopped"  # asked to by Ctrl-C or SIGTERM, with a checkpoint
    CANCELLED = "cancelled"
    NEVER_STARTED = "never started"
    LOST = "lost"  # Slurm does not know its job any more


# What a stopping cell is once its job has ended, and what it is where its job is queued again.
ENDS_AS = {
    State.STOPPING: State.STOPPED,
    State.TIMING_OUT: State.TIMED_OUT,
    State.PREEMPTING: State.PREEMPTED,
}
REQUEUES_AS = {
    State.STOPPING: State.STOPPED_REQUEUED,
    State.TIMING_OUT: State.TIMED_OUT_REQUEUED,
    State.PREEMPTING: State.PREEMPTED_REQUEUED,
}
WAITING = {State.PENDING, *REQUEUES_AS.values()}
ALIVE = {*WAITING, State.STARTING, State.RUNNING, *ENDS_AS}
ENDED = set(State) - ALIVE
BEGUN = set(State) - {State.PENDING, State.STARTING, State.NEVER_STARTED, State.FAILED_TO_START}

# MLflow's status of a run, the only place where one is made of the other.
MLFLOW_STATUS = (
    dict.fromkeys(WAITING, "SCHEDULED")
    | dict.fromkeys(ALIVE - WAITING, "RUNNING")
    | dict.fromkeys(ENDED, "KILLED")
    | {State.FINISHED: "FINISHED", State.FAILED: "FAILED", State.FAILED_TO_START: "FAILED"}
)

_AFTER_WAITING = {State.STARTING, State.RUNNING, *ENDED - {State.FINISHED}}
TRANSITIONS: dict[State, set[State]] = {
    **{state: {*WAITING, *ENDS_AS, *_AFTER_WAITING} for state in WAITING},  # a job may be preempted before it begins
    State.STARTING: {*ALIVE, *ENDED - {State.FINISHED}},
    State.RUNNING: {*ALIVE - {State.STARTING}, *ENDED},  # pending: a job that an administrator has queued again
    **{state: {*ALIVE, *ENDED - {State.FINISHED}} for state in ENDS_AS},
    # An end may be told more exactly, once Slurm has said what it was, and may be gone on from. A result stays.
    **{state: {State.PENDING, State.RUNNING, *ENDED - {State.FINISHED}} for state in ENDED},
    State.FINISHED: {State.FINISHED},
}


def describe(state: State, details: str = "") -> str:
    """In a person's words: ``failed (exit code 1)``, ``killed by SIGKILL``."""
    word = str(ENDS_AS.get(state, state))
    if not details:
        return word
    return f"{word} by {details}" if state is State.KILLED else f"{word} ({details})"
