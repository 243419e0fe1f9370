"""The command `parity`, and what it prints: tables, sentences, a figure."""

from __future__ import annotations

import logging
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from countdown_kd.compare import spelled
from countdown_kd.parity import (
    DRAWN,
    MEASURES,
    ROUNDING,
    Compose,
    Parity,
    differing,
    measure,
    read_side,
    switch,
    values,
)

if TYPE_CHECKING:  # torch with it, which takes seconds that a mistake need not wait for
    from countdown_kd.replay import Replay

KINDS = {"text": "texts", "rollouts": "rollouts"}
WIDEST = 60  # tokens of a sequence in the figure


def parity(given: Sequence[str], compose: Compose) -> int:
    """Print how two configs treat the same batch. Returns 0, or 2 where one of them is none that can be replayed."""
    console = Console(highlight=False)
    try:
        a, b = (read_side(side, compose) for side in given)
        found = Parity(a, b, *differing(a, b))
        for name, value in compose([]).hydra.job.env_set.items():
            os.environ.setdefault(name, str(value))
        with console.status("importing torch, TRL and vLLM"):
            import datasets
            from transformers.utils.logging import disable_progress_bar

            import countdown_kd.replay  # noqa: F401  and all that it needs
        datasets.disable_progress_bars()
        disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")  # the libraries', on arguments that a cell gives them too
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            measure(found, progress)
            switch(found, progress)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        return 2
    show(console, given, found)
    console.print(f"\nfigure   {draw(found, Path('parity.png').absolute())}", soft_wrap=True, markup=False)
    return 0


def show(console: Console, given: Sequence[str], found: Parity) -> None:
    """Print both sides, the keys that make a difference, and what it comes to."""
    for name, side in zip("AB", given, strict=True):
        console.print(f"[bold]{name}[/]  {escape(side) or 'the defaults'}", soft_wrap=True)
    console.print(
        f"One step each from A's weights, at the peak learning rate, on the same {len(found.frozen.rollouts)} prompts: "
        "once with the data's texts, once with rollouts of A's student.\n",
        style="dim",
    )
    console.print(_measures_table(found))
    exactly = "bit for bit" if found.again == found.replays[0] else "up to rounding"
    console.print(f"A, replayed twice, does the same {exactly}; {ROUNDING:g} of a value is rounding\n", style="dim")
    if found.gaps:
        for token in sorted(tokens_apart(*found.replays), reverse=True)[:1]:
            console.print(f"{_token_told(token, found)}\n", markup=False)
        console.print(_units_table(found))
        console.print(
            f"share of the gap in {MEASURES[found.gaps[0]][0]}; means of both steps; last: the largest difference from "
            "A of a token's loss\n",
            style="dim",
        )
    for note in notes(found):
        console.print(note, style="yellow", markup=False)
    for sentence in sentences(found):
        console.print(sentence, style="bold", markup=False)


def _measures_table(found: Parity) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for header in ("", "text\nA", "\nB", "rollouts\nA", "\nB"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for kind, (name, form) in MEASURES.items():
        pairs = zip(*(values(each, kind) for each in found.replays), strict=True)
        cells = ["–" if math.isnan(each) else format(each, form) for pair in pairs for each in pair]
        table.add_row(name, *cells, style="bold" if found.differs(kind, *found.replays) else "dim")
    table.add_row(
        f"loss, {found.micro_batches} micro-batches / 1", *(f"{each:.3g}" for each in found.growth), style="dim"
    )
    return table


def _token_told(token: Token, found: Parity) -> str:
    if token.difference < ROUNDING:
        return "Token by token the losses are the same: what differs is what is made of them."
    texts, (a, b) = token_texts(token, found), token.losses
    before = "".join(texts[max(0, token.index - 8) : token.index])
    return (
        f"The token that differs most: {texts[token.index]!r} after {before!r} (number {token.sequence + 1} of the "
        f"{KINDS[token.kind]}): loss {a:.4g} in A, {b:.4g} in B"
    )


def _units_table(found: Parity) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False)
    table.add_column("key", overflow="fold", min_width=28)
    for header in ("loss", "share\nof gap", "gradient\nnorm", "un-\nchanged", "most of\na token"):
        table.add_column(header, justify="right", no_wrap=True)

    def row(name: str, replay: Replay, share: str) -> None:
        loss, norm, unchanged = (sum(values(replay, each)) / 2 for each in ("loss", "grad_norm", "unchanged"))
        most = max((token.difference for token in tokens_apart(found.replays[0], replay)), default=0.0)
        most = f"{most:.2g}" if most >= ROUNDING else "0"
        table.add_row(name, f"{loss:.5g}", share, f"{norm:.4g}", f"{unchanged:.1%}", most)

    row("[bold]A[/]", found.replays[0], "")
    for unit in found.units:
        if unit.replay and any(found.differs(each, found.replays[0], unit.replay) for each in found.gaps):
            changes = {key: f"{spelled(x)} → {spelled(y)}" for key, (x, y) in unit.values.items()}
            if len(changes) == 1:
                lines = list(changes.values())
            else:
                lines = [f"{key.rpartition('.')[2]}: {change}" for key, change in changes.items()]
            told = f"[bold]{escape(unit.name.removeprefix('trainer.'))}[/]" + "".join(
                f"\n  {escape(line)}" for line in lines
            )
            row(f"{told}\n[dim]{unit.why}[/]", unit.replay, f"{found.share(found.gaps[0], unit):.0%}")
    row("[bold]B[/]", found.replays[1], "100%")
    return table


class Token(NamedTuple):
    """An aligned token at the same place in two replays."""

    difference: float
    kind: str  # text or rollouts
    sequence: int
    index: int
    losses: tuple[float, float]


def tokens_apart(one: Replay, other: Replay) -> Iterator[Token]:
    """The losses of the tokens that two replays have in common."""
    for kind in KINDS:
        for number, pair in enumerate(zip(*(getattr(each, kind).sequences for each in (one, other)), strict=True)):
            s, t = (zip(sequence.ids, sequence.token_losses, strict=False) for sequence in pair)
            for i, ((ids, x), (others, y)) in enumerate(zip(s, t, strict=False)):
                if ids == others:
                    yield Token(abs(x - y), kind, number, i, (x, y))


def token_texts(token: Token, found: Parity) -> list[str]:
    """The text of each aligned token of the token's sequence."""
    from countdown_kd.replay import models

    _, tokenizer = models(OmegaConf.to_yaml(found.a.model))
    return [tokenizer.decode(ids) for ids in getattr(found.replays[0], token.kind).sequences[token.sequence].ids]


# ------------------------------------------------------------------------------------------------
# In words


def notes(found: Parity) -> Iterator[str]:
    """What limits the comparison, and what a person may not expect."""
    keys = [key for unit in found.units for key in unit.values]
    if "teacher.pretrained_model_name_or_path" in keys:
        yield "The teachers differ: the same batch is taught otherwise, whatever else differs."
    if task := [key for key in keys if key.startswith("task.")]:
        yield f"The data differs ({', '.join(task)}): both sides are given A's; B's only shows in what B draws."
    if found.a.trainer.use_vllm or found.b.trainer.use_vllm:
        yield "Here transformers samples on both sides: vLLM would draw other random numbers."
    if found.left_out:
        yield f"Not replayed: {', '.join(found.left_out)} (vLLM's sampling, ranks, or what A cannot have of B alone)."
    for unit in found.units:
        if unit.problem:
            yield f"{unit.called} cannot be replayed without the rest: {unit.problem}"
    for name, cfg, replay in zip("AB", (found.a, found.b), found.replays, strict=True):
        if (unchanged := max(values(replay, "unchanged"))) > 0.5:
            yield (
                f"{name}'s step leaves {unchanged:.1%} of the weights as they were: at learning rate "
                f"{cfg.trainer.learning_rate:g} the update is below the precision of {cfg.model.dtype} weights."
            )


def sentences(found: Parity) -> Iterator[str]:
    """What was found."""
    gaps, number = found.gaps, len({key for unit in (*found.units, *found.untried) for key in unit.values})
    if not gaps:
        exactly = "bit for bit" if found.replays[0] == found.replays[1] else "up to rounding"
        of = f": {_keys(number, 'change')} neither loss nor gradient nor update" if number else ""
        yield f"A and B do the same with the same batch, {exactly}{of}."
    if "grad_norm" in gaps and "clipped_norm" in gaps:
        gaps.remove("clipped_norm")  # it follows
    told: dict[tuple[str, str], list[str]] = {}
    for gap in gaps:
        told.setdefault(explanation(found, gap), []).append(gap)
    for (carriers, rest), (first, *others) in told.items():
        also = "".join(f", in {MEASURES[each][0]}" for each in others)
        yield f"{carriers} the gap in {MEASURES[first][0]} ({_gap(found, first)}){also}{rest}."
    if not found.drawn_apart:
        yield f"Both draw the same {', '.join(DRAWN.values())}."
    for drawn in found.drawn_apart:
        causes = ", ".join(unit.called for unit in found.drawers(drawn)) or "no single key"
        yield f"Other {DRAWN[drawn]} {_parting(found, drawn)}: {causes}."


def explanation(found: Parity, gap: str) -> tuple[str, str]:
    """Which units explain how much of a gap, and what is to be said of the others."""
    carriers = found.carriers(gap)
    if not carriers:
        tried = f", and none of {len(found.pairs)} pairs of keys," if found.pairs else ""
        return f"No key alone{tried} explains", ""
    told = carriers[:1] if abs(1 - carriers[0][1]) <= 0.01 else carriers
    inside = {key for unit, _ in told for key in unit.values}
    moving = [unit for unit, _ in carriers]
    others = [unit for unit in (*found.units, *found.untried) if unit not in moving and not unit.problem]
    number = len({key for unit in others for key in unit.values} - inside)
    rest = f"; {_keys(number, 'explain', 'other ')} none of it" if number else ""
    if abs(1 - sum(share for _, share in told)) > 0.05:
        rest += "; several together do what none of them does alone"
    return " and ".join(f"{unit.called} explains {share:.0%} of" for unit, share in told), rest


def _keys(number: int, verb: str, other: str = "") -> str:
    return f"{number} {other}differing keys {verb}" if number > 1 else f"1 {other}differing key {verb}s"


def _gap(found: Parity, measure: str) -> str:
    """A's and B's value of the step in which they lie further apart."""
    form = MEASURES[measure][1]
    pairs = zip(KINDS.values(), *(values(each, measure) for each in found.replays), strict=True)
    kind, a, b = max(pairs, key=lambda each: abs(each[1] - each[2]))
    return f"{format(a, form)} → {format(b, form)} on the same {kind}"


def _parting(found: Parity, drawn: str) -> str:
    one, other = (getattr(each, drawn) for each in found.draws)
    apart = [i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y] or [min(len(one), len(other))]
    if drawn == "rollouts":
        return f"({len(apart)} of {len(one)})"
    if drawn == "on_policy":
        a, b = (f"{sum(map(sum, each))} of {sum(map(len, each))}" for each in (one, other))
        return f"from step {apart[0] + 1} on ({a} in A, {b} in B)"
    return f"from step {apart[0] + 1} on"


# ------------------------------------------------------------------------------------------------
# As a figure


def draw(found: Parity, file: Path) -> Path:
    """Loss by token, A against B; the share of the gap by key; the sequence with the largest difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["tokens", "shares"], ["sequence", "sequence"]], figsize=(13, 9), layout="constrained", width_ratios=(1, 1.3)
    )
    tokens = list(tokens_apart(*found.replays))
    for (kind, name), colour in zip(KINDS.items(), ("#009E73", "#CC79A7"), strict=True):
        a, b = ([token.losses[side] for token in tokens if token.kind == kind] for side in (0, 1))
        axes["tokens"].scatter(a, b, s=12, alpha=0.6, color=colour, label=name, linewidths=0)
    # Below 1e-5 a token's loss is what fp32 leaves of 0, and may be negative.
    positive = [max(loss, 1e-5) for token in tokens for loss in token.losses]
    limits = (0.7 * min(positive, default=0.1), 1.4 * max(positive, default=1))
    axes["tokens"].plot(limits, limits, color="black", linewidth=0.7, zorder=0)
    axes["tokens"].set(
        title="Loss of each token of the same sequences", xlabel="in A (nats)", ylabel="in B (nats)",
        xscale="log", yscale="log", xlim=limits, ylim=limits,
    )  # fmt: skip
    axes["tokens"].legend(frameon=False, markerscale=2)
    axes["tokens"].grid(alpha=0.25)

    if found.gaps:
        gap = found.gaps[0]
        shares = {unit.called.replace("`", ""): found.share(gap, unit) for unit in found.units if unit.replay}
        bars = {textwrap.fill(name, 40): share for name, share in shares.items() if share}
        if none := [name for name, share in shares.items() if not share]:
            bars[none[0] if len(none) == 1 else f"each of {len(none)} others"] = 0.0
        drawn = axes["shares"].barh(list(bars), [100 * share for share in bars.values()], color="#0072B2", height=0.6)
        axes["shares"].bar_label(drawn, fmt="%.0f %%", padding=4)
        axes["shares"].set(
            title=f"A with one value of B's: how much of the {MEASURES[gap][0]} gap it covers", xlabel="%",
            ylim=(max(len(bars), 4) - 0.5, -0.5),
        )  # fmt: skip
        axes["shares"].margins(x=0.14)
        axes["shares"].axvline(0, color="black", linewidth=0.8)
    else:
        axes["shares"].set_axis_off()
        axes["shares"].text(0.5, 0.5, "A and B do the same with this batch", ha="center", va="center", fontsize=13)

    if tokens:
        worst = max(tokens)
        start = max(0, worst.index - WIDEST // 2)
        texts = [repr(text)[1:-1].replace(" ", "␣") for text in token_texts(worst, found)][start : start + WIDEST]
        a, b = (getattr(each, worst.kind).sequences[worst.sequence].token_losses[start:] for each in found.replays)
        heights = [y - x for x, y in zip(a, b, strict=False)][:WIDEST]
        colours = ["#D55E00" if height > 0 else "#0072B2" for height in heights]
        axes["sequence"].bar(range(len(heights)), heights, color=colours, width=0.7)
        axes["sequence"].axhline(0, color="black", linewidth=0.8)
        axes["sequence"].set(
            title=f"Where they differ most: number {worst.sequence + 1} of the {KINDS[worst.kind]}, token by token",
            ylabel="loss in B − loss in A (nats)", xticks=range(len(texts)), xlim=(-0.8, len(texts) - 0.2),
        )  # fmt: skip
        axes["sequence"].set_xticklabels(texts, rotation=45, ha="right", rotation_mode="anchor", fontsize=10)
    else:
        axes["sequence"].set_axis_off()
        axes["sequence"].text(0.5, 0.5, "this loss is not kept by token", ha="center", va="center", fontsize=13)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
