"""A cell's folder, which is one cell's alone, and the checkpoints in it. Imports no torch.

Nothing is written to a folder before its lock is held and says that it is this cell's. The lock's note keeps whose the
folder is after the process has gone.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from countdown_kd.launching.lock import Lock

log = logging.getLogger(__name__)

LOCK = "lock"
CONFIG = "cell.yaml"  # what the cell's process is given
STOP_FILE = "stop"  # asks the run to save a checkpoint and stop
STOPPED_FILE = "stopped"  # the run's answer (torchrun passes on no exit code but 0 and 1)
TIMEOUTS_FILE = "timeouts"  # how often its job has hit the time limit since the cell was submitted
MARKER = "countdown_kd.json"  # in a checkpoint, written last: whose it is, and what it consists of


class FolderTaken(RuntimeError):
    """A folder is another cell's, or its cell runs; the message says whose it is."""


def claim(folder: Path, identity: str, name: str, run_id: str = "") -> Lock:
    """Make a folder this cell's; the lock is the caller's to release.

    ``run_id`` is known where the cell goes on in a folder of its own. Raises FolderTaken, and writes nothing, where the
    folder is another cell's, or where a process holds it.
    """
    check_free(folder, identity, name)
    lock = Lock(folder / LOCK)
    if not lock.acquire():
        raise FolderTaken(f"{lock.note.get('name', name)} is running already, in {folder} ({lock.holder})")
    try:
        check_free(folder, identity, name)  # it may have become another cell's meanwhile
    except FolderTaken:
        lock.release()
        raise
    lock.note = {"identity": identity, "name": name, "run_id": run_id or lock.note.get("run_id", "")}
    return lock


def check_free(folder: Path, identity: str, name: str) -> None:
    """Raise FolderTaken where a folder is another cell's."""
    whose = owner(folder)
    if whose.get("identity", identity) == identity and (whose or not (folder / CONFIG).exists()):
        return
    other = f"{whose['name']} (run {whose['run_id'][:8]})" if whose else "another run"
    raise FolderTaken(
        f"{folder} belongs to {other}, and one folder holds one cell. Give {name} another one (hydra.run.dir, "
        "hydra.sweep.dir, hydra.sweep.subdir), or leave those to their defaults"
    )


def owner(folder: Path) -> dict[str, str]:
    """``identity``, ``name`` and ``run_id`` of the cell whose folder it is; empty where it is nobody's."""
    return Lock(folder / LOCK).note


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder: its cell is alive."""
    return Lock(folder / LOCK).is_held()


# ------------------------------------------------------------------------------------------------
# Checkpoints


def mark_whole(checkpoint: Path, run_id: str, code: str, state: dict) -> None:
    """Write a checkpoint's marker, last and in one piece: without it the checkpoint does not count."""
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
    marker = checkpoint / MARKER
    marker.with_suffix(".tmp").write_text(json.dumps({"run_id": run_id, "code": code, "sizes": sizes, **state}))
    marker.with_suffix(".tmp").rename(marker)


def last_checkpoint(folder: Path, run_id: str) -> Path | None:
    """The newest whole checkpoint of a run in its folder."""
    good = [checkpoint for checkpoint in folder.glob("checkpoint-*") if not fault(checkpoint, run_id)]
    return max(good, key=step_of, default=None)


def fault(checkpoint: Path, run_id: str) -> str:
    """Why a run cannot go on from a checkpoint; empty where it can."""
    try:
        told = json.loads((checkpoint / MARKER).read_text())
    except (OSError, ValueError):
        return "it was never finished"
    if told.get("run_id") != run_id:
        return f"it is run {told.get('run_id', 'unknown')[:8]}'s"
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
    wrong = sorted(name for name in told["sizes"] if sizes.get(name) != told["sizes"][name])
    if wrong:
        name = wrong[0]
        return f"it is damaged: {name} has {sizes.get(name, 0):,} bytes instead of {told['sizes'][name]:,}"
    return ""


def discard_unusable(folder: Path, run_id: str) -> None:
    """Remove, and tell of, checkpoints that the run cannot go on from: Trainer would count them as its own.

    Without any to go on from, what a run before has left is not this run's result.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of):
        if checkpoint.is_dir() and (why := fault(checkpoint, run_id)):
            log.warning("%s is not used: %s", checkpoint.name, why)
            shutil.rmtree(checkpoint)
    if not last_checkpoint(folder, run_id):
        shutil.rmtree(folder / "student", ignore_errors=True)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step after which a checkpoint was saved; 0 without one."""
    number = checkpoint.name.rpartition("-")[2] if checkpoint else "0"
    return int(number) if number.isdigit() else 0


def _files(checkpoint: Path) -> list[Path]:
    return [file for file in checkpoint.rglob("*") if file.is_file() and not file.name.startswith(MARKER[:-5])]
