"""Configs as any framework prints or stores them: a printed GOLDConfig(...), YAML, JSON. Read as text, never run."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import yaml

from countdown_kd.config import ConfigError

# What other frameworks and older releases call it, and what GOLDConfig calls it now.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "mixed_precision_dtype": "mixed_precision",
    "optimizer": "optim",
    "output_folder": "output_dir",
}
# Sections that only group keys. Oumi: training.gold.beta; ours: trainer.beta.
SECTIONS = re.compile(r"^(trainer|training|gold|trl|params)\.")
OPENING = re.compile(r"^\s*(\w*(?:Config|Arguments))\((.*)$")  # not the call in a script, which gives no defaults


def read_configs(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every config in a file, as (label, flat keys and values).

    A text file may hold several printed ones, as a lab note does. Raises ConfigError where there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text ({error})") from None
    if file.suffix == ".json":
        found = [(file.name, _loaded(file, json.loads, text))]
    elif file.suffix in (".yaml", ".yml"):
        found = [(file.name, _loaded(file, yaml.safe_load, text))]
    else:
        found = list(_printed(file, text))
    if not found:
        raise ConfigError(f"{file}: no config in it. Expected YAML, JSON, or a printed one, such as GOLDConfig(…)")
    return [(label, flatten(config)) for label, config in found]


def _loaded(file: Path, load: Any, text: str) -> dict[str, Any]:
    try:
        config = load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a config is keys with values, not {type(config).__name__}")
    return config


def _printed(file: Path, text: str):
    lines = text.splitlines()
    number = 0
    for start, line in enumerate(lines):
        opening = OPENING.match(line)
        if not opening:
            continue
        config = _one_line(line.strip()) if line.rstrip().endswith(")") else _block(lines[start + 1 :])
        if config:
            number += 1
            yield _heading(lines[:start]) or f"{file.name}#{number}", config


def _block(lines: list[str]) -> dict[str, Any]:
    """The keys up to the closing parenthesis: a line each, ``key=value,``."""
    config = {}
    for line in lines:
        if line.strip() == ")":
            break
        key, equals, value = line.strip().partition("=")
        if equals and key.isidentifier():
            config[key] = _value(value.removesuffix(","))
    return config


def _one_line(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    if not isinstance(call, ast.Call):
        return {}
    return {each.arg: _value(ast.unparse(each.value)) for each in call.keywords if each.arg}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _heading(lines: list[str]) -> str:
    """What a config is called: the last heading or summary in the fifteen lines above it."""
    for line in reversed(lines[-15:]):
        if found := re.search(r"<summary>(.*?)</summary>|^#+ (.*)", line):
            return (found[1] or found[2]).strip()
    return ""


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys under GOLDConfig's names, values in one spelling: ``IntervalStrategy.NO`` is "no", 1.0 is 1."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            while SECTIONS.match(path):
                path = SECTIONS.sub("", path)
            section, dot, key = path.rpartition(".")
            path = RENAMED.get(path, section + dot + RENAMED.get(key, key))
            flat[path] = _one_spelling(node)

    walk(config, "")
    return flat


def _one_spelling(value: Any) -> Any:
    if isinstance(value, str):
        member = re.fullmatch(r"[A-Z]\w+\.([A-Z][A-Z0-9_]*)", value)  # an enum's member, as str() shows it
        return member[1].lower() if member else value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_one_spelling(each) for each in value]
    return value
