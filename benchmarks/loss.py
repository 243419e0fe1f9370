"""The distillation loss alone, forward and backward: ours against TRL's, at a real vocabulary.

    python benchmarks/loss.py                      # two completions of 64 to 2,048 tokens; minutes on two CPU cores
    python benchmarks/loss.py --device cuda        # the same on a GPU

Every measurement has a process of its own, TRL's and ours by turns, so that peak memory is each one's own. TRL's
backward pass is quadratic in the completion length: it is measured up to the length at which it takes longer than
--patience seconds, and what lies beyond is left out, not guessed. Prints a table, writes loss.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.progress import track
from rich.table import Table

VOCABULARY = 151_663  # tokens that Qwen2.5 and Qwen3 share
PADDED = 151_936  # columns of their output layers
LENGTHS = (64, 128, 256, 512, 1024, 2048)
COMPLETIONS = 2
WHAT = ("TRL", "ours", "chunked")
COLOURS = dict(zip(WHAT, ("#D55E00", "#0072B2", "#009E73"), strict=True))
LONG_S = 20  # is not repeated
WIDTH = 64  # of the hidden states that the chunked form makes its logits of


def measure(what: str, length: int, device: str, dtype: str, columns: int, repeats: int) -> dict[str, float]:
    """Seconds of the fastest forward and backward pass, the loss, and the peak memory in GiB, logits included."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss as TRLsULDLoss

    from countdown_kd.losses import Hidden, ULDLoss

    config = GOLDConfig(
        output_dir="unused", report_to="none", use_cpu=device == "cpu", bf16=False, beta=0.0,
        uld_use_hybrid_loss=True, use_extended_uld=True, teacher_tokenizer_name_or_path="unused",
    )  # fmt: skip
    tokenizer = SimpleNamespace(get_vocab=lambda: {f"token {i}": i for i in range(min(VOCABULARY, columns))})
    loss_of = (TRLsULDLoss if what == "TRL" else ULDLoss)(config, tokenizer, tokenizer, device=torch.device(device))
    prompt = 8
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 1000, (COMPLETIONS, prompt + length), generator=generator)
    ids = labels.to(device)
    labels = labels.masked_fill(torch.arange(prompt + length) < prompt, -100).to(device)
    ends = torch.arange(length)
    offsets = torch.nn.functional.pad(torch.stack([ends, ends + 1], 1), (0, 0, prompt, 0)).expand(COMPLETIONS, -1, 2)
    rest = (labels, labels, ids, ids, offsets, offsets)

    def baseline() -> float:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**30  # by whatever else this process holds
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else baseline()

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    before = baseline()
    sides = []
    for _ in range(2):
        states = torch.randn(COMPLETIONS, prompt + length, WIDTH, generator=generator)
        weight = torch.randn(columns, WIDTH, generator=generator) / WIDTH**0.5
        sides.append([part.to(device, getattr(torch, dtype)) for part in (states, weight)])
    if what == "chunked":
        student, teacher = (Hidden(*parts) for parts in sides)
        for part in student:
            part.requires_grad_()
    else:
        student, teacher = (states @ weight.T for states, weight in sides)
        student.requires_grad_()
    forward, backward = [], []
    for _ in range(repeats):
        for part in student if isinstance(student, Hidden) else [student]:
            part.grad = None
        start = clock()
        loss = loss_of(student, teacher, *rest)
        middle = clock()
        loss.backward()
        backward.append(clock() - middle)
        forward.append(middle - start)
        if forward[-1] + backward[-1] > LONG_S:
            break
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    return {
        "forward": min(forward), "backward": min(backward), "all": both, "loss": loss.item(), "peak": peak() - before,
    }  # fmt: skip


def collect(
    lengths: Sequence[int] = LENGTHS, device: str = "cpu", dtype: str = "float32", columns: int = PADDED,
    repeats: int = 2, patience: float = 60,
) -> dict[tuple[str, int], dict[str, float]]:  # fmt: skip
    """Measurements by what is measured and the completions' length."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for what, length in track([(what, length) for length in lengths for what in WHAT], "loss by turns"):
        shorter = [found[what, each] for each in lengths if (what, each) in found]
        if what == "TRL" and any(seconds(each) > patience for each in shorter):
            continue
        # A new process every time: freed memory is not always given back.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[what, length] = pool.submit(measure, what, length, device, dtype, columns, repeats).result()
    return found


def seconds(each: dict[str, float]) -> float:
    return each["forward"] + each["backward"]


def report(console: Console, found: dict[tuple[str, int], dict[str, float]], title: str) -> list[tuple[str, ...]]:
    """A table, and how time grows; returns rows for a summary: what, TRL's, ours, ratio."""
    table = Table(title=title)
    for header in ("tokens", "", "fwd, s", "bwd, s", "both", "TRL/it", "GiB", "of it", "loss"):
        table.add_column(header, justify="left" if not header else "right")
    rows = []
    for (what, length), each in found.items():
        trls = found.get(("TRL", length))
        ratio = f"{seconds(trls) / seconds(each):.0f}" if trls else "–"
        table.add_row(
            str(length), what, f"{each['forward']:.3f}", f"{each['backward']:.3f}", f"{seconds(each):.3f}", ratio,
            f"{each['peak']:.2f}", f"{each['peak'] / trls['peak']:.2f}" if trls else "–", f"{each['loss']:.5f}",
            end_section=what == WHAT[-1],
        )  # fmt: skip
        if trls and what == "ours":
            name = f"loss, {COMPLETIONS} x {length} tokens"
            rows.append((f"s, {name}", f"{seconds(trls):.2f}", f"{seconds(each):.3f}", ratio))
            memory = trls["peak"] / each["peak"]
            rows.append((f"GiB, {name}", f"{trls['peak']:.2f}", f"{each['peak']:.2f}", f"{memory:.1f}"))
    console.print(table)
    for what in WHAT:
        lengths = [length for name, length in found if name == what]
        longer = [length for length in lengths if length >= 256]
        a, *_, b = longer if len(longer) > 1 else lengths + lengths
        if b > a:
            growth = seconds(found[what, b]) / seconds(found[what, a])
            console.print(f"{what}: from {a} to {b} tokens ({b / a:g} times) {growth:.2f} times the time")
    apart = max(
        abs(each["loss"] / found[what, length]["loss"] - 1)
        for (_, length), each in found.items() for what in WHAT if (what, length) in found
    )  # fmt: skip
    console.print(f"losses of one length differ by {apart:.0e} of their value at most\n")
    return rows


def draw(figure_axes, found: dict[tuple[str, int], dict[str, float]]) -> None:
    """Into two axes: time, and memory."""
    from matplotlib.ticker import LogLocator

    for axes, title in zip(figure_axes, ("The loss, seconds", "The loss, GiB"), strict=True):
        for what, colour in COLOURS.items():
            lengths = [length for name, length in found if name == what]
            of = [found[what, length] for length in lengths]
            heights = [seconds(each) if "sec" in title else each["peak"] for each in of]
            axes.plot(lengths, heights, marker="o", color=colour, label=what)
        ticks = sorted({length for _, length in found})
        axes.set(xscale="log", yscale="log", xlabel="tokens a completion", title=title)
        axes.set_xticks(ticks, [str(length) for length in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if title.endswith("GiB") else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--columns", type=int, default=PADDED, help="of the output layers (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts (%(default)s)")
    parser.add_argument("--patience", type=float, default=60, metavar="S", help="no longer TRL than that (%(default)s)")
    given = parser.parse_args()
    found = collect(**vars(given))
    title = f"{COMPLETIONS} completions, {given.columns:,} columns, {given.dtype}, {given.device}"
    report(Console(), found, title)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    draw(figure.subplots(1, 2), found)
    figure.savefig("loss.png", dpi=130)
    print(f"figure   {Path('loss.png').absolute()}")


if __name__ == "__main__":
    main()
