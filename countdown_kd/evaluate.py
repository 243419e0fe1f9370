"""Sample answers to held-out puzzles, check them, count them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import DictConfig
from scipy.stats import binomtest
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from countdown_kd.countdown import CORRECT, FAILURES, check
from countdown_kd.data import Example
from countdown_kd.engine import VLLM
from countdown_kd.progress import Bar

log = logging.getLogger(__name__)

# Prompts as token ids in, sampled token ids out (the end-of-sequence token included where one was sampled).
Sampler = Callable[[list[list[int]]], list[list[int]]]


class Evaluation(NamedTuple):
    """``metrics`` are named without a prefix: accuracy, accuracy_low, …; ``predictions`` has a row a puzzle."""

    metrics: dict[str, float]
    predictions: pd.DataFrame

    def __str__(self) -> str:
        m = self.metrics
        return (
            f"{m['accuracy']:.1%} of {len(self.predictions)} puzzles solved "
            f"({m['accuracy_low']:.1%} to {m['accuracy_high']:.1%}), {m['truncated_frac']:.1%} truncated"
        )


def evaluate(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    cfg: DictConfig,
) -> Evaluation:
    """Answer every example once and judge the answers by ``cfg.rule``.

    Ranks share the work and all return the whole. The interval is Wilson's, 95 %. An answer is truncated when
    ``cfg.max_new_tokens`` came before the end of sequence.
    """
    prompts = [tokenizer.apply_chat_template(e.prompt, add_generation_prompt=True, return_dict=False) for e in examples]
    state = PartialState()
    set_seed(cfg.seed + state.process_index)
    with state.split_between_processes(prompts) as mine:
        completions = gather_object(sampler(mine))

    ends = _eos_token_ids(model, tokenizer)
    rows = []
    for example, ids in zip(examples, completions, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        verdict = check(text, example.puzzle.numbers, example.puzzle.target, cfg.rule)
        rows.append(
            {
                "numbers": list(example.puzzle.numbers),
                "target": example.puzzle.target,
                "label": verdict.label,
                "detail": verdict.detail,
                "completion": text,
                "tokens": len(ids),
                "truncated": len(ids) >= cfg.max_new_tokens and ids[-1] not in ends,
            }
        )
    predictions = pd.DataFrame(rows)
    counts = Counter(predictions["label"])
    interval = binomtest(counts[CORRECT], len(rows)).proportion_ci(0.95, method="wilson")
    metrics = {
        "accuracy": counts[CORRECT] / len(rows),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        "truncated_frac": float(predictions["truncated"].mean()),
        **{f"failures/{label}": float(counts[label]) for label in FAILURES},
    }
    return Evaluation(metrics, predictions)


def hf_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictConfig,
    autocast: bool,
    description: str,
) -> Sampler:
    """Sample with ``model.generate``, ``cfg.batch_size`` prompts at a time, longest first."""
    ends = _eos_token_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=cfg.temperature > 0,
        temperature=cfg.temperature or None,
        top_p=cfg.top_p if cfg.temperature > 0 else None,
        top_k=0 if cfg.temperature > 0 else None,
        max_new_tokens=cfg.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )

    # Autocast casts all weights at every token in inference mode, and once a batch without.
    @(torch.no_grad if autocast else torch.inference_mode)()
    def sample(prompts: list[list[int]]) -> list[list[int]]:
        was_training = model.training
        model.eval()
        completions: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with Bar(len(prompts), description, "puzzle") as bar:
            for start in range(0, len(order), cfg.batch_size):
                batch = order[start : start + cfg.batch_size]
                inputs = tokenizer.pad(
                    {"input_ids": [prompts[i] for i in batch]},
                    padding_side="left",
                    return_tensors="pt",
                ).to(model.device)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                    output = model.generate(**inputs, generation_config=config)
                for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                    completions[i] = _up_to_end(ids, ends)
                bar.update(len(batch))
        model.train(was_training)
        return completions

    return sample


def vllm_sampler(engine: VLLM, cfg: DictConfig, description: str) -> Sampler:
    """Sample with vLLM, a colocated engine or a server, after giving it the student's weights."""

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        engine.sync_weights()
        rollouts = engine.temperature, engine.top_p, engine.top_k, engine.max_completion_length
        engine.temperature, engine.top_p, engine.top_k = cfg.temperature, cfg.top_p, 0
        engine.max_completion_length = cfg.max_new_tokens
        completions: list[list[int]] = []
        try:
            with Bar(len(prompts), description, "puzzle") as bar:
                for start in range(0, len(prompts), 256):
                    batch = prompts[start : start + 256]
                    _, ids, _, _ = engine.generate(batch, images=None, num_generations=1)
                    completions += [list(i) for i in ids]
                    bar.update(len(batch))
        finally:
            engine.temperature, engine.top_p, engine.top_k, engine.max_completion_length = rollouts
        return completions

    return sample


def _up_to_end(ids: list[int], eos_token_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), len(ids))
    return ids[: end + 1]


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)
