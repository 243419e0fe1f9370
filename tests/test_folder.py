"""A folder is one cell's, and a lock is one process's, on any file system."""

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from countdown_kd.launching import lock as locks
from countdown_kd.launching.folder import FolderTaken, claim, is_held, owner
from countdown_kd.launching.lock import Lock


def test_a_folder_is_its_first_cells_also_when_nothing_runs_there(tmp_path):
    folder = tmp_path / "exp"
    claim(folder, "one", "seed-1", "run1").release()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FolderTaken, match=r"belongs to seed-1 \(run run1\), .* Give seed-2"):
        claim(folder, "two", "seed-2")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before, "nothing was written"
    claim(folder, "one", "seed-1", "run2").release()
    assert owner(folder)["run_id"] == "run2"


def test_a_folder_that_is_held_is_refused_with_who_holds_it(tmp_path):
    held = claim(tmp_path, "one", "seed-1", "run1")
    assert is_held(tmp_path)
    with pytest.raises(FolderTaken, match=f"seed-1 is running already, in .* \\(process {os.getpid()} on "):
        claim(tmp_path, "one", "seed-1")
    held.release()
    assert not is_held(tmp_path)
    claim(tmp_path, "one", "seed-1").release()


def test_a_folder_of_an_unknown_run_is_nobodys_to_take(tmp_path):
    (tmp_path / "cell.yaml").write_text("from before there were locks")
    with pytest.raises(FolderTaken, match="belongs to another run"):
        claim(tmp_path, "one", "seed-1")


def hold_and_die(file, held):
    lock = Lock(file)
    assert lock.acquire()
    held.set()
    time.sleep(60)


@pytest.fixture(params=["with locks", "without locks"])
def file_system(request, monkeypatch):
    """One that has locks, and one that answers as some network file systems do."""
    if request.param == "without locks":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_a_lock_is_held_by_one_and_free_once_its_process_is_dead(file_system, tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold_and_die, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(30)
    lock = Lock(tmp_path / "lock")
    assert lock.is_held() and not lock.acquire()
    process.kill()
    process.join()
    assert not lock.is_held() and lock.acquire()
    assert Lock(tmp_path / "lock").is_held()
    lock.release()
    assert not lock.is_held()


def test_looking_at_a_lock_keeps_nobody_from_taking_it(file_system, tmp_path):
    looking = f"""
import sys; sys.path.insert(0, {str(locks.__file__).rpartition("/countdown_kd")[0]!r})
from pathlib import Path
from countdown_kd.launching.lock import Lock
print(flush=True)
while True:
    Lock(Path({str(tmp_path / "lock")!r})).is_held()
"""
    process = subprocess.Popen([sys.executable, "-c", looking], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        for _ in range(30):
            lock = Lock(tmp_path / "lock")
            assert lock.acquire()
            lock.release()
    finally:
        process.kill()
        process.communicate()


def test_without_locks_another_machine_is_alive_as_long_as_its_heart_beats(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "lock").touch()
    heartbeat = tmp_path / "lock.held"
    heartbeat.write_text(json.dumps(["another-machine", 1, "token"]))
    lock = Lock(tmp_path / "lock")
    assert lock.is_held() and not lock.acquire()
    long_ago = time.time() - locks.DEAD_AFTER_S - 1
    os.utime(heartbeat, (long_ago, long_ago))
    assert not lock.is_held() and lock.acquire()
    assert json.loads(heartbeat.read_text())[1] == os.getpid()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock", "lock.held"]
