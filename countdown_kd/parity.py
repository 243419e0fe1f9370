"""The same batch through two configs: do they do the same with it, and if not, which key makes the difference?

    python -m countdown_kd parity "precision=bf16" "precision=bf16_pure"

Two runs soon draw other puzzles and other rollouts, and from there their losses say nothing about each other. So A's
first sequences are frozen, with the data's text and with rollouts of A's student, and both configs take one optimizer
step on each from A's weights (replay.py). Then A takes it again with one of B's values at a time, and with two where no
one of them tells. What no batch can show, what is drawn from which seed, is looked up beside it. Imports torch only
once both configs are known to be sound.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress

from countdown_kd.compare import is_sweep, named_run, run_side
from countdown_kd.config import ConfigError, identity, plain, validate
from countdown_kd.differences import LOSS, differences, rank
from countdown_kd.launching.plan import flat
from countdown_kd.tracking import open_store

if TYPE_CHECKING:
    from countdown_kd.replay import Draws, Frozen, Replay

Compose = Callable[[list[str]], DictConfig]

# Those of a config.
SECTIONS = {"model", "teacher", "trainer", "step", "gen", "task", "eval", "dist", "seed", "baseline"}
# The others are read where nothing is trained, or elsewhere.
REPLAYED = ("model.", "teacher.", "trainer.", "step.", "task.")
STUDENT = ("model.pretrained_model_name_or_path", "model.revision")
TOGETHER = {  # keys of which one often cannot have B's value while another has A's
    "precision": ("model.dtype", "trainer.bf16"),
    "lengths": ("trainer.max_length", "trainer.max_completion_length"),
    "batch": (
        "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps", "trainer.num_generations",
        "trainer.generation_batch_size",
    ),
}  # fmt: skip
MOST_PAIRS = 20
ROUNDING = 1e-5  # relative: sums in another order differ by less in fp32
MEASURES = {  # of a step: how they are called and written
    "loss": ("loss", ".5g"),
    "grad_norm": ("gradient norm", ".5g"),
    "clipped_norm": ("gradient norm, clipped", ".5g"),
    "update_norm": ("norm of the update", ".5g"),
    "unchanged": ("weights left unchanged", ".1%"),
    "aligned": ("tokens aligned 1:1", ".1%"),
    "cut": ("tokens cut off", "d"),
}
DRAWN = {  # by a config itself, a step or a prompt at a time
    "puzzles": "puzzles",
    "on_policy": "on-policy micro-batches",
    "rollouts": "rollouts of the same prompts",
    "learning_rates": "learning rates",
}


@dataclass
class Unit:
    """A key that differs, or keys that can only be switched together, and A's config with B's values of them."""

    name: str
    values: dict[str, tuple[Any, Any]]  # A's and B's
    why: str
    cfg: DictConfig
    replay: Replay | None = None
    draws: Draws | None = None
    problem: str = ""  # why it could not be replayed

    @property
    def called(self) -> str:
        keys = ", ".join(self.values)
        return f"`{self.name}`" if self.name in (keys, " with ".join(self.values)) else f"`{self.name}` ({keys})"


@dataclass
class Parity:
    """What both sides do with the same batch, and what single values of B's do to A."""

    a: DictConfig
    b: DictConfig
    units: list[Unit]
    untried: list[Unit]  # that are known to change no result
    left_out: list[str]  # keys of what is not replayed
    frozen: Frozen | None = None
    replays: Sequence[Replay] = ()  # A's and B's
    again: Replay | None = None  # A's, a second time
    draws: Sequence[Draws] = ()  # A's and B's
    micro_batches: int = 2
    growth: Sequence[float] = (1.0, 1.0)  # the loss in so many micro-batches over the loss in one
    pairs: list[Unit] = field(default_factory=list)  # of two units, tried where no single one tells

    def differs(self, measure: str, one: Replay, other: Replay) -> bool:
        """Whether two replays lie further apart than A from itself, and than rounding can bring them."""
        a = values(self.replays[0], measure)
        noise = max(abs(x - y) for x, y in zip(a, values(self.again, measure), strict=True))
        noise = max(noise, 0.001 if measure == "unchanged" else ROUNDING * max(a))
        return any(abs(x - y) > noise for x, y in zip(values(one, measure), values(other, measure), strict=True))

    @property
    def gaps(self) -> list[str]:
        """The measures in which A and B differ; what is aligned and cut off tells why, and is not counted."""
        return [each for each in MEASURES if each not in ("aligned", "cut") and self.differs(each, *self.replays)]

    @property
    def drawn_apart(self) -> list[str]:
        return [each for each in DRAWN if getattr(self.draws[0], each) != getattr(self.draws[1], each)]

    def share(self, measure: str, unit: Unit) -> float:
        """The share of the gap between A and B that A covers with the unit's values.

        A gap has two parts, on the data's text and on the rollouts; of a move the part in their direction counts.
        """
        if unit.replay is None or not self.differs(measure, self.replays[0], unit.replay):
            return 0.0
        a, b, x = (values(each, measure) for each in (*self.replays, unit.replay))
        gap = [q - p for p, q in zip(a, b, strict=True)]
        return sum((q - p) * g for p, q, g in zip(a, x, gap, strict=True)) / sum(g * g for g in gap)

    def carriers(self, measure: str) -> list[tuple[Unit, float]]:
        """The units that cover a hundredth of a gap or more: first those that cover it all, then by their shares."""
        shares = [(unit, self.share(measure, unit)) for unit in self.units]
        shares = [(unit, share) for unit, share in shares if abs(share) >= 0.01]
        return sorted(shares, key=lambda each: (abs(1 - each[1]) > 0.01, len(each[0].values), -abs(each[1])))

    def drawers(self, drawn: str) -> list[Unit]:
        """The units that change what is drawn, without those of which a single key does."""
        a = getattr(self.draws[0], drawn)
        found = [unit for unit in self.units if unit.draws and getattr(unit.draws, drawn) != a]
        alone = {unit.name for unit in found if len(unit.values) == 1}
        return [unit for unit in found if unit.name in alone or not alone & set(unit.values)]


def values(replay: Replay, measure: str) -> tuple[float, float]:
    """A measure of the step on the data's text, and of the step on the rollouts."""
    return getattr(replay.text, measure), getattr(replay.rollouts, measure)


# ------------------------------------------------------------------------------------------------
# Two configs, and the keys between them


def read_side(given: str, compose: Compose) -> DictConfig:
    """The composed config that is meant: a YAML file, overrides, or a run. Raises ConfigError, Hydra's errors."""
    file = os.path.expanduser(given)
    if os.path.isfile(file):  # Path would raise where overrides are longer than a name may be
        try:
            cfg = OmegaConf.load(file)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{given}: cannot be read as YAML ({error})") from None
    elif _is_one_cell(given):
        cfg = compose(shlex.split(given))
    else:  # the name of a run may be its overrides, between commas
        client, experiment_id = open_store(compose([]).tracking)
        try:
            run = named_run(client, experiment_id, given)
        except ConfigError as error:
            if "=" not in given:
                raise
            raise ConfigError(
                f"{error}\n{given}: as overrides these are several cells, and a side is one. Give single values, with "
                'blanks between them, as in "seed=1 precision=bf16" "seed=2 precision=bf16"'
            ) from None
        if is_sweep(run):
            raise ConfigError(f"{given}: a sweep; give one of its cells")
        cfg = OmegaConf.create(run_side(client, run).artifact("config/composed.yaml"))
    lacks = sorted(SECTIONS - set(cfg)) if isinstance(cfg, DictConfig) else ["keys"]
    if lacks:
        raise ConfigError(
            f"{given}: no composed config, it lacks {', '.join(lacks)}. Give what `python launch.py … --cfg job` "
            "prints, a cell.yaml, overrides in quotes, or a run"
        )
    cfg = OmegaConf.create(plain(cfg))
    validate(cfg)
    if cfg.baseline:
        raise ConfigError(f"{given}: baseline={cfg.baseline} trains nothing. Give a cell that trains")
    return cfg


def _is_one_cell(given: str) -> bool:
    """Whether overrides are meant, and none of them has several values: a comma may also be inside brackets."""
    if "," not in given:
        return not given.strip() or "=" in given
    try:
        overrides = OverridesParser.create().parse_overrides(shlex.split(given))
    except (ValueError, HydraException):
        return False
    return not any(override.is_sweep_override() for override in overrides)


def differing(a: DictConfig, b: DictConfig) -> tuple[list[Unit], list[Unit], list[str]]:
    """The units that can change a result, those that are known not to, and the keys of what is not replayed.

    Raises ConfigError where the students differ.
    """
    found = {each.key: each for each in differences([flat(a), flat(b)])}
    # Folders that lie elsewhere and hold the same are the same; gen.dtype follows where the student itself samples.
    same = identity(switched(a, b, []))
    found = {key: each for key, each in found.items() if identity(switched(a, b, [key])) != same}
    for key in STUDENT:
        if key in found:
            one, other = found[key].values
            raise ConfigError(
                f"{key}: {one} and {other}. Both sides start from the same weights: give both the same student "
                f'("{key}={one}")'
            )

    def unit(name: str, keys: list[str]) -> Unit:
        return Unit(name, {key: found[key].values for key in keys}, found[keys[0]].why, switched(a, b, keys))

    groups = {name: [key for key in keys if key in found] for name, keys in TOGETHER.items()}
    groups = {name: keys for name, keys in groups.items() if len(keys) > 1}
    task = [key for key in found if key.startswith("task.")] if "task._target_" in found else []
    if task:  # the arguments of another function
        groups["task"] = task
    units, left_out = [], [key for key in found if key.startswith("dist.") or key == "gen.dtype"]
    for key in found:
        if key.startswith(REPLAYED) and key not in task:
            alone = unit(key, [key])
            try:
                validate(alone.cfg)
                units.append(alone)
            except ConfigError:
                left_out += [] if any(key in keys for keys in groups.values()) else [key]
    units += [unit(name, keys) for name, keys in groups.items()]
    tried = [each for each in units if any(found[key].rank == LOSS for key in each.values)]
    return tried, [each for each in units if each not in tried], left_out


def switched(a: DictConfig, b: DictConfig, keys: Sequence[str]) -> DictConfig:
    """``a`` with the values that ``b`` has of some keys, as far as it is trained with."""
    cfg, given = deepcopy(a), flat(b)
    for key in keys:
        section, _, last = key.rpartition(".")
        if key in given:
            OmegaConf.update(cfg, key, given[key], merge=False, force_add=True)
        elif isinstance(parent := OmegaConf.select(cfg, section), DictConfig):
            parent.pop(last, None)
    cfg.eval.max_new_tokens = min(a.eval.max_new_tokens, b.eval.max_new_tokens)  # room for it in both max_length
    if not cfg.trainer.use_vllm:  # the student itself samples
        cfg.gen.dtype = "bfloat16" if cfg.trainer.get("bf16") else cfg.model.dtype
    return cfg


# ------------------------------------------------------------------------------------------------
# Measuring


def measure(found: Parity, progress: Progress) -> None:
    """Freeze A's batch and replay both sides. Raises ValueError where one cannot be replayed."""
    from countdown_kd import replay

    sides = {"A": found.a, "B": found.b}
    task = progress.add_task("sampling A's rollouts", total=7)
    found.frozen = replay.freeze(*sides.values())

    def each(function: Callable, description: str, names: str) -> list[Any]:
        results = []
        for name in names:
            progress.update(task, advance=1, description=description.format(name))
            results.append(function(sides[name], found.frozen))
        return results

    *found.replays, found.again = each(replay.replay, "replaying {}", "ABA")
    found.draws = each(replay.draws, "what {} draws", "AB")
    progress.update(task, advance=1, description="accumulating")
    found.micro_batches = max(2, *(cfg.trainer.gradient_accumulation_steps for cfg in sides.values()))
    found.growth = [
        replay.growth(cfg, found.frozen, own.text, found.micro_batches)
        for cfg, own in zip(sides.values(), found.replays, strict=True)
    ]
    progress.remove_task(task)


def switch(found: Parity, progress: Progress) -> None:
    """Replay A with each unit's values of B, where the sides differ in what a unit can change."""
    from countdown_kd import replay

    def each(units: list[Unit], attribute: str, function: Callable) -> None:
        for unit in progress.track(units):
            progress.update(progress.task_ids[-1], description=f"A with B's {unit.name}")
            try:
                setattr(unit, attribute, function(unit.cfg, found.frozen))
            except (ValueError, HydraException) as error:
                unit.problem = str(error.__cause__ or error)  # Hydra says which call it was, GOLDConfig what is wrong

    if found.gaps:
        each([unit for unit in found.units if not unit.name.startswith("task")], "replay", replay.replay)
        if found.untried and not all(found.carriers(gap) for gap in found.gaps):
            each(found.untried, "replay", replay.replay)
            found.units, found.untried = found.units + found.untried, []
    if found.drawn_apart:
        each(found.units, "draws", replay.draws)
    found.pairs = pairs(found)
    each(found.pairs, "replay", replay.replay)
    weak = untold(found)
    found.units += [pair for pair in found.pairs if any(abs(1 - found.share(gap, pair)) < 0.1 for gap in weak)]


def untold(found: Parity) -> list[str]:
    """The measures of whose gap no unit covers even half."""
    return [gap for gap in found.gaps if all(abs(share) < 0.5 for _, share in found.carriers(gap))]


def pairs(found: Parity) -> list[Unit]:
    """Two units' values of B at once, where some gap is untold; at most MOST_PAIRS, the likeliest first.

    A small update is lost in bf16 weights: that takes both a precision and a learning rate. Others follow by how many
    of the two change anything.
    """
    if not untold(found):
        return []
    able = [unit for unit in found.units if unit.replay and any(rank(key)[0] == LOSS for key in unit.values)]

    def unlikely(pair: tuple[Unit, Unit]) -> tuple[bool, int]:
        keys = " ".join(key for unit in pair for key in unit.values)
        moving = sum(any(found.share(gap, unit) for gap in found.gaps) for unit in pair)
        return not ("model.dtype" in keys and "learning_rate" in keys), -moving

    def joined() -> Iterator[Unit]:
        for one, other in sorted(combinations(able, 2), key=unlikely):
            if not one.values.keys() & other.values.keys():
                values = one.values | other.values
                cfg = switched(found.a, found.b, list(values))
                try:
                    validate(cfg)
                except ConfigError:
                    continue
                yield Unit(f"{one.name} with {other.name}", values, f"{one.why}; {other.why}", cfg)

    return list(islice(joined(), MOST_PAIRS))
