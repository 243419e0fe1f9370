"""Configs as any framework prints or stores them: a printed GOLDConfig(...), YAML, JSON. Read as text, never run."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
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
CALL = r"(?P<name>\w*(?:Config|Arguments|Params))\("
PRINTED = re.compile(rf"^[ \t]*{CALL}", re.M)
WRITTEN = re.compile(rf"(?<!def )(?<!class )\b{CALL}")  # behind args =, or what a logger puts before a line
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")  # PyYAML takes 1e-5 for a word
EXPECTED = "Expected YAML, JSON, or a printed one, such as GOLDConfig(…)"

# Of a printed call: what is quoted, brackets, commas. An apostrophe alone is a letter.
TOKEN = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[([{]|[)\]}]|,""")
KEY = re.compile(r"\s*(\w+)\s*=(?!=)")
MEMBER = re.compile(r"<(\w+\.\w+): (?:'[^']*'|[^<>']*)>")  # an enum's, as repr() shows it
MASKED = re.compile(r"(?<==)<[A-Z_]+>")  # <HUB_TOKEN>


def read_configs(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every config in a file, as (label, flat keys and values).

    A text file may hold several printed ones, as a lab note does; without one, those that a script writes or a logger
    has put words before are taken, or else the whole as JSON or YAML. Raises ConfigError where there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text ({error}). {EXPECTED}") from None
    if file.suffix in (".json", ".yaml", ".yml"):
        found = [(file.name, _loaded(file, text))]
    else:
        found = list(_calls(file, text, PRINTED)) or list(_calls(file, text, WRITTEN))
        if not found and (config := _document(text)):
            found = [(file.name, config)]
    if not found:
        raise ConfigError(f"{file}: no config in it. {EXPECTED}")
    return [(label, flatten(config)) for label, config in found]


def _loaded(file: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not read as {file.suffix[1:].upper()} ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{file}: a config is keys with values, not {type(config).__name__}. Write a line a key, as in bf16: true"
        )
    return config


def _document(text: str) -> dict[str, Any] | None:
    """The keys of a text that is JSON or YAML, whatever its file is called."""
    for load in (json.loads, yaml.safe_load):
        try:
            config = load(text)
        except (ValueError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(config, dict) and all(re.fullmatch(r"[\w.]+", str(key)) for key in config):
            return config
    return None


# ------------------------------------------------------------------------------------------------
# Printed calls


def _calls(file: Path, text: str, opening: re.Pattern) -> Iterator[tuple[str, dict[str, Any]]]:
    end = number = 0
    for found in opening.finditer(text):
        if found.start() < end:
            continue  # it is a value of the one before
        config, end = _call(text, found.start("name"), found.end())
        if config:
            number += 1
            yield _heading(text[: found.start()].splitlines()) or f"{file.name}#{number}", config


def _call(text: str, start: int, inside: int) -> tuple[dict[str, Any], int]:
    """Keys and values of the call at ``start``, and where it ends; ``inside`` is behind its opening bracket."""
    items, end = _items(text, inside)
    if end is None:  # brackets of a value that is not quoted, or the dump is cut off: a line a key
        items, end = _lines(text, inside)
    else:
        try:
            config = _python(text[start:end])
            return (config if isinstance(config, dict) else {}), end
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass  # GOLDConfig prints its values without quotes
    pairs = [(KEY.match(item), item) for item in items]
    return {key[1]: _value(item[key.end() :].strip()) for key, item in pairs if key}, end


def _items(text: str, start: int) -> tuple[list[str], int | None]:
    """The arguments up to the closing bracket, as text, and where that ends; None where it never closes.

    Where each has a line of its own, only a comma that ends a line ends one: a run's name may be "beta=1,seed=2".
    """
    by_line = re.compile(r"\s*\n").match(text, start)
    items, depth, begin = [], 0, start
    for token in TOKEN.finditer(text, start):
        mark = token[0]
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            if depth == 0 and mark == ")" and not text.startswith(",", token.end()):
                return [*items, text[begin : token.start()]], token.end()
            depth = max(0, depth - 1)
        elif mark == "," and depth == 0:
            line_ends = text[token.end() : token.end() + 200].partition("\n")[0].strip() == ""
            if (line_ends or not by_line) and (KEY.match(text, token.end()) or line_ends):
                items.append(text[begin : token.start()])
                begin = token.end()
    return items, None


def _lines(text: str, start: int) -> tuple[list[str], int]:
    items, end = [], start
    for line in text[start:].splitlines(keepends=True):
        end += len(line)
        if line.strip() == ")":
            break
        items.append(line.strip().removesuffix(","))
    return items, end


def _value(text: str) -> Any:
    try:
        return _python(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _python(text: str) -> Any:
    """The value that is written as Python; of a call its arguments. Raises SyntaxError or ValueError for another."""
    text = MASKED.sub(r"'\g<0>'", MEMBER.sub(r"\1", text)).strip()
    return _read(ast.parse(text, mode="eval").body, [line.encode() for line in re.split("\r\n|\r|\n", text)])


def _read(node: ast.expr, lines: list[bytes]) -> Any:
    match node:
        case ast.Call(args=[], keywords=[_, *_] as keywords) if all(each.arg for each in keywords):
            return {each.arg: _read(each.value, lines) for each in keywords}
        case ast.Dict() if None not in node.keys:
            values = (_read(value, lines) for value in node.values)
            return dict(zip(map(ast.literal_eval, node.keys), values, strict=True))
        case ast.List() | ast.Tuple():
            return [_read(each, lines) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        if node.lineno != node.end_lineno:
            return ast.unparse(node)
        return lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()  # columns are bytes


def _heading(lines: list[str]) -> str:
    """What a config is called: the last heading or summary in the fifteen lines above it."""
    for line in reversed(lines[-15:]):
        if found := re.search(r"<summary>(.*?)</summary>|^#+ (.*)", line):
            return (found[1] or found[2]).strip()
    return ""


# ------------------------------------------------------------------------------------------------
# One spelling


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys under GOLDConfig's names, values in one spelling: ``IntervalStrategy.NO`` is "no", 1.0 is 1."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and path.rpartition(".")[2] == "dtypes":
            node = _dtypes(node)
        if isinstance(node, dict) and (node or not path):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            while SECTIONS.match(path):
                path = SECTIONS.sub("", path)
            section, dot, key = path.rpartition(".")
            path = RENAMED.get(path, section + dot + RENAMED.get(key, key))
            # Release 2.10 is not 2.1.
            flat[path] = node if path.startswith("versions.") else _one_spelling(node)

    walk(config, "")
    return flat


def _dtypes(weights: dict[str, int]) -> str:
    """A model's dtypes as loaded, as one value: by dtype, two models would have no key in common."""
    return next(iter(weights)) if len(weights) == 1 else ", ".join(f"{n} {dtype}" for dtype, n in weights.items())


def _one_spelling(value: Any) -> Any:
    if isinstance(value, str):
        member = re.fullmatch(r"[A-Z]\w+\.([A-Z][A-Z0-9_]*)", value)  # an enum's member, as str() shows it
        if member:
            return member[1].lower()
        if not NUMBER.fullmatch(value) or not math.isfinite(number := float(value)):
            return value
        value = int(value) if value.lstrip("+-").isdigit() else number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_one_spelling(each) for each in value]
    return value
