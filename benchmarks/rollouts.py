"""Rollout tokens a second in training, with vLLM: against its own offline throughput on the same prompts.

    python benchmarks/rollouts.py        # the tiny pair; minutes on two CPU cores

Offline, vLLM is given all prompts of the run in one call. In training it gets an optimizer step's, or with
gen.steps_per_rollout those of several steps, and every call brings the push of the weights (not counted here), tokens
to be turned into tensors, texts and byte offsets (counted). Same engine, same weights, same number of prompts. Prints a
table; writes rollouts.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from step import LAB, QUIET, in_a_process, make_trainer

AHEAD = (1, 4, 16)


def measure(steps_per_rollout: int, steps: int) -> dict[str, float]:
    """Tokens a second while sampling, in training and offline; mean staleness in steps."""
    os.environ |= QUIET
    from vllm import SamplingParams

    overrides = "gen=vllm", *LAB, f"trainer.max_steps={steps}", f"gen.steps_per_rollout={steps_per_rollout}"
    trainer, _ = make_trainer(*overrides)
    trainer.train()
    stale = [each["rollout/staleness"] for each in trainer.state.log_history if "rollout/staleness" in each]

    engine, args = trainer.vllm_generation, trainer.args
    every = args.gradient_accumulation_steps  # the loader gives a step's batch once a micro-batch
    prompts = [
        {"prompt_token_ids": ids[mask.bool()].tolist()}
        for batch in islice(trainer.get_train_dataloader(), 0, steps * every, every)
        for ids, mask in zip(batch["prompts"], batch["prompt_attention_mask"], strict=True)
    ]
    sampling = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_completion_length, top_k=args.top_k or -1
    )
    rates = []
    for _ in range(3):
        engine.llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = engine.llm.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
        rates.append(tokens / (time.perf_counter() - start))
    return {
        "training": trainer.clock.metrics(1)["perf/rollout_tokens_per_s"],
        "sync": statistics.fmean(phases.get("sync", 0.0) for phases in trainer.clock.phase_s),
        "offline": max(rates),
        "staleness": statistics.fmean(stale),
    }


def collect(rounds: int = 2, steps: int = 48) -> dict[int, list[dict[str, float]]]:
    turns = [ahead for _ in range(rounds) for ahead in AHEAD]
    found: dict[int, list[dict[str, float]]] = {}
    for ahead in track(turns, "rollouts by turns"):
        found.setdefault(ahead, []).append(in_a_process(measure, ahead, steps))
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def report(console: Console, found: dict[int, list[dict[str, float]]]) -> list[tuple[str, str, str, str]]:
    """A table; returns rows for a summary: what, offline, in training, ratio."""
    table = Table(title="rollout tokens/s: vLLM in training against vLLM offline, tiny pair, 4 sequences a step")
    for header in (
        "steps_per_rollout",
        "prompts a call",
        "training",
        "offline",
        "ratio",
        "sync, s a step",
        "staleness",
    ):
        table.add_column(header, justify="right")
    rows = []
    for ahead, runs in found.items():
        each = medians(runs)
        ratio = each["training"] / each["offline"]
        table.add_row(
            str(ahead), str(4 * ahead), f"{each['training']:.0f}", f"{each['offline']:.0f}", f"{ratio:.2f}",
            f"{each['sync']:.4f}", f"{each['staleness']:.1f}",
        )  # fmt: skip
        name = f"rollout tokens/s, steps_per_rollout={ahead} (vLLM offline)"
        rows.append((name, f"{each['offline']:.0f}", f"{each['training']:.0f}", f"{ratio:.2f}"))
    console.print(table)
    return rows


def draw(axes, found: dict[int, list[dict[str, float]]]) -> None:
    values = [medians(runs) for runs in found.values()]
    places = range(len(values))
    axes.bar([x - 0.2 for x in places], [each["offline"] for each in values], 0.4, color="#BBBBBB", label="offline")
    axes.bar([x + 0.2 for x in places], [each["training"] for each in values], 0.4, color="#0072B2", label="training")
    axes.set_xticks(places, [f"{ahead}\n({4 * ahead} prompts)" for ahead in found])
    axes.set(xlabel="gen.steps_per_rollout", title="vLLM's rollout tokens a second")
    axes.margins(y=0.15)
    axes.legend(frameon=False, ncols=2, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting (%(default)s)")
    parser.add_argument("--steps", type=int, default=48, help="of each run (%(default)s)")
    given = parser.parse_args()
    found = collect(given.rounds, given.steps)
    report(Console(), found)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure.subplots(), found)
    figure.savefig("rollouts.png", dpi=130)
    print(f"figure   {Path('rollouts.png').absolute()}")


if __name__ == "__main__":
    main()
