"""What a composed config must satisfy, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from countdown_kd.countdown import RULES

ROOT = Path(__file__).resolve().parent.parent  # where conf/, sweeps/ and launch.py lie


class ConfigError(ValueError):
    """The user's mistake, told before anything expensive starts; one line a problem."""


def register_resolvers() -> None:
    """Make ``${repo:PATH}`` and ``${package:PATH}`` absolute paths, from whatever folder a run is started.

    ``${name:TEXT}`` is the text as the name of a cell and its folder.
    """
    for name, base in (("repo", ROOT), ("package", ROOT / "countdown_kd")):
        OmegaConf.register_new_resolver(name, lambda path="", base=base: str(base / (path or "")), replace=True)
    OmegaConf.register_new_resolver("name", name_of, replace=True)


LONGEST_NAME = 120  # characters; file systems take 255 bytes, and a folder's name has a number before it


def name_of(text: str) -> str:
    """A name that neither a shell nor Hydra wants quoted; what does not fit is a hash: ``precision-bf16+gen-hf``."""
    name = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# What a cell's result does not depend on: how it is started, where things go, what is written down, who is told.
LAUNCHERS_PART = {"hydra", "tracking", "force", "plan"}
NOT_IN_TRAINER = re.compile(
    "output_dir|logging_(?!nan).*|log_.*|save_.*|report_to|run_name|project|trackio_.*|disable_tqdm|hub_.*|push_to_hub.*"
)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """What a cell's process is told: the composed config without the launcher's part, resolved."""
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in cfg.items()
        if key not in LAUNCHERS_PART
    }


def substance(cfg: DictConfig) -> dict[str, Any]:
    """The part of a composed config that matters to the cell's result, resolved."""
    kept = plain(cfg)
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if not NOT_IN_TRAINER.fullmatch(key)}
    return kept


def identity(cfg: DictConfig) -> str:
    """What a cell is known by: a hash (16 hex digits) of its substance.

    A local file or folder counts by what is in it, not by where it lies, so the same cell has the same identity from
    another folder and on another machine. Code and library versions do not count: whoever wants a cell again after a
    change says ``force=true``.
    """
    text = json.dumps(_by_content(substance(cfg)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _by_content(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _by_content(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [_by_content(value) for value in node]
    if isinstance(node, str) and key.endswith(("path", "file")) and Path(node).expanduser().exists():
        return _digest(Path(node).expanduser().resolve())
    return node


@cache
def _digest(path: Path) -> str:
    """A hash of a file or of all files below a folder. Of a large file every 64th MiB and the last are read."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with open(file, "rb") as stream:
            step = 1 if size <= 64 * 2**20 else 64
            for start in [*range(0, size, step * 2**20), max(0, size - 2**20)]:
                stream.seek(start)
                digest.update(stream.read(2**20))
    return digest.hexdigest()


def validate(cfg: DictConfig) -> None:
    """Raise ConfigError with every problem found in a cell's composed config."""
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(cfg: DictConfig) -> Iterator[str]:
    missing = [
        f"{group}.{key}"
        for group, node in cfg.items()
        if group != "hydra" and isinstance(node, DictConfig)
        for key in node
        if OmegaConf.is_missing(node, key)
    ]
    if missing:
        yield f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE"
        return

    for key in cfg.trainer:
        if key != "_target_" and key not in gold_config_fields():
            close = difflib.get_close_matches(key, gold_config_fields(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"trainer.{key}: GOLDConfig has no such field{hint}"

    trainer = cfg.trainer
    for key in ("hub_token", "push_to_hub_token"):
        if trainer.get(key):
            yield f"trainer.{key}: configs are stored and shown; set HF_TOKEN in the environment instead"
    if trainer.get("bf16") and cfg.model.dtype == "bfloat16":
        yield (
            "trainer.bf16=true over model.dtype=bfloat16: autocast wants fp32 weights, or small updates are rounded "
            "away. Use precision=bf16 (fp32 weights, bf16 arithmetic) or precision=bf16_pure (no autocast)"
        )
    sequences = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    prompts = trainer.get("generation_batch_size") or sequences // trainer.num_generations
    if prompts * trainer.num_generations != sequences:
        yield (
            f"{trainer.num_generations} rollouts of {prompts} prompts (trainer.num_generations, "
            f"generation_batch_size) are not the {sequences} sequences of an optimizer step "
            f"(per_device_train_batch_size {trainer.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{trainer.gradient_accumulation_steps}). Make num_generations a divisor of {sequences}"
        )

    if trainer.get("save_total_limit") == 1:
        yield (
            "trainer.save_total_limit=1: the only checkpoint is removed before the next one is whole, and a run "
            "that is killed just then starts over. Set it to 2 or more, or null"
        )

    if trainer.use_vllm and importlib.util.find_spec("vllm") is None:
        yield "gen=vllm: vLLM is not installed. Run `make setup`, pip install vllm, or use gen=hf"
    if not trainer.use_vllm:
        samples_in = "bfloat16" if trainer.get("bf16") else cfg.model.dtype
        if cfg.gen.dtype != samples_in:
            yield (
                f"gen.dtype={cfg.gen.dtype}: with gen=hf the student itself samples, in {samples_in}. "
                "Leave gen.dtype to precision=, or use gen=vllm"
            )

    ahead = cfg.gen.steps_per_rollout
    if not (isinstance(ahead, int) and ahead > 0):
        yield f"gen.steps_per_rollout={ahead}: it must be a positive integer, or 1 for a rollout every step"

    step = cfg.step
    for key, off in (("chunked_logits", "false"), ("teacher_batch_size", "null")):
        if step[key] and not step.fused_loss:
            yield f"step.{key}={step[key]}: TRL's loss wants whole logits. Set step.{key}={off} or step.fused_loss=true"
    for key in ("teacher_batch_size", "student_batch_size"):
        size = step[key]
        if size is not None and not (isinstance(size, int) and size > 0):
            yield f"step.{key}={size}: it must be a positive integer, or null"

    for group in ("model", "teacher"):
        yield from _model_problems(group, cfg[group].pretrained_model_name_or_path)

    if cfg.baseline not in (None, "student", "teacher"):
        yield f"baseline={cfg.baseline}: it must be student, teacher or null"
    if cfg.eval.rule not in RULES:
        yield f"eval.rule={cfg.eval.rule}: it must be {' or '.join(RULES)}"
    for key in ("num_puzzles", "max_new_tokens", "batch_size"):
        if not isinstance(cfg.eval[key], int) or cfg.eval[key] < 1:
            yield f"eval.{key}={cfg.eval[key]}: it must be a positive integer"
    if trainer.get("max_length") and cfg.eval.max_new_tokens >= trainer.max_length:
        yield (
            f"eval.max_new_tokens={cfg.eval.max_new_tokens} leaves no room for a prompt in "
            f"trainer.max_length={trainer.max_length}"
        )
    ranks = cfg.dist.nproc_per_node
    if ranks != "gpu" and not (isinstance(ranks, int) and ranks > 0):
        yield f"dist.nproc_per_node={ranks}: it must be gpu or a positive integer"

    if cfg.task._target_ == "countdown_kd.data.jsonl":
        from countdown_kd.data import jsonl

        try:
            jsonl(cfg.task.train_file, cfg.task.test_file, cfg.task.num_test)
        except ValueError as error:
            yield str(error)


def _model_problems(group: str, name: str) -> Iterator[str]:
    # A hub name is OWNER/NAME; whatever else has a slash, or starts like a path, is meant as a local folder.
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not (path / "config.json").is_file():
        what = "has no config.json" if path.exists() else "does not exist"
        yield f"{group}.pretrained_model_name_or_path={name}: the folder {what}"


@cache
def gold_config_fields() -> frozenset[str]:
    """The field names of TRL's GOLDConfig, read from the installed source.

    Importing the class takes half a minute on a small machine and pulls in torch and vLLM; the names of its fields
    take milliseconds. Raises ConfigError where TRL or transformers is not installed.
    """
    sources = {
        "trl": (
            "experimental/gold/gold_config.py",
            "trainer/sft_config.py",
            "trainer/base_config.py",
        ),
        "transformers": ("training_args.py",),
    }
    classes = {"GOLDConfig", "SFTConfig", "_BaseConfig", "TrainingArguments"}
    fields = set()
    for package, files in sources.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ConfigError(f"{package} is not installed; run `make setup`")
        for file in files:
            tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name in classes:
                    fields |= {
                        item.target.id
                        for item in node.body
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                    }
    return frozenset(fields)
