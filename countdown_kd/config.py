"""What a composed config must satisfy, checked before anything is loaded. Imports no torch.

``validate`` tells at once what can be told without the libraries: names, types, files, combinations that this program
cannot run. ``problems`` also has GOLDConfig, the trainer, the optimizer and the samplers look at the values
(rehearsal.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import hydra.utils
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from countdown_kd.data import jsonl, jsonl_examples
from countdown_kd.declared import TARGETS, Dtype, gold_config_fields, mismatches, shown
from countdown_kd.libraries import objections
from countdown_kd.pretrained import is_byte_level, softcaps, token_counter

ROOT = Path(__file__).resolve().parent.parent  # where conf/, sweeps/ and launch.py lie


class ConfigError(ValueError):
    """The user's mistake, told before anything expensive starts; one line a problem."""


def register_resolvers() -> None:
    """Make ``${repo:PATH}`` and ``${package:PATH}`` absolute paths, from whatever folder a run is started.

    ``${name:TEXT}`` is the text as the name of a cell and its folder.
    """
    for name, base in (("repo", ROOT), ("package", ROOT / "countdown_kd")):
        OmegaConf.register_new_resolver(name, lambda path="", base=base: str(base / (path or "")), replace=True)
    OmegaConf.register_new_resolver("name", name_of, replace=True)


LONGEST_NAME = 120  # characters; file systems take 255 bytes, and a folder's name has a number before it


def name_of(text: str) -> str:
    """A name that neither a shell nor Hydra wants quoted; what does not fit is a hash: ``precision-bf16+gen-hf``."""
    name = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# What a cell's result does not depend on: how it is started, where things go, what is written down, who is told.
LAUNCHERS_PART = {"hydra", "tracking", "force", "plan"}
NOT_IN_TRAINER = re.compile(
    "output_dir|logging_(?!nan).*|log_.*|save_.*|report_to|run_name|project|trackio_.*|disable_tqdm|hub_.*|push_to_hub.*"
)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """What a cell's process is told: the composed config without the launcher's part, resolved."""
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in cfg.items()
        if key not in LAUNCHERS_PART
    }


def substance(cfg: DictConfig) -> dict[str, Any]:
    """The part of a composed config that matters to the cell's result, resolved."""
    kept = plain(cfg)
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if not NOT_IN_TRAINER.fullmatch(key)}
    return kept


def identity(cfg: DictConfig) -> str:
    """What a cell is known by: a hash (16 hex digits) of its substance.

    A local file or folder counts by what is in it, not by where it lies, so the same cell has the same identity from
    another folder and on another machine. Code and library versions do not count: whoever wants a cell again after a
    change says ``force=true``.
    """
    text = json.dumps(_by_content(substance(cfg)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _by_content(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _by_content(value, key) for key, value in node.items()}
    if isinstance(node, list):
        return [_by_content(value) for value in node]
    if isinstance(node, str) and key.endswith(("path", "file")) and Path(node).expanduser().exists():
        return _digest(Path(node).expanduser().resolve())
    return node


@cache
def _digest(path: Path) -> str:
    """A hash of a file or of all files below a folder. Of a large file every 64th MiB and the last are read."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with open(file, "rb") as stream:
            step = 1 if size <= 64 * 2**20 else 64
            for start in [*range(0, size, step * 2**20), max(0, size - 2**20)]:
                stream.seek(start)
                digest.update(stream.read(2**20))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# What must not be in a config: secrets, and functions to call


SECRET_KEY = re.compile(
    r"(.*_)?(password|passwd|secret|credentials?|api_?key|(access|private|secret)_key|(api|auth|bearer|hf|hub|access)_token)"
    r"|token",
    re.IGNORECASE,
)
TOKEN = re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-)[A-Za-z0-9]{20,}")
PASSWORD = re.compile(r"\w://[^\s/@]*:[^\s/@]+@")


def masked(text: str) -> str:
    """A text without the users and passwords of its addresses, and without the hub's and other services' tokens."""
    text = re.sub(r"(\w://)(?!/)[^\s'\"]*@", r"\1***@", text)
    return TOKEN.sub(r"\1***", text)


def _secrets(groups: Mapping[str, Any]) -> Iterator[str]:
    """The keys that hold a secret, each with what to do instead. The store's address may: it is written to no file."""
    for path, key, value in _leaves(groups):
        named = SECRET_KEY.fullmatch(key) and value not in (None, "", True, False)  # true: the one of `hf auth login`
        valued = isinstance(value, str) and (TOKEN.search(value) or PASSWORD.search(value))
        if path != "tracking.uri" and (named or valued):
            yield (
                f"{path}: a secret, and configs are stored and shown. Set it in the environment instead (HF_TOKEN, or "
                "`hf auth login` once), and leave this key out"
            )


def instantiate(node: DictConfig, **arguments: Any) -> Any:
    """What a config's ``task`` or ``trainer`` stands for. Raises ConfigError where it names anything else to be called.

    Dictionaries and lists are plain ones: transformers takes nothing else.
    """
    allowed = [target for targets in TARGETS.values() for target in targets]
    given = OmegaConf.to_container(node, resolve=True)
    if wrong := list(_targets({"": given}, {"": allowed})):
        raise ConfigError("\n".join(wrong))
    return hydra.utils.instantiate(given, _convert_="all", **arguments)


def _targets(groups: Mapping[str, Any], allowed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What is named to be called, and may not be; ``allowed`` by the group it stands in."""
    own = {f"{group}._target_".lstrip("."): targets for group, targets in allowed.items()}
    found = {path: value for path, key, value in _leaves(groups) if key == "_target_"}
    for path, value in found.items():
        if value not in own.get(path, ()):
            rule = f"it must be {', '.join(own[path])}" if path in own else "nothing is called here; leave it out"
            yield f"{path}={value}: {rule}"


def _leaves(node: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """The values below a node, each with its dotted path and the last key on it."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}".lstrip("."), str(name))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]", key)
    else:
        yield path, key, node


# ------------------------------------------------------------------------------------------------
# What a cell must satisfy


def validate(cfg: DictConfig) -> None:
    """Raise ConfigError with every problem found in a cell's composed config without asking the libraries."""
    if found := list(_problems(cfg)):
        raise ConfigError("\n".join(found))


def problems(cells: Sequence[DictConfig]) -> list[str]:
    """Why each cell cannot run, a line a problem; empty where nothing is found.

    The libraries are asked about the cells in which ``validate`` finds nothing. That takes half a minute, and nothing
    for what they were asked before.
    """
    found = ["\n".join(_problems(cfg)) for cfg in cells]
    sound = [number for number, problem in enumerate(found) if not problem]
    for number, told in zip(sound, objections([_settings(cells[number]) for number in sound]), strict=True):
        found[number] = masked("\n".join(told))
    return found


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What the libraries are asked of a cell."""
    trainer, gen = (OmegaConf.to_container(cfg[name], resolve=True) for name in ("trainer", "gen"))
    without = {"_target_", "output_dir"}
    if isinstance(trainer["seed"], int) and 0 <= trainer["seed"] < 2**32:
        without.add("seed")  # one is as good as another: a sweep over many is asked about once
    launcher = OmegaConf.select(cfg, "hydra.launcher._target_") or "BasicLauncher"
    if "BasicLauncher" not in launcher:  # what another machine's GPU can do is not known here
        trainer["use_cpu"] = True
        without |= {"fp16", "tf32"}
    return {"trainer": {key: value for key, value in trainer.items() if key not in without}, "gen": gen}


def _problems(cfg: DictConfig) -> Iterator[str]:
    missing = [
        f"{group}.{key}"
        for group, node in cfg.items()
        if group != "hydra" and isinstance(node, DictConfig)
        for key in node
        if OmegaConf.is_missing(node, key)
    ]
    if missing:
        yield f"{', '.join(missing)} must be given, as in {missing[0]}=VALUE"
        return
    try:
        yield from map(masked, _checked(cfg))
    except (ModuleNotFoundError, OmegaConfBaseException) as error:
        yield masked(str(error).splitlines()[0])


def _checked(cfg: DictConfig) -> Iterator[str]:
    plain = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in cfg.items()
        if key != "hydra"
    }
    shown_too = {key: OmegaConf.select(cfg, key) for key in ("hydra.launcher", "hydra.job.env_set")}
    yield from _secrets(plain | {key: OmegaConf.to_container(node) for key, node in shown_too.items() if node})
    targets = list(_targets(plain, TARGETS))
    yield from targets
    wrong = list(mismatches(plain))
    told = {each.path for each in wrong}
    yield from (each.problem for each in wrong if _refers_to(cfg, each.path) not in told)
    if targets or any(each.of_type for each in wrong):
        return  # what follows compares values
    # What is left out has GOLDConfig's default, which for bf16 is: unless fp16.
    plain["trainer"] = {key: field.default for key, field in gold_config_fields().items()} | plain["trainer"]
    if plain["trainer"]["bf16"] is None:
        plain["trainer"]["bf16"] = not plain["trainer"]["fp16"]
    for rule in (_trainer_problems, _sampling_problems, _step_problems, _model_problems, _data_problems):
        yield from rule(plain)


def _refers_to(cfg: DictConfig, path: str) -> str | None:
    """The key that a key takes its value from: ``seed`` for ``trainer.seed``."""
    raw = OmegaConf.to_container(cfg)
    for key in path.split("."):
        raw = raw.get(key) if isinstance(raw, dict) else None
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(raw))
    return found and found[1]


# Keys of GOLDConfig that would do nothing here, or that GOLDTrainer refuses for a reason that is not the user's.
NOT_HERE = {
    "seq_kd": "GOLDTrainer does not read it",
    **dict.fromkeys(
        ("loss_type", "label_smoothing_factor"), "GOLD has a loss of its own (trainer.beta, trainer.use_uld_loss)"
    ),
    "model_init_kwargs": "the student is loaded by model.*",
    **dict.fromkeys(
        ("teacher_model_init_kwargs", "teacher_model_name_or_path", "teacher_model_revision")
        + ("teacher_tokenizer_name_or_path",),
        "the teacher is loaded by teacher.*",
    ),
    **dict.fromkeys(("packing", "padding_free"), "GOLD compares sequence by sequence"),
    "eval_strategy": "the student is evaluated before and after training (eval.*), not in between",
    **dict.fromkeys(("fsdp", "deepspeed"), "a cell is one process, or one a GPU with the whole model (dist=ddp)"),
}


def _trainer_problems(cfg: dict[str, Any]) -> Iterator[str]:
    trainer = cfg["trainer"]
    for key, why in NOT_HERE.items():
        if trainer[key] not in (gold_config_fields()[key].default, None, [], {}):
            yield f"trainer.{key}={shown(trainer[key])}: {why}. Leave it out"
    if trainer["bf16"] and cfg["model"]["dtype"] == "bfloat16":
        yield (
            "trainer.bf16=true over model.dtype=bfloat16: autocast wants fp32 weights, or small updates are rounded "
            "away. Use precision=bf16 (fp32 weights, bf16 arithmetic) or precision=bf16_pure (no autocast)"
        )
    sequences = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    rollouts = trainer["num_generations"]
    prompts = trainer["generation_batch_size"] or sequences // max(rollouts, 1)
    if rollouts > 0 and prompts * rollouts != sequences:
        yield (
            f"{rollouts} rollouts of {prompts} prompts (trainer.num_generations, generation_batch_size) are not the "
            f"{sequences} sequences of an optimizer step (per_device_train_batch_size "
            f"{trainer['per_device_train_batch_size']} x gradient_accumulation_steps "
            f"{trainer['gradient_accumulation_steps']}). Make num_generations a divisor of {sequences}"
        )
    if trainer["save_total_limit"] == 1:
        yield (
            "trainer.save_total_limit=1: the only checkpoint is removed before the next one is whole, and a run "
            "that is killed just then starts over. Set it to 2 or more, or null"
        )
    if trainer["max_length"] and cfg["eval"]["max_new_tokens"] >= trainer["max_length"]:
        yield (
            f"eval.max_new_tokens={cfg['eval']['max_new_tokens']} leaves no room for a prompt in "
            f"trainer.max_length={trainer['max_length']}"
        )


def _sampling_problems(cfg: dict[str, Any]) -> Iterator[str]:
    trainer, dtype = cfg["trainer"], cfg["gen"]["dtype"]
    if not trainer["use_vllm"]:
        samples_in = "bfloat16" if trainer["bf16"] else cfg["model"]["dtype"]
        if dtype != samples_in and {dtype, samples_in} <= set(get_args(Dtype)):  # others are told already
            yield (
                f"gen.dtype={dtype}: with gen=hf the student itself samples, in {samples_in}. "
                "Leave gen.dtype to precision=, or use gen=vllm"
            )
        if cfg["gen"].get("cache_implementation") == "static" and trainer["bf16"]:
            yield (
                "gen.cache_implementation=static with trainer.bf16=true: under autocast keys are fp32 and values bf16, "
                "and transformers' static cache has one dtype. Use precision=bf16_pure, precision=fp32 or gen=vllm"
            )
        return
    if find_spec("vllm") is None:
        yield "gen=vllm: vLLM is not installed. Run `make setup`, pip install vllm, or use gen=hf"
    engines = trainer["vllm_tensor_parallel_size"]
    if trainer["vllm_mode"] == "colocate" and engines > 1:
        yield (
            f"trainer.vllm_tensor_parallel_size={engines}: an engine over several ranks would be given other prompts "
            "and seeds by each of them. Set it to 1, or use gen=vllm_server"
        )


def _step_problems(cfg: dict[str, Any]) -> Iterator[str]:
    step = cfg["step"]
    for key, off in (("chunked_logits", "false"), ("teacher_batch_size", "null")):
        if step[key] and not step["fused_loss"]:
            yield (
                f"step.{key}={shown(step[key])}: TRL's loss wants whole logits. Set step.{key}={off} or "
                "step.fused_loss=true"
            )


def _model_problems(cfg: dict[str, Any]) -> Iterator[str]:
    trainer, step = cfg["trainer"], cfg["step"]
    for group in ("model", "teacher"):
        name = cfg[group]["pretrained_model_name_or_path"]
        # A hub name is OWNER/NAME; whatever else has a slash, or starts like a path, is meant as a local folder.
        path = Path(name)
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        if is_path and not (path / "config.json").is_file():
            what = "has no config.json" if path.exists() else "does not exist"
            yield f"{group}.pretrained_model_name_or_path={name}: the folder {what}"
    if cfg["baseline"]:
        return
    for group, key, off in (("model", "chunked_logits", "false"), ("teacher", "teacher_batch_size", "null")):
        if step[key] and softcaps(cfg[group]):
            yield (
                f"step.{key}={shown(step[key])}: {cfg[group]['pretrained_model_name_or_path']} does more to its logits "
                f"than multiplying hidden states with weights (final_logit_softcapping). Set step.{key}={off}"
            )
    for group in ("model", "teacher") if trainer["use_uld_loss"] else ("model",):
        if trainer["use_extended_uld"] and is_byte_level(cfg[group]) is False:
            yield (
                f"{group}.pretrained_model_name_or_path={cfg[group]['pretrained_model_name_or_path']}: its tokenizer "
                "is no byte-level BPE (Qwen, Llama 3, …), which extended ULD takes alone. Set "
                "+trainer.use_extended_uld=false"
            )


def _data_problems(cfg: dict[str, Any]) -> Iterator[str]:
    task, model = cfg["task"], cfg["model"]
    if task["_target_"] != "countdown_kd.data.jsonl":
        return
    files = task["train_file"], task["test_file"]
    versions = tuple(Path(file).stat().st_mtime_ns if Path(file).exists() else 0 for file in files)
    limit = None if cfg["trainer"]["chat_template_path"] else cfg["trainer"]["max_length"]
    name = model["pretrained_model_name_or_path"], model.get("revision")
    yield from _jsonl_problems(
        files, versions, task["num_test"], name, limit, not cfg["baseline"], cfg["trainer"]["use_vllm"]
    )  # fmt: skip


@cache  # the cells of a sweep mostly have the same files
def _jsonl_problems(
    files: tuple[str, str],
    versions: tuple[int, int],
    num_test: int,
    model: tuple[str, str | None],
    limit: int | None,
    trained: bool,
    sampled_by_vllm: bool,
) -> tuple[str, ...]:
    """What is wrong with the rows of two files; where nothing is, which of them fill ``limit`` tokens alone.

    TRL cuts off the first tokens of what is too long, and ends the run where that is all of a prompt; vLLM takes no
    such prompt.
    """
    try:
        jsonl(*files, num_test)
    except ValueError as error:
        return (str(error),)
    count = token_counter({"pretrained_model_name_or_path": model[0], "revision": model[1]}, limit) if limit else None
    if count is None:
        return ()
    train, test = jsonl_examples(*files)
    rows = [
        (where, each.prompt, [{"role": "assistant", "content": each.completion}]) for where, each in train if trained
    ]
    rows += [(where, each.prompt, []) for where, each in islice(test, num_test) if sampled_by_vllm]
    found = [
        f"{where}: the {part} alone has {tokens} tokens"
        for where, prompt, completion in rows
        for part, tokens in zip(("prompt", "completion"), count(prompt, completion), strict=True)
        if tokens >= limit
    ]
    rule = f"trainer.max_length={limit} is for prompt and completion. Raise it, or leave the row out"
    more = f" ({len(found) - 3} more rows)" if len(found) > 3 else ""
    return tuple(f"{each}; {rule}{more}" for each in found[:3])
