"""A whole optimizer step: step=fast against TRL's own, phase by phase, from the same rollouts.

    python benchmarks/step.py                            # the tiny pair, gen=hf and gen=vllm, on a CPU
    python benchmarks/step.py gen=hf experiment=h4 ...   # overrides as for launch.py: one cell of one's own

Both sides are our trainer, which with step=trl computes TRL's losses digit for digit (tests/test_gold.py). They run by
turns, each run in a process of its own; medians over all steps but each run's warm-up. Prints tables, writes step.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

# What the lab note's scripts gave TRL: two sequences at a time, twice; vLLM decodes the four of a step at a time.
LAB = (
    "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.lmbda=1.0",
    "trainer.learning_rate=1e-4",
)  # fmt: skip
CELLS = {"hf": ("gen=hf", *LAB), "vllm": ("gen=vllm", *LAB), "hf, 16 sequences": ("gen=hf", "trainer.lmbda=1.0")}
SIDES = {"trl": "step=trl", "fast": "step=fast"}


def make_trainer(*overrides: str):
    """A cell's trainer, with its results in a temporary folder."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import open_dict

    from countdown_kd.config import ROOT, register_resolvers, validate
    from countdown_kd.gold import CountdownTrainer
    from countdown_kd.run import load

    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*overrides, "trainer.save_strategy=no", "trainer.disable_tqdm=true"])
    validate(cfg)
    with open_dict(cfg):
        cfg.trainer.output_dir = tempfile.mkdtemp()
    student, tokenizer = load(cfg.model)
    teacher, _ = load(cfg.teacher)
    args = instantiate(cfg.trainer, use_cpu=not torch.cuda.is_available(), _convert_="all")
    args.teacher_tokenizer_name_or_path = cfg.teacher.pretrained_model_name_or_path
    return CountdownTrainer(
        model=student, teacher_model=teacher, args=args, gen=cfg.gen, step=cfg.step,
        train_dataset=instantiate(cfg.task).conversations(), processing_class=tokenizer,
    )  # fmt: skip


def measure(*overrides: str) -> dict:
    """Seconds of each step and of its phases without the warm-up, sequences a step, and the losses."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    from transformers import PrinterCallback

    from countdown_kd.perf import WARMUP_STEPS, peak_memory_gib

    trainer = make_trainer(*overrides)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    clock = trainer.clock
    return {
        "steps": clock.step_s[WARMUP_STEPS:],
        "phases": clock.phase_s[WARMUP_STEPS:],
        "samples": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
        "batches": trainer.batches,
        "peak": peak_memory_gib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a cell of one's own, instead of the three")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of each run (%(default)s)")
    given = parser.parse_args()
    cells = {"": given.overrides} if given.overrides else CELLS

    turns = [(cell, side) for cell in cells for _ in range(given.rounds) for side in SIDES]
    runs: dict[tuple[str, str], list[dict]] = {}
    for cell, side in track(turns, "by turns"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (*cells[cell], SIDES[side], f"trainer.max_steps={given.steps}")
            runs.setdefault((cell, side), []).append(pool.submit(measure, *arguments).result())

    console = Console()
    for cell in cells:
        report(console, cell, *(runs[cell, side] for side in SIDES))
    file = Path("step.png").absolute()
    draw(runs, cells, file)
    console.print(f"figure   {file}", soft_wrap=True)


def phase_means(runs: list[dict]) -> dict[str, float]:
    from countdown_kd.perf import PHASES

    return {phase: statistics.fmean(step.get(phase, 0.0) for run in runs for step in run["phases"]) for phase in PHASES}


def report(console: Console, cell: str, trls: list[dict], fast: list[dict]) -> None:
    """A table of phases, and how far the losses of the same batches lie apart."""
    table = Table(title=f"{cell or 'seconds a step'}: {trls[0]['samples']} sequences a step")
    for header in ("mean, s", *SIDES, "ratio"):
        table.add_column(header, justify="left" if header == "mean, s" else "right")
    ours = phase_means(fast)
    for phase, seconds in phase_means(trls).items():
        if seconds:
            table.add_row(phase, f"{seconds:.4f}", f"{ours[phase]:.4f}", f"{seconds / max(ours[phase], 1e-9):.2f}")
    table.add_section()
    medians = [statistics.median(step for run in runs for step in run["steps"]) for runs in (trls, fast)]
    table.add_row("step (median)", *(f"{each:.4f}" for each in medians), f"[bold]{medians[0] / medians[1]:.2f}[/]")
    rates = [trls[0]["samples"] / each for each in medians]
    table.add_row("samples/s", *(f"{each:.1f}" for each in rates), f"[bold]{rates[1] / rates[0]:.2f}[/]")
    peaks = [max(run["peak"] for run in runs) for runs in (trls, fast)]
    table.add_row("peak GiB", *(f"{each:.2f}" for each in peaks), f"{peaks[0] / peaks[1]:.2f}")
    console.print(table)
    rounds = [
        statistics.median(one["steps"]) / statistics.median(other["steps"])
        for one, other in zip(trls, fast, strict=True)
    ]
    console.print(f"ratio of the steps in each round: {', '.join(f'{each:.2f}' for each in rounds)}")
    same = 0
    for one, other in zip(trls[0]["batches"], fast[0]["batches"], strict=True):
        if one != other:
            break
        same += 1
    pairs = list(zip(trls[0]["losses"], fast[0]["losses"], strict=True))[:same]
    apart = max((abs(a - b) / max(abs(a), 1e-9) for a, b in pairs), default=0.0)
    console.print(f"the same rollouts for {same} steps; their losses differ by {apart:.1e} of their value at most\n")


def draw(runs: dict[tuple[str, str], list[dict]], cells: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    from countdown_kd.summary import PHASE_COLOURS

    figure = Figure(figsize=(10, 1.4 + 0.9 * len(cells)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{cell}  {side}" for cell in cells for side in SIDES]
    left = [0.0] * len(labels)
    means = [phase_means(runs[cell, side]) for cell in cells for side in SIDES]
    for phase, colour in PHASE_COLOURS.items():
        widths = [each[phase] for each in means]
        axes.barh(labels, widths, left=left, color=colour, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds an optimizer step", title="The same step, TRL's way and fast")
    axes.legend(ncols=len(PHASE_COLOURS), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
