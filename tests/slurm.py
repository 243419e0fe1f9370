"""A real Slurm with accounting on this one machine, in a folder of its own, for the tests."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

# munged, slurmctld and slurmd by these names: Debian's binaries called *-wlm lose the GPUs.
DAEMONS = ["munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"]  # in the order of their starts
COMMANDS = ["mariadb-install-db", "sbatch", "srun", "squeue", "sinfo", "sacct", "scancel", "scontrol", "setpriv"]
INSTALL = "apt-get install slurm-wlm munge slurmdbd mariadb-server"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # a user's PATH may lack the daemons' folder
USER = pwd.getpwuid(os.getuid()).pw_name

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port1}
SlurmdPort={port2}
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits until its credential has expired, which by default takes two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port0}
# The socket of munge again: sacct and slurmctld do not look at AuthInfo when they talk to slurmdbd.
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
GresTypes=gpu
# More CPUs and memory than the machine may have.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=20000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port0}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


def installed() -> list[str]:
    """The programs that are missing."""
    return [program for program in DAEMONS + COMMANDS if not shutil.which(program, path=PATH)]


class Cluster:
    """One node that claims 8 CPUs, 20 GB and 2 GPUs; a job in the partition urgent preempts those in main.

    ``env`` is what Slurm's commands need in their environment.
    """

    def __init__(self):
        self.daemons: dict[str, subprocess.Popen] = {}
        self.folder: Path | None = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        # Not below pytest's tmp_path, which can be too long for a Unix socket.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        try:
            self._write()
            for daemon in DAEMONS:
                self.begin(daemon)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        """End the daemons and whatever is left of the jobs, and delete the folder."""
        for daemon in reversed(DAEMONS):
            self.end(daemon)
        if self.folder:
            deadline = time.monotonic() + 20
            while (left := self._left()) and time.monotonic() < deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            shutil.rmtree(self.folder)
            self.folder = None

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def begin(self, daemon: str):
        """Start one daemon (again) and wait until it answers."""
        options, ready = {
            "munged": (
                "--foreground --force --key-file={0}/munge.key --socket={0}/munge.socket --pid-file={0}/munged.pid"
                " --seed-file={0}/munge.seed --log-file={0}/munged.log",
                lambda: connect(self.folder / "munge.socket"),
            ),
            "mariadbd": (
                "--no-defaults --user={1} --datadir={0}/mysql --socket={0}/mysql.socket --pid-file={0}/mariadbd.pid"
                " --skip-networking --innodb-flush-log-at-trx-commit=0",
                lambda: connect(self.folder / "mysql.socket"),
            ),
            "slurmdbd": ("-D", lambda: self.run("sacct")),
            "slurmctld": ("-D", lambda: self.run("squeue")),
            "slurmd": ("-D", self._check_node),
        }[daemon]
        log = self.folder / f"{daemon}.log"
        error = None
        with log.open("a") as out:
            self.daemons[daemon] = process = subprocess.Popen(
                # If the tests get killed, so do the daemons.
                ["setpriv", "--pdeathsig", "TERM", daemon, *options.format(self.folder, USER).split()],
                # MYSQL_UNIX_PORT is the only way to tell slurmdbd which socket.
                env=os.environ | self.env | {"PATH": PATH, "MYSQL_UNIX_PORT": f"{self.folder}/mysql.socket"},
                # slurmstepd inherits the folder, by which _left() knows it; a Ctrl-C is for pytest alone.
                cwd=self.folder, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            try:
                ready()
                return
            except (OSError, RuntimeError, subprocess.TimeoutExpired) as e:
                error = e
            time.sleep(0.1)
        raise RuntimeError(f"{daemon} (exit code {process.poll()}): {error}\n{log.read_text()[-3000:]}")

    def end(self, daemon: str):
        """Stop one daemon."""
        if process := self.daemons.pop(daemon, None):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _check_node(self):
        state = self.run("sinfo", "--Node", "-ho%T %E", "--partition=main").strip()
        if state.split()[0] not in ["idle", "mixed", "allocated"]:
            raise RuntimeError(f"the node is {state}")

    def _write(self):
        for name in ["state", "spool"]:
            (self.folder / name).mkdir()
        for name in ["gpu0", "gpu1"]:
            (self.folder / name).symlink_to("/dev/null")  # Slurm wants a device
        values = free_ports() | {"folder": self.folder, "user": USER, "host": socket.gethostname().split(".")[0]}
        for name, text in {
            "slurm.conf": SLURM_CONF,
            "slurmdbd.conf": SLURMDBD_CONF,
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # v2 wants systemd
            "gres.conf": "Name=gpu File={folder}/gpu[0-1]\n",
        }.items():
            (self.folder / name).write_text(text.format(**values))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        done = subprocess.run(
            [shutil.which("mariadb-install-db", path=PATH), "--no-defaults", f"--user={USER}", "--skip-test-db",
             f"--datadir={self.folder}/mysql", "--auth-root-authentication-method=normal"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"mariadb-install-db failed:\n{done.stdout}{done.stderr}")

    def _left(self) -> list[int]:
        """The processes of this cluster; slurmstepd is no child of slurmd and outlives it, and so do the jobs."""
        left = []
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone, or someone else's
                if mark in (process / "environ").read_bytes() or (process / "cwd").readlink() == self.folder:
                    left.append(int(process.name))
        return left


def connect(path: Path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:  # all open at once, else they could be the same one
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        return {f"port{i}": server.getsockname()[1] for i, server in enumerate(servers)}


@pytest.fixture(scope="session")
def slurm():
    """A running Cluster."""
    if missing := installed():
        message = f"Slurm is not installed: no {', '.join(missing)}; {INSTALL}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with Cluster() as cluster:
        yield cluster
