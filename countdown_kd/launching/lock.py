"""An exclusive lock on a file, with a note whose it is. Imports nothing of ours.

The kernel holds it and lets go when we die, on any machine that shares the file system. Where a file system has no
locks, a file beside it tells host and process, and is touched as long as its holder lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

HEARTBEAT_S = 10
DEAD_AFTER_S = 6 * HEARTBEAT_S  # without a heartbeat; a loaded file server may delay some
LOOK_S = 0.5  # a look at a lock (is_held) takes it for a moment: whoever wants it tries again that long


class Lock:
    """``acquire`` and ``release``; also a context manager that waits for the lock."""

    def __init__(self, file: Path):
        self.file = file
        self._heartbeat_file = file.with_name(f"{file.name}.held")
        self._stream = None
        self._released: threading.Event | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another process holds it."""
        deadline = time.monotonic() + LOOK_S
        while not self._try():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def release(self) -> None:
        if self._released:
            self._released.set()
            self._released = None
            self._heartbeat_file.unlink(missing_ok=True)
        if self._stream:
            self._stream.close()
            self._stream = None

    def is_held(self) -> bool:
        """Whether a process holds it, this one included; a lock that nobody ever took is not made."""
        if self._stream:
            return True
        if not self.file.exists():
            return False
        with open(self.file) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return self._heartbeat_alive()
        return False

    @property
    def note(self) -> dict[str, str]:
        """What the last holder has written down; empty where there was none."""
        try:
            return json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}

    @note.setter
    def note(self, note: dict[str, str]) -> None:
        assert self._stream, "only the holder writes"
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(json.dumps({**note, "host": socket.gethostname(), "pid": str(os.getpid())}))
        self._stream.flush()

    @property
    def holder(self) -> str:
        """Who holds it, or held it last: ``process 123 on HOST``."""
        note = self.note
        return f"process {note['pid']} on {note['host']}" if "pid" in note else "another process"

    def __enter__(self) -> Lock:
        while not self.acquire():
            time.sleep(0.2)
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _try(self) -> bool:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(self.file, "a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return False
        except OSError:
            if not self._take_heartbeat():
                stream.close()
                return False
        self._stream = stream
        return True

    def _take_heartbeat(self) -> bool:
        token = json.dumps([socket.gethostname(), os.getpid(), uuid.uuid4().hex])
        try:
            with open(self._heartbeat_file, "x") as file:
                file.write(token)
        except FileExistsError:
            dead = self._heartbeat_token()
            if self._heartbeat_alive():
                return False
            # Of several who find it dead only one can move it away, and only if it is still that one.
            aside = self._heartbeat_file.with_name(f"{self._heartbeat_file.name}.{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                self._heartbeat_file.rename(aside)
                if aside.read_text() != dead:
                    aside.rename(self._heartbeat_file)
                    return False
                aside.unlink()
            return self._take_heartbeat()
        self._released = released = threading.Event()

        def beat() -> None:
            while not released.wait(HEARTBEAT_S):
                with suppress(OSError):
                    os.utime(self._heartbeat_file)

        threading.Thread(target=beat, daemon=True).start()
        return True

    def _heartbeat_token(self) -> str:
        try:
            return self._heartbeat_file.read_text()
        except OSError:
            return ""

    def _heartbeat_alive(self) -> bool:
        try:
            host, pid, _ = json.loads(self._heartbeat_token())
        except ValueError:  # none, or one that is being written just now
            host, pid = "", 0
        if host == socket.gethostname():
            return Path(f"/proc/{pid}").exists()
        # By the file server's clock, not ours.
        probe = self._heartbeat_file.with_name(f"{self._heartbeat_file.name}.{uuid.uuid4().hex}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._heartbeat_file.stat().st_mtime < DEAD_AFTER_S
        except FileNotFoundError:
            return False
        finally:
            probe.unlink(missing_ok=True)
