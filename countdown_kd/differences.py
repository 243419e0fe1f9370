"""Which keys of configs differ, what each can change, and why. Pure Python."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

LOSS, ACCURACY, SPEED, COSMETIC, NOISE = "loss", "accuracy", "speed", "cosmetic", "noise"
RANKS = (LOSS, ACCURACY, SPEED, COSMETIC, NOISE)

# The first pattern that fits tells. What fits none is taken for able to change the loss.
REASONS: tuple[tuple[str, str, str], ...] = (
    # where and when, not what
    ("output_dir", NOISE, "where results go"),
    ("run_name", NOISE, "a name"),
    ("logging_dir", NOISE, "where logs go"),
    ("*host*", NOISE, "a machine's name or address"),
    ("local_rank", NOISE, "which process printed the config"),
    ("*port", NOISE, "an address"),
    ("hydra.*", NOISE, "the launcher's part"),
    ("code", NOISE, "a hash of the code; the commit tells more"),  # differences() knows when it does not
    # how accuracy is measured: before the sampling's and the data's keys, which are called the same
    ("eval.batch_size", SPEED, "how many held-out puzzles are answered at once"),
    ("eval.*", ACCURACY, "how accuracy is measured: only equal ones can be compared"),
    # numbers
    ("bf16", LOSS, "autocast: which precision forward and backward compute in"),
    ("fp16", LOSS, "autocast: which precision forward and backward compute in"),
    ("tf32", LOSS, "matrix products with 10 bits of mantissa instead of 23"),
    ("*dtypes*", LOSS, "the precision of the weights: a small update is lost in bf16's 8 bits"),
    ("*dtype", LOSS, "the precision of weights or rollouts"),
    ("*attn_implementation", LOSS, "other kernels, other rounding; some treat padding otherwise"),
    ("use_liger_kernel", LOSS, "another implementation of the loss"),
    ("*quantization*", LOSS, "rounded weights"),
    # data
    ("seed", LOSS, "puzzles' order, on-policy draws, rollouts"),
    ("data_seed", LOSS, "the order of the data"),
    ("shuffle_dataset", LOSS, "the order of the data"),
    ("data.*", LOSS, "which puzzles"),
    ("task.*", LOSS, "which puzzles and which prompt"),
    ("*tokenizer_fingerprint", LOSS, "other tokens, or another chat template"),
    ("*vocabulary", LOSS, "other tokens"),
    ("packing*", LOSS, "what a sequence is made of"),
    ("max_length", LOSS, "where sequences are cut"),
    ("max_completion_length", LOSS, "where rollouts are cut"),
    # models
    ("teacher_model_name_or_path", LOSS, "the teacher; unset where it is given as an object"),
    ("teacher_tokenizer_name_or_path", LOSS, "the teacher's tokens; unset where it is given as an object"),
    ("student.*", LOSS, "another student"),
    ("teacher.*", LOSS, "another teacher"),
    ("model.*", LOSS, "another student"),
    ("model_name_or_path", LOSS, "another student"),
    # GOLD
    ("lmbda", LOSS, "how many micro-batches the student samples itself; their loss is another"),
    ("beta", LOSS, "which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher)"),
    ("temperature", LOSS, "how rollouts are sampled"),
    ("top_p", LOSS, "how rollouts are sampled"),
    ("top_k", LOSS, "how rollouts are sampled"),
    ("uld_token_merge_strategy", LOSS, "how probabilities of tokens that are cut differently are merged"),
    ("uld_*", LOSS, "the distillation loss"),
    ("use_uld_loss", LOSS, "the distillation loss"),
    ("use_extended_uld", LOSS, "how the two tokenizations are aligned"),
    ("seq_kd", COSMETIC, "TRL's GOLD does nothing with it"),
    ("num_generations", LOSS, "rollouts a prompt"),
    ("steps_per_generation", LOSS, "how old rollouts may be"),
    ("rollout.backend", LOSS, "who samples: other random numbers, the same distribution"),
    ("use_vllm", LOSS, "who samples: other random numbers, the same distribution"),
    # optimisation
    ("gradient_accumulation_steps", LOSS, "TRL's ULD loss is summed over it, not averaged: loss and gradient grow"),
    ("per_device_train_batch_size", LOSS, "sequences a step"),
    ("global_batch", LOSS, "sequences a step"),
    ("world_size", LOSS, "sequences a step, and how they are averaged"),
    ("_n_gpu", LOSS, "sequences a step"),
    ("learning_rate", LOSS, "the size of an update"),
    ("lr_scheduler*", LOSS, "the size of an update"),
    ("warmup*", LOSS, "the size of the first updates"),
    ("max_steps", LOSS, "how long, and with it the learning rate's schedule"),
    ("num_train_epochs", LOSS, "how long, and with it the learning rate's schedule"),
    ("max_grad_norm", LOSS, "how hard gradients are clipped"),
    ("weight_decay", LOSS, "the update"),
    ("adam_*", LOSS, "the update"),
    ("optim*", LOSS, "the update"),
    ("disable_dropout", LOSS, "noise in the student's forward pass"),
    ("label_smoothing_factor", LOSS, "the loss"),
    ("neftune_noise_alpha", LOSS, "noise in the student's forward pass"),
    # speed
    ("gradient_checkpointing*", SPEED, "memory for time; the numbers are the same up to rounding"),
    ("torch_compile*", SPEED, "fused kernels; the numbers are the same up to rounding"),
    ("torch_empty_cache_steps", SPEED, "memory for time"),
    ("dataloader_*", SPEED, "how batches are fetched"),
    ("vllm_sync_frequency", LOSS, "how old the weights are that rollouts are sampled from"),
    ("vllm_structured_outputs_regex", LOSS, "which rollouts there can be"),
    ("vllm_guided_decoding_regex", LOSS, "which rollouts there can be"),
    ("vllm_max_model_length", LOSS, "where rollouts are cut"),
    ("vllm_*", SPEED, "how vLLM uses its GPU"),
    ("*.steps_per_rollout", LOSS, "how old rollouts may be"),
    ("rollout.*", LOSS, "how rollouts are sampled"),
    ("gen.*", SPEED, "how rollouts are batched"),
    ("dist.*", SPEED, "how many processes"),
    ("ddp_*", SPEED, "how ranks talk"),
    ("device", SPEED, "another machine; and other kernels, other rounding"),
    ("threads", SPEED, "how many CPU threads; sums are added in another order"),
    ("auto_find_batch_size", LOSS, "sequences a step"),
    ("versions.*", LOSS, "another release: look at its notes"),
    ("commit", LOSS, "other code"),
    ("step.average_micro_batches", LOSS, "whether a loss is the mean over micro-batches, or TRL's sum"),
    ("step.rollouts_together", LOSS, "gen=hf: other random numbers, the same distribution"),
    ("step.*", SPEED, "another form of the same step, other rounding"),
    ("full_determinism", SPEED, "reproducible kernels, slower ones"),
    ("use_cpu", SPEED, "another device"),
    # written down, not computed with
    ("eval_*", COSMETIC, "when and how a loss is measured on held-out data"),
    ("per_device_eval_batch_size", COSMETIC, "how held-out data is batched"),
    ("log*", COSMETIC, "what is written down"),
    ("report_to", COSMETIC, "who is told"),
    ("save_*", COSMETIC, "when checkpoints are written"),
    ("hub_*", COSMETIC, "what is uploaded"),
    ("push_to_hub*", COSMETIC, "what is uploaded"),
    ("wandb_*", COSMETIC, "who is told"),
    ("trl_project", COSMETIC, "a name"),
    ("project", COSMETIC, "a name"),
    ("trackio*", COSMETIC, "who is told"),
    ("disable_tqdm", COSMETIC, "a progress bar"),
    ("do_*", COSMETIC, "read by scripts, not by the trainer"),
    ("include_*", COSMETIC, "what is written down"),
    ("callbacks", COSMETIC, "what else is called"),
)


EMPTY = (None, [], {}, "")


@dataclass(frozen=True)
class Difference:
    """A key that differs, its value on each side (MISSING where a side has no such key), what it can change and why."""

    key: str
    values: tuple[Any, ...]
    rank: str
    why: str


class Missing:
    """A side that does not have the key, which is not the same as one that has None."""

    def __repr__(self) -> str:
        return "–"


MISSING = Missing()


def rank(key: str) -> tuple[str, str]:
    """What a key can change (one of RANKS), and why."""
    for pattern, kind, why in REASONS:
        if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key.rpartition(".")[2], pattern):
            return kind, why
    return LOSS, "not known to be harmless"


def differences(configs: list[dict[str, Any]]) -> list[Difference]:
    """The keys that differ, those that can change the loss first, then by name; MISSING where a side lacks a key."""
    found: list[Difference] = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = tuple(config.get(key, MISSING) for config in configs)
        told = [value for value in values if value is not MISSING]
        if all(value == told[0] and type(value) is type(told[0]) for value in values):
            continue
        if all(value in EMPTY for value in told):
            found.append(Difference(key, values, COSMETIC, "unset and empty mean the same"))
        elif key == "code" and len({config.get("commit") for config in configs}) == 1:
            found.append(Difference(key, values, LOSS, "changes that are not committed: see each run's code.diff"))
        else:
            found.append(Difference(key, values, *rank(key)))
    return sorted(found, key=lambda difference: (RANKS.index(difference.rank), difference.key))
