"""A whole optimizer step, phase by phase: step=fast against TRL's own, with the lab note's settings.

    python benchmarks/step.py                             # the cells below
    python benchmarks/step.py gen=hf experiment=h4 ...    # overrides as for launch.py: one cell of one's own

On a CPU the cells are the tiny pair's, and one of tiny widths with a real vocabulary; on a GPU they have the widths of
Qwen2.5-1.5B and Qwen3-4B and sample 256 tokens.

Three sides run by turns, each run in a process of its own; medians over all steps but each run's warm-up:

    TRL       plain GOLDTrainer, with one callback that looks at the clock twice a step
    step=trl  our trainer with TRL's arithmetic, which tells the phases
    fast      our trainer as it is by default

All three sample by themselves. That step=fast has step=trl's losses is shown by a second, short pair of runs that see
the same sequences: by deterministic sampling, or on a GPU, where it is not deterministic in bf16, by the data set's. On
a CPU vLLM cannot run under plain GOLDTrainer, which fails to push weights there. On a GPU gen=hf has a fourth side,
with a static cache and a compiled decode. Beside the phases stand their floors (roofline.py). Prints a table a cell;
writes step.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

# What the lab note's scripts gave TRL: two sequences at a time, twice; all of them the student's own here, every step.
LAB = (
    "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.lmbda=1.0",
    "trainer.learning_rate=1e-4",
)  # fmt: skip
REAL = (
    *LAB, "task=three_to_four", "model.pretrained_model_name_or_path={student}",
    "teacher.pretrained_model_name_or_path={teacher}", "trainer.max_length=1024",
)  # fmt: skip
ON_CPU = {
    "tiny pair, hf": ("gen=hf", *LAB),
    "tiny pair, hf, 16 sequences": ("gen=hf", "trainer.lmbda=1.0"),
    "tiny pair, vllm": ("gen=vllm", *LAB),
    "vocabulary of 151,936, 64 tokens, hf": (
        "gen=hf",
        *REAL,
        "trainer.max_completion_length=64",
        "trainer.max_steps=5",  # TRL takes a third of a minute each
    ),
}
LARGE = (
    *REAL, "precision=bf16", "teacher.dtype=bfloat16", "trainer.max_completion_length=256",
    "trainer.gradient_checkpointing=true",
)  # fmt: skip
ON_GPU = {
    "1.5B from 4B, 256 tokens, hf": ("gen=hf", *LARGE),
    "1.5B from 4B, 256 tokens, vllm": ("gen=vllm", *LARGE),
}
SIDES = {"TRL": ("step=trl",), "step=trl": ("step=trl",), "fast": ("step=fast",)}
STATIC = "fast, static cache"
QUIET = {
    "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


def make_trainer(*overrides: str, plain: bool = False, models: tuple | None = None, **kwargs):
    """A cell's trainer, or plain GOLDTrainer with the same arguments; and the cell's rollout dtype.

    ``models`` are a student, a teacher and the student's tokenizer that take the place of the cell's; ``kwargs`` are
    the trainer's own.
    """
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar
    from trl.experimental.gold import GOLDTrainer

    from countdown_kd.config import ROOT, instantiate, register_resolvers, validate
    from countdown_kd.gold import CountdownTrainer
    from countdown_kd.run import load

    disable_progress_bar()
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*overrides, "trainer.save_strategy=no", "trainer.disable_tqdm=true"])
    validate(cfg)
    with open_dict(cfg):
        cfg.trainer.output_dir = tempfile.mkdtemp()
    student, teacher, tokenizer = models or (None, None, None)
    if models is None:
        student, tokenizer = load(cfg.model)
        teacher, _ = load(cfg.teacher)
    args = instantiate(cfg.trainer, use_cpu=not torch.cuda.is_available())
    args.teacher_tokenizer_name_or_path = cfg.teacher.pretrained_model_name_or_path
    args._n_gpu = min(args.n_gpu, 1)  # of several that the process sees; plain GOLDTrainer refuses them
    kind = GOLDTrainer if plain else CountdownTrainer
    trainer = kind(
        model=student, teacher_model=teacher, args=args, train_dataset=instantiate(cfg.task).conversations(),
        processing_class=tokenizer, **({} if plain else {"gen": cfg.gen, "step": cfg.step}), **kwargs,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, cfg.gen.dtype


def train(trainer, warmup: int) -> dict:
    """Seconds of each step but the first ``warmup``, with the phases where they are told, losses and gradient norms."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.step_s = []

        def on_step_begin(self, *_, **__):
            self.start = now()

        def on_step_end(self, *_, **__):
            self.step_s.append(now() - self.start)

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    clock = getattr(trainer, "clock", None)
    watch = Watch()
    if clock is None:
        trainer.add_callback(watch)
    trainer.train()
    history = [each for each in trainer.state.log_history if "loss" in each]
    found = {
        "steps": (clock or watch).step_s[warmup:],
        "samples": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "losses": [each["loss"] for each in history],
        "grad_norms": [float(each["grad_norm"]) for each in history],
    }
    if clock is not None:
        found |= {"phases": clock.phase_s[warmup:], "batches": trainer.batches}
    return found


def ceilings_of(trainer):
    """What the hardware can do in the precision that ``trainer`` computes in."""
    import torch
    from roofline import measured_ceilings

    dtype = torch.bfloat16 if trainer.args.bf16 else next(trainer.model.parameters()).dtype
    return measured_ceilings(trainer.accelerator.device.type, dtype)


def measure(plain: bool, warmup: int, *overrides: str) -> dict:
    """What ``train`` finds of a cell, its peak memory, and the floors of its phases."""
    os.environ |= QUIET
    import torch
    from roofline import floors, work_of

    from countdown_kd.perf import peak_memory_gib

    trainer, rollout_dtype = make_trainer(*overrides, plain=plain)
    found = train(trainer, warmup) | {
        "peak": peak_memory_gib(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    if not plain:
        found["ceilings"] = ceilings_of(trainer)
        found["floors"] = floors(work_of(trainer, rollout_dtype), found["ceilings"])
    return found


def in_a_process(function, *arguments):
    """The result of a call in a new process: an engine, and freed memory, change a process for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def cells_here(folder: Path) -> dict[str, tuple[str, ...]]:
    """The cells for this machine, with models made in ``folder`` where no download could bring them."""
    from real_vocabulary import make_pair

    gpu = in_a_process(has_gpu)
    student, teacher = in_a_process(make_pair, folder, gpu)
    return {
        name: tuple(each.format(student=student, teacher=teacher) for each in overrides)
        for name, overrides in (ON_GPU if gpu else ON_CPU).items()
    }


def collect(
    cells: dict[str, tuple[str, ...]], rounds: int, steps: int | None = None, warmup: int | None = None
) -> dict[tuple[str, str], list[dict]]:
    """Runs by cell and side; under "losses" of a side those that see the same sequences as the other."""
    gpu = in_a_process(has_gpu)
    # On a GPU a step takes seconds, and the first of them holds all that is slow once.
    steps = (6 if gpu else 40) if steps is None else steps
    warmup = (1 if gpu else 3) if warmup is None else warmup
    sides = SIDES | ({STATIC: (*SIDES["fast"], "gen.cache_implementation=static")} if gpu else {})
    turns = [(cell, side, True) for cell in cells for _ in range(rounds) for side in sides]
    turns += [(cell, side, False) for cell in cells for side in ("step=trl", "fast")]
    runs: dict[tuple[str, str], list[dict]] = {}
    for cell, side, timed in track(turns, "steps by turns"):
        if "gen=vllm" in cells[cell] and (side == STATIC or (side == "TRL" and not gpu)):
            continue
        overrides = [f"trainer.max_steps={steps if timed else 6}", *cells[cell], *sides[side]]
        overrides += [] if timed else ["trainer.lmbda=0.0" if gpu else "trainer.top_k=1"]
        name = side if timed else f"{side}, losses"
        run = in_a_process(measure, side == "TRL", warmup if timed else 0, *overrides)
        runs.setdefault((cell, name), []).append(run)
    return runs


def step_s(runs: list[dict]) -> float:
    return statistics.median(step for run in runs for step in run["steps"])


def phase_means(runs: list[dict]) -> dict[str, float]:
    from countdown_kd.perf import PHASES

    return {phase: statistics.fmean(step.get(phase, 0.0) for run in runs for step in run["phases"]) for phase in PHASES}


def report(console: Console, cells, runs: dict[tuple[str, str], list[dict]]) -> list[tuple[str, str, str, str]]:
    """A table of phases a cell; returns rows for a summary: what, TRL's, ours, ratio."""
    rows = []
    for cell in cells:
        sides = {side: runs[cell, side] for side in SIDES if (cell, side) in runs}
        fast, plain = sides["fast"], next(iter(sides.values()))
        ceilings = fast[0]["ceilings"]
        title = f"{cell}: {fast[0]['samples']} sequences a step ({fast[0]['device']})"
        table = Table(title=title, caption="phases: mean seconds; floor: seconds that the hardware needs (roofline.py)")
        headers = ("", *sides, "ratio", "floor", "of it")
        for header in headers:
            table.add_column(header, justify="right" if header else "left")
        ours, trls, least = phase_means(fast), phase_means(sides["step=trl"]), fast[0]["floors"]
        for phase in ours:
            if trls[phase]:
                ratio = trls[phase] / ours[phase]
                of_sides = {"step=trl": f"{trls[phase]:.4f}", "fast": f"{ours[phase]:.4f}"}
                seconds = (of_sides.get(side, "") for side in sides)
                table.add_row(
                    phase, *seconds, f"{ratio:.2f}",
                    f"{least[phase]:.4f}", f"{least[phase] / ours[phase]:.0%}",
                )  # fmt: skip
        table.add_section()
        medians = {side: step_s(each) for side, each in sides.items()}
        ratio = step_s(plain) / medians["fast"]
        least = sum(seconds for phase, seconds in least.items() if trls[phase])
        table.add_row(
            "step (median)", *(f"{each:.4f}" for each in medians.values()), f"[bold]{ratio:.2f}[/]",
            f"{least:.4f}", f"{least / medians['fast']:.0%}",
        )  # fmt: skip
        samples = fast[0]["samples"]
        table.add_row("samples/s", *(f"{samples / each:.1f}" for each in medians.values()), f"[bold]{ratio:.2f}[/]")
        peaks = [max(run["peak"] for run in each) for each in sides.values()]
        table.add_row("peak GiB", *(f"{each:.2f}" for each in peaks), f"{peaks[0] / peaks[-1]:.2f}")
        console.print(table)
        each_round = ", ".join(f"{step_s([a]) / step_s([b]):.2f}" for a, b in zip(plain, fast, strict=True))
        console.print(f"ratio of the steps in each round: {each_round}")
        (trl,), (ours,) = runs[cell, "step=trl, losses"], runs[cell, "fast, losses"]
        same = 0
        while same < len(trl["batches"]) and trl["batches"][same] == ours["batches"][same]:
            same += 1
        pairs = list(zip(trl["losses"], ours["losses"], strict=True))[:same]
        apart = max((abs(a - b) / abs(a) for a, b in pairs), default=0)
        console.print(
            f"the same sequences in {same} of {len(trl['batches'])} steps: their losses differ by "
            f"{apart:.0e} of their value at most"
        )
        if (cell, STATIC) in runs:
            static = step_s(runs[cell, STATIC])
            console.print(f"{STATIC}: {static:.4f} s a step, ratio {step_s(plain) / static:.2f}")
        console.print(f"ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bytes / 1e9:.0f} GB/s\n")
        name = f"samples/s, {cell}" + ("" if "TRL" in sides else " (TRL: step=trl)")
        rows.append((name, f"{samples / step_s(plain):.1f}", f"{samples / medians['fast']:.1f}", f"{ratio:.2f}"))
    return rows


def draw(axes, cells, runs: dict[tuple[str, str], list[dict]]) -> None:
    """Phases of both sides, as shares of TRL's step: steps of milliseconds and of minutes in one picture."""
    from countdown_kd.summary import PHASE_COLOURS

    labels, widths = [], []
    for cell in cells:
        whole = sum(phase_means(runs[cell, "step=trl"]).values())
        for side in ("step=trl", "fast"):
            means = phase_means(runs[cell, side])
            head = f"{cell}\n" if side == "step=trl" else ""
            labels.append(f"{head}{side}: {sum(means.values()):.2g} s")
            widths.append({phase: seconds / whole for phase, seconds in means.items()})
    left = [0.0] * len(labels)
    for phase, colour in PHASE_COLOURS.items():
        values = [each[phase] for each in widths]
        axes.barh(range(len(labels)), values, left=left, color=colour, label=phase, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="time, TRL's step = 1", title="A step by phase")
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a cell of one's own, instead of those below")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side (%(default)s)")
    parser.add_argument("--steps", type=int, help="of each run (40; on a GPU 6)")
    parser.add_argument("--warmup", type=int, help="of them left out (3; on a GPU 1)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cells = {"this cell": tuple(given.overrides)} if given.overrides else cells_here(Path(folder))
        runs = collect(cells, given.rounds, given.steps, given.warmup)
    report(Console(), cells, runs)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2 + 0.9 * len(cells)), layout="constrained")
    draw(figure.subplots(), cells, runs)
    figure.savefig("step.png", dpi=130)
    print(f"figure   {Path('step.png').absolute()}")


if __name__ == "__main__":
    main()
