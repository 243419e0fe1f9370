"""Puzzles and files -> the conversations that GOLD takes and the puzzles that are evaluated, with a fingerprint.

Three sources, one shape (a task's config calls one of them):

    generated   the tiny or the public task from a seed
    hub         HuggingFaceTB/Countdown-Task-GOLD, or a copy of it, through `datasets`
    jsonl       local files with the same columns

No puzzle is ever on both sides: a training row whose numbers and target are also evaluated is dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from countdown_kd.countdown import (
    Puzzle,
    h4_prompt,
    public_puzzles,
    short_prompt,
    solve,
    tiny_puzzles,
    tiny_trace,
)

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


class Example(NamedTuple):
    """A puzzle, the messages that pose it, and for training the assistant's text."""

    puzzle: Puzzle
    prompt: list[dict[str, str]]
    completion: str = ""


class Data(NamedTuple):
    train: list[Example]
    test: list[Example]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any puzzle, prompt or completion on either side."""
        return hashlib.sha256(json.dumps([self.train, self.test]).encode()).hexdigest()[:16]

    def conversations(self) -> Dataset:
        """The training side as GOLDTrainer takes it: columns ``prompt`` and ``completion``, lists of messages."""
        from datasets import Dataset

        return Dataset.from_list(
            [
                {
                    "prompt": example.prompt,
                    "completion": [{"role": "assistant", "content": example.completion}],
                }
                for example in self.train
            ]
        )


def generated(puzzles: Literal["tiny", "public"], num_train: int, num_test: int, seed: int) -> Data:
    """Puzzles from ``seed``; the test side is the same for every seed."""
    if puzzles == "tiny":
        generator, prompt, trace = tiny_puzzles, short_prompt, tiny_trace
    elif puzzles == "public":
        generator, prompt, trace = public_puzzles, h4_prompt, _solved
    else:
        raise ValueError(f"task.puzzles is {puzzles!r}; it must be tiny or public")

    def take(count: int, seed: int, held_out: bool) -> list[Puzzle]:
        taken = list(islice(generator(seed, held_out), count))
        if len(taken) < count:
            side = "held-out" if held_out else "training"
            raise ValueError(f"{count} {side} puzzles asked for; the {puzzles} task has {len(taken)}")
        return taken

    train = [Example(p, prompt(p), trace(p)) for p in take(num_train, seed, held_out=False)]
    test = [Example(p, prompt(p)) for p in take(num_test, 0, held_out=True)]
    return _without_overlap(train, test)


def _solved(puzzle: Puzzle) -> str:
    expression = solve(puzzle.numbers, puzzle.target)
    equation = f"{expression} = {puzzle.target}"
    return f"<think> {equation} </think>\n<answer> {equation} </answer>"


def hub(path: str, train_config: str, test_config: str, num_test: int, revision: str) -> Data:
    """The published data set, or a local folder laid out like it, through ``datasets.load_dataset``."""
    from datasets import load_dataset

    def rows(config: str) -> Iterable[dict]:
        splits = load_dataset(path, config, revision=None if Path(path).exists() else revision)
        if len(splits) != 1:
            raise ValueError(f"{path} [{config}] has the splits {', '.join(splits)}; one was expected")
        return next(iter(splits.values()))

    train = [_train_example(row, f"{path} [{train_config}]") for row in rows(train_config)]
    test = [_test_example(row, f"{path} [{test_config}]") for row in rows(test_config)]
    return _without_overlap(train, test[:num_test])


def jsonl(train_file: str, test_file: str, num_test: int) -> Data:
    """Local files, one JSON object a line; every bad line is an error that names file and line."""
    train, test = ([example for _, example in side] for side in jsonl_examples(train_file, test_file))
    return _without_overlap(train, test[:num_test])


def jsonl_examples(train_file: str, test_file: str) -> tuple[Iterator[tuple[str, Example]], ...]:
    """The examples of both sides, each with its file and line. Raises ValueError at a bad line."""
    train = ((where, _train_example(row, where)) for where, row in _lines(train_file))
    test = ((where, _test_example(row, where)) for where, row in _lines(test_file))
    return train, test


def _lines(file: str) -> Iterable[tuple[str, dict]]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    empty = True
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where, empty = f"{path}, line {number}", False
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {type(row).__name__} where an object was expected")
            yield where, row
    if empty:
        raise ValueError(f"{path}: the file is empty")


def _puzzle(row: dict, where: str) -> Puzzle:
    for column, expected, ok in (
        ("target", "an integer", lambda value: type(value) is int),
        (
            "nums",
            "a list of at least two positive integers",
            lambda value: isinstance(value, list) and len(value) > 1 and all(type(n) is int and n > 0 for n in value),
        ),
    ):
        if column not in row:
            raise ValueError(f"{where}: no {column!r}; it has {', '.join(row) or 'no keys'}")
        if not ok(row[column]):
            raise ValueError(f"{where}: {column!r} is {row[column]!r}, not {expected}")
    return Puzzle(tuple(row["nums"]), row["target"])


def _messages(value: object, where: str) -> list[dict[str, str]]:
    if (
        not isinstance(value, list)
        or not value
        or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    ):
        raise ValueError(f"{where}: messages must be a list of objects with 'role' and 'content'")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _train_example(row: dict, where: str) -> Example:
    puzzle = _puzzle(row, where)
    messages = _messages(row.get("messages"), where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last of at least two messages must be the assistant's")
    return Example(puzzle, messages[:-1], messages[-1]["content"])


def _test_example(row: dict, where: str) -> Example:
    puzzle, prompt = _puzzle(row, where), row.get("prompt")
    if prompt is None:
        return Example(puzzle, h4_prompt(puzzle))
    if isinstance(prompt, str):
        return Example(puzzle, [{"role": "user", "content": prompt}])
    return Example(puzzle, _messages(prompt, where))


def _without_overlap(train: list[Example], test: list[Example]) -> Data:
    evaluated = {example.puzzle.key for example in test}
    kept = [example for example in train if example.puzzle.key not in evaluated]
    if len(kept) < len(train):
        log.info("%d training rows dropped: their puzzles are evaluated", len(train) - len(kept))
    if not kept or not test:
        raise ValueError(f"{len(kept)} training and {len(test)} test puzzles are left; each needs one")
    return Data(kept, test)
