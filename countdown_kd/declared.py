"""Which keys a config may have and of what type, from whoever declares them. Imports no torch.

    trainer          the fields of TRL's GOLDConfig
    model, teacher   the arguments of transformers' from_pretrained, and the keys of the model's own config
    task             the arguments of the function in data.py that it calls
    the others       the classes below

The libraries' declarations are read from their sources: importing them takes ten seconds, reading milliseconds. What
values they allow beyond their types, they are asked themselves (rehearsal.py).
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model

from countdown_kd import data
from countdown_kd.countdown import RULES
from countdown_kd.pretrained import model_config

# What a config may have called by its name: instantiating another function could do anything.
TARGETS = {
    "task": tuple(f"countdown_kd.data.{function.__name__}" for function in (data.generated, data.hub, data.jsonl)),
    "trainer": ("trl.experimental.gold.GOLDConfig",),
}

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes them, which every seed reaches
Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]


class Declaration(BaseModel):
    """Known keys and their types. Strict: 5 is also a float, but neither 5.0 nor "5" is an integer."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Eval(Declaration):
    num_puzzles: PositiveInt
    rule: Literal[RULES]
    temperature: Annotated[float, Field(ge=0)]  # 0: the most likely token
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: PositiveInt
    batch_size: PositiveInt
    seed: Seed


class Step(Declaration):
    fused_loss: bool
    completion_logits: bool
    chunked_logits: bool
    teacher_batch_size: PositiveInt | None
    student_batch_size: PositiveInt | None
    trim_padding: bool
    one_weight_push: bool
    rollouts_together: bool
    cast_once: bool
    inference_mode: bool
    empty_cache: bool
    average_micro_batches: bool


class Gen(Declaration):
    dtype: Dtype
    max_num_seqs: PositiveInt | None
    steps_per_rollout: PositiveInt
    cache_implementation: str | None = None


class Dist(Declaration):
    nproc_per_node: Literal["gpu"] | PositiveInt


class Tracking(Declaration):
    uri: str
    experiment: str


class Cell(Declaration):
    """The groups, and the keys outside them. A cell's own process is told nothing of the last four."""

    task: dict
    model: dict
    teacher: dict
    trainer: dict
    step: dict
    gen: dict
    dist: dict
    eval: dict
    seed: Seed
    baseline: Literal["student", "teacher"] | None
    tracking: dict = {}
    force: bool = False
    plan: bool = False
    hydra: Any = None


# GOLDConfig takes any integer and any text. Of the first two nobody looks at the value in time (-3 trains as many steps
# as -1), and the third is the default of eval.max_new_tokens.
NARROWER = {
    "max_steps": Literal[-1] | PositiveInt,
    "vllm_mode": Literal["colocate", "server"],
    "max_completion_length": PositiveInt,
}


class Mismatch(NamedTuple):
    path: str  # trainer.max_steps
    problem: str
    of_type: bool = False  # not only a wrong value: comparing it with others would fail


def mismatches(cfg: Mapping[str, Any]) -> Iterator[Mismatch]:
    """The keys of a resolved config that nobody knows, those that are missing and those with values of another type.

    Raises ModuleNotFoundError where a library is not installed.
    """
    yield from _mismatches("", Cell, cfg, "there is no such key")
    groups = {name: dict(group) for name, group in cfg.items() if isinstance(group, dict)}
    targets = {name: group.pop("_target_", None) for name, group in groups.items()}
    for name, declaration in {"step": Step, "gen": Gen, "dist": Dist, "eval": Eval, "tracking": Tracking}.items():
        if groups.get(name):
            yield from _mismatches(name, declaration, groups[name], "there is no such key")
    if trainer := groups.get("trainer"):
        # An empty list or dictionary says nothing; printed configs have it for what is None today.
        given = {key: value for key, value in trainer.items() if value not in ([], {})}
        yield from _mismatches("trainer", gold_config(), given, "GOLDConfig has no such field")
    for name in ("model", "teacher"):
        if model := groups.get(name):
            known = config_keys(model_config(model))
            given = {key: value for key, value in model.items() if key not in known}
            said = "neither from_pretrained nor the model's config.json knows it"
            yield from _mismatches(name, from_pretrained(), given, said, known)
    if task := groups.get("task"):
        if targets["task"] in TARGETS["task"]:
            function = targets["task"].rpartition(".")[2]
            yield from _mismatches("task", arguments(function), task, f"{function}() has no such argument")


def _mismatches(
    group: str, declaration: type[Declaration], values: Mapping[str, Any], unknown: str, also: frozenset = frozenset()
) -> Iterator[Mismatch]:
    try:
        declaration.model_validate(values)
        return
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    fields = declaration.model_fields
    wrong: dict[str, list[dict]] = {}  # of a union each member has its own error
    for each in errors:
        wrong.setdefault(_path(each["loc"], values), []).append(each)
    for path, found in wrong.items():
        full = f"{group}.{path}".lstrip(".")
        kinds = {each["type"] for each in found}
        if kinds == {"extra_forbidden"}:
            close = difflib.get_close_matches(path, [*fields, *also], n=1)
            few = f"; there is {', '.join(fields)}" if len(fields) < 15 else ""
            yield Mismatch(full, f"{full}: {unknown}{f'; did you mean {close[0]}?' if close else few}")
        elif kinds == {"missing"}:
            yield Mismatch(full, f"{full} must be given", of_type=True)
        else:
            rules = " or ".join(dict.fromkeys(_rule(each["msg"]) for each in found))
            null = ", or null" if path in fields and type(None) in get_args(fields[path].annotation) else ""
            problem = f"{full}={shown(_value(values, path))}: it must be {rules}{null}"
            yield Mismatch(full, problem, any("_type" in kind for kind in kinds))


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _rule(message: str) -> str:
    return message.removeprefix("Input should be ").replace("'", "")


def _path(location: tuple[str | int, ...], values: Any) -> str:
    """The dotted key of an error's place, without the names of a union's members."""
    path = []
    for part in location:
        if path and not (isinstance(values, dict) and part in values):
            break
        path.append(str(part))
        values = values.get(part) if isinstance(values, dict) else None
    return ".".join(path)


def _value(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


# ------------------------------------------------------------------------------------------------
# The libraries' declarations, and data.py's


class Declared(NamedTuple):
    type: Any
    default: Any  # None where it is none that a source shows


@cache
def gold_config_fields() -> dict[str, Declared]:
    """The fields of TRL's GOLDConfig with their types and defaults, read from the installed source.

    Raises ModuleNotFoundError where TRL or transformers is not installed.
    """
    fields: dict[str, Declared] = {}
    for package, file, name in (  # a class before those that it inherits from
        ("trl", "experimental/gold/gold_config.py", "GOLDConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ):
        found = next(node for node in ast.parse(_source(package, file)).body if getattr(node, "name", "") == name)
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.setdefault(node.target.id, Declared(_type(node.annotation), _default(node.value)))
    return fields


@cache
def gold_config() -> type[Declaration]:
    fields = {name: (NARROWER.get(name, field.type), None) for name, field in gold_config_fields().items()}
    return create_model("GOLDConfig", __base__=Declaration, **fields)


@cache
def from_pretrained() -> type[Declaration]:
    """What AutoModelForCausalLM.from_pretrained takes, by its source: named, or taken out of ``kwargs``."""
    base, auto = (
        _function(_source("transformers", file), "from_pretrained")
        for file in ("modeling_utils.py", "models/auto/auto_factory.py")
    )
    taken = re.findall(r'kwargs\.(?:pop|get)\("([a-z]\w*)"|"([a-z]\w*)" in kwargs', base + auto)
    fields = {name or other: (Any, None) for name, other in taken}
    fields |= {each.arg: (_type(each.annotation), None) for each in ast.parse(base).body[0].args.kwonlyargs}
    fields |= {"pretrained_model_name_or_path": (str, ...), "dtype": (Dtype, ...)}
    return create_model("from_pretrained", __base__=Declaration, **fields)


def config_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a model's config that from_pretrained's arguments may replace; ``config`` is its config.json."""
    nested = config.get("text_config") or {}
    sources = {"configuration_utils.py"}
    for kind in {each.get("model_type") for each in (config, nested)} - {None}:
        folder = kind.replace("-", "_")
        sources.add(f"models/{folder}/configuration_{folder}.py")
    return frozenset(config).union(nested, *map(_config_fields, sources)) - {"dtype"}


@cache
def _config_fields(file: str) -> frozenset[str]:
    try:
        classes = ast.parse(_source("transformers", file)).body
    except FileNotFoundError:  # a model with code of its own
        return frozenset()
    keys = set()
    for node in (node for found in classes if isinstance(found, ast.ClassDef) for node in found.body):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            keys.add(node.target.id)
        elif isinstance(node, ast.FunctionDef) and any(ast.unparse(d).endswith(".setter") for d in node.decorator_list):
            keys.add(node.name)
    return frozenset(key for key in keys if not key.startswith("_"))


@cache
def arguments(function: str) -> type[Declaration]:
    """The arguments of one of data.py's tasks. Counts are positive."""
    types = get_type_hints(getattr(data, function))
    types.pop("return")
    fields = {name: (PositiveInt if name.startswith("num_") else kind, ...) for name, kind in types.items()}
    return create_model(function, __base__=Declaration, **fields)


@cache
def _source(package: str, file: str) -> str:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"{package} is not installed; run `make setup`")
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def _function(source: str, name: str) -> str:
    """The text of a method. Parsing the whole of a large file takes a quarter of a second."""
    return textwrap.dedent(re.search(rf"^    def {name}\(.*?(?=^    (?:@|def )|^\S)", source, re.M | re.S)[0])


class _Types(dict):
    def __missing__(self, name: str) -> Any:
        return Any


BUILT_IN = _Types({kind.__name__: kind for kind in (bool, int, float, str, list, dict)}, Literal=Literal)


def _type(annotation: ast.expr) -> Any:
    """A type made of built-in ones; Any in place of a library's own."""
    try:
        # An installed library's own annotation, which importing the library would run too; never anybody's config.
        return eval(ast.unparse(annotation), {"__builtins__": {}}, BUILT_IN)
    except (AttributeError, TypeError):  # os.PathLike, a name that only type checkers know
        return Any


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=…)
        value = next((each.value for each in value.keywords if each.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
