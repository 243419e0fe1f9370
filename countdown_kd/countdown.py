"""The Countdown task: puzzles, prompts, a solver and the checker. Pure Python, no torch.

A puzzle gives a few numbers and a target; an answer is an equation that uses the numbers to reach it:

    >>> from countdown_kd.countdown import Puzzle, check, solve
    >>> puzzle = Puzzle(numbers=(34, 67, 73), target=40)
    >>> solve(puzzle.numbers, puzzle.target)
    '34-67+73'
    >>> check("<answer>34 + 73 - 67 = 40</answer>", puzzle.numbers, puzzle.target).label
    'correct'
    >>> check("<answer>34 + 6 = 40</answer>", puzzle.numbers, puzzle.target)
    Verdict(label='invalid_number_usage', detail='used 34, 6; given 34, 67, 73')

Model output is text here: it is split into tokens and evaluated by a loop over two stacks, never by Python's
own parser, so no text can run, recurse, or take more than linear time.
"""

from __future__ import annotations

import operator
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

# ------------------------------------------------------------------------------------------------
# Puzzles


class Puzzle(NamedTuple):
    """Numbers (in the order shown) and the integer they must reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """The same for two puzzles that differ only in the order of their numbers."""
        return tuple(sorted(self.numbers)), self.target


TINY_MAX_NUMBER = 25
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether generated puzzles over these numbers are for evaluation only (one set of numbers in ten).

    The split is a fixed function of the numbers, not of a seed: whatever seed a run, or the recipe of the tiny
    pair, was given, no model ever trains on numbers that another run evaluates on.
    """
    return zlib.crc32(repr(sorted(numbers)).encode()) % 10 == 0


def tiny_puzzles(seed: int, held_out: bool = False) -> Iterator[Puzzle]:
    """Distinct puzzles that need only + and −: three numbers of 1–25, a target of 1–75.

    Every one is solved by some choice of signs with at least one plus. There are 9,923 puzzles for
    training and 971 held out; then it stops.
    """
    rng = random.Random(f"tiny-{seed}-{held_out}")
    pool = [
        Puzzle((a, b, c), value)
        for a in range(1, TINY_MAX_NUMBER + 1)
        for b in range(a, TINY_MAX_NUMBER + 1)
        for c in range(b, TINY_MAX_NUMBER + 1)
        if is_held_out((a, b, c)) == held_out
        for value in sorted({abs(a + b + c), abs(a + b - c), abs(a - b + c), abs(b + c - a)} - {0})
    ]
    rng.shuffle(pool)
    for puzzle in pool:
        yield Puzzle(tuple(rng.sample(puzzle.numbers, 3)), puzzle.target)


def public_puzzles(seed: int, held_out: bool = False) -> Iterator[Puzzle]:
    """Endless distinct puzzles like the public 3-to-4-number set: numbers 1–99, + − × ÷, target 10–100.

    A random expression over the numbers is drawn until its value is an integer in range, so a solution exists.
    The ranges are those of Jiayi-Pan/Countdown-Tasks-3to4.
    """
    rng = random.Random(f"public-{seed}-{held_out}")
    seen = set()
    while True:
        numbers = tuple(rng.randint(1, 99) for _ in range(rng.choice((3, 4))))
        if is_held_out(numbers) != held_out:
            continue
        value = _random_value([Fraction(n) for n in numbers], rng)
        puzzle = Puzzle(numbers, int(value))
        if value == puzzle.target and 10 <= puzzle.target <= 100 and puzzle.key not in seen:
            seen.add(puzzle.key)
            yield puzzle


def _random_value(values: list[Fraction], rng: random.Random) -> Fraction:
    while len(values) > 1:
        a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
        symbol = rng.choice("+-*/") if b != 0 else rng.choice("+-*")
        values.append(_OPERATORS[symbol](a, b))
    return values[0]


# ------------------------------------------------------------------------------------------------
# Prompts. The H4 texts are those of HuggingFaceTB/Countdown-Task-GOLD to the letter: the published
# accuracies of models hold under this prompt only.

H4_SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then provide the "
    "user with the answer."
)
H4_USER = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the "
    "final equation and answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 = 1 </answer>."
)


def h4_prompt(puzzle: Puzzle) -> list[dict[str, str]]:
    """The published system and user messages for a puzzle."""
    user = H4_USER.format(numbers=list(puzzle.numbers), target=puzzle.target)
    return [{"role": "system", "content": H4_SYSTEM}, {"role": "user", "content": user}]


def short_prompt(puzzle: Puzzle) -> list[dict[str, str]]:
    """The tiny task's one message: ``Make 8 of 3,9,14``."""
    numbers = ",".join(map(str, puzzle.numbers))
    return [{"role": "user", "content": f"Make {puzzle.target} of {numbers}"}]


# ------------------------------------------------------------------------------------------------
# Solver


def solve(numbers: Sequence[int], target: int, operators: str = "+-*/") -> str | None:
    """An expression that uses each number exactly once and equals the target exactly, or None if there is none.

    Exhaustive: any two values are joined by every operator until one is left. Values are exact fractions. Sums
    and differences are tried before products and quotients, so easy puzzles get plain answers.
    """
    dead: set[tuple[Fraction, ...]] = set()  # values from which the target is known to be out of reach

    def search(items: list[tuple[Fraction, str, int]]) -> str | None:
        # An item is (value, text, binding): 2 for a number, 1 for a product or quotient, 0 for a sum.
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        values = tuple(sorted(item[0] for item in items))
        if values in dead:
            return None
        for (i, a), (j, b) in combinations(enumerate(items), 2):
            rest = [item for k, item in enumerate(items) if k not in (i, j)]
            for op in operators:
                for left, right in ((a, b),) if op in "+*" else ((a, b), (b, a)):
                    if op == "/" and right[0] == 0:
                        continue
                    binding = 0 if op in "+-" else 1
                    text = _wrapped(left, binding) + op + _wrapped(right, binding + (op in "-/"))
                    found = search([(_OPERATORS[op](left[0], right[0]), text, binding), *rest])
                    if found is not None:
                        return found
        dead.add(values)
        return None

    return search([(Fraction(n), str(n), 2) for n in numbers])


def _wrapped(item: tuple[Fraction, str, int], binding: int) -> str:
    return f"({item[1]})" if item[2] < binding else item[1]


def tiny_trace(puzzle: Puzzle) -> str:
    """How the solver of the tiny task writes: the sums it tries, largest numbers first, then the one that hits.

    >>> tiny_trace(Puzzle((7, 15, 3), 11))
    '<think>25 19 11</think><answer>15-7+3=11</answer>'
    """
    x, y, z = sorted(puzzle.numbers, reverse=True)
    sums = [
        (f"{x}+{y}+{z}", x + y + z),
        (f"{x}+{y}-{z}", x + y - z),
        (f"{x}-{y}+{z}", x - y + z),
        (f"{x}-{y}-{z}", x - y - z) if x >= y + z else (f"{y}+{z}-{x}", y + z - x),
    ]
    hit = next(i for i, (_, value) in enumerate(sums) if value == puzzle.target)
    tried = " ".join(str(value) for _, value in sums[: hit + 1])
    return f"<think>{tried}</think><answer>{sums[hit][0]}={puzzle.target}</answer>"


# ------------------------------------------------------------------------------------------------
# Checker

CORRECT = "correct"
FAILURES = (
    "missing_answer_tags",
    "lhs_parse_or_eval_error",
    "invalid_number_usage",
    "rhs_parse_or_eval_error",
    "equation_not_balanced",
    "wrong_value",
)
RULES = ("exactly_once", "at_most_once")

# One token: an integer in plain decimals (a leading zero is cut off and then refused for want of an operator), a run
# of parentheses, an operator, or white space.
_TOKEN = re.compile(r"(0|[1-9][0-9]*)|(\(+)|(\)+)|([-+*/])|([ \t\r\n\f\v]+)")
_SIGNS = re.compile(r"[-+ \t\r\n\f\v]+")
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}

# Time stays bounded for hostile text: an expression of more tokens than this counts as none,
_MAX_TOKENS = 10_000
# and as an exact fraction grows with its text, values of longer answers are kept modulo a prime of 39 digits
# (only a text that spells out a multiple of that prime could be judged wrongly).
_EXACT_CHARS = 400
_PRIME = (1 << 127) - 1


class Verdict(NamedTuple):
    """``label`` is "correct" or one of FAILURES; ``detail`` says what was seen, for a person."""

    label: str
    detail: str


class _BadExpression(ValueError):
    """Why a text is no expression, or has no value."""


def check(completion: str, numbers: Sequence[int], target: int, rule: str = "exactly_once") -> Verdict:
    """Judge one completion; the first failure wins, in the order of FAILURES except as noted below.

    1. The last ``<answer>…</answer>`` block (any case, may span lines) must exist and not be empty.
    2. × ÷ − are read as ``* / -``; the text is split at its last ``=`` into a left and a right side.
    3. The left side must be an expression of plain integers, ``+ - * /``, signs and parentheses with a value.
    4. Its integers must be the puzzle's numbers: each exactly once, or (``at_most_once``) a part of them.
    5. A right side, if there is one, must be an expression too and equal the left one.
    6. The value must be the target.

    Raises ValueError for an unknown rule; never for any completion.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    answer = _last_answer(completion)
    if answer is None:
        return Verdict("missing_answer_tags", "no <answer>…</answer> with text in it")
    text = answer.replace("×", "*").replace("÷", "/").replace("−", "-")
    left, _, right = text.rpartition("=") if "=" in text else (text, "", "")
    modulus = None if len(text) <= _EXACT_CHARS else _PRIME
    try:
        literals = []
        left_value = _evaluate(left, modulus, literals)
    except _BadExpression as error:
        return Verdict("lhs_parse_or_eval_error", f"{error} in {_shortened(left)}")

    used, given = Counter(literals), Counter(map(str, numbers))
    if not (used == given if rule == "exactly_once" else used <= given):
        return Verdict(
            "invalid_number_usage",
            f"used {_shortened(', '.join(literals[:20]))}; given {', '.join(map(str, numbers))}",
        )

    if right.strip():
        try:
            right_value = _evaluate(right, modulus, [])
        except _BadExpression as error:
            return Verdict("rhs_parse_or_eval_error", f"{error} in {_shortened(right)}")
        if not _equal(left_value, right_value, modulus):
            return Verdict(
                "equation_not_balanced",
                f"left side is {_shown(left_value, modulus)}, not {_shortened(right)}",
            )
    if not _equal(left_value, (target, 1), modulus):
        return Verdict("wrong_value", f"is {_shown(left_value, modulus)}, target is {target}")
    return Verdict(CORRECT, _shortened(text))


def _last_answer(completion: str) -> str | None:
    raw = completion.encode("utf-8", "replace")  # a lone surrogate becomes a question mark
    folded = raw.lower()  # of bytes: ASCII only, so that no letter of another script can stand in for a tag's
    start = folded.rfind(b"<answer>", 0, max(folded.rfind(b"</answer>"), 0))
    if start < 0:
        return None
    end = folded.find(b"</answer>", start)
    answer = raw[start + len(b"<answer>") : end].decode()
    return answer if answer.strip() else None


def _evaluate(text: str, modulus: int | None, literals: list[str]) -> tuple[int, int]:
    """The value of an expression as (numerator, denominator); its integers are appended to ``literals``.

    Two stacks (Dijkstra's shunting-yard), so depth costs memory and no recursion. Raises _BadExpression.
    """
    values: list[tuple[int, int]] = []
    pending: list[str | int] = []  # operators that wait for their right operand; n stands for n open parentheses
    operand_next, position = True, 0

    def reduce_down_to(binding: int) -> None:
        while pending and isinstance(pending[-1], str) and _BINDING[pending[-1]] >= binding:
            _reduce(values, pending.pop(), modulus)

    for _ in range(_MAX_TOKENS + 1):
        if position == len(text):
            break
        token = _TOKEN.match(text, position)
        if token is None:
            raise _BadExpression(f"unexpected {text[position]!r}")
        position = token.end()
        integer, opening, closing, operator, _space = token.groups()
        if integer:
            if not operand_next:
                raise _BadExpression(f"no operator before {_shortened(integer)}")
            literals.append(integer)
            values.append((_integer(integer, modulus), 1))
            operand_next = False
        elif opening:
            if not operand_next:
                raise _BadExpression("no operator before '('")
            pending.append(len(opening))
        elif closing:
            if operand_next:
                raise _BadExpression("no number before ')'")
            unclosed = len(closing)
            while unclosed:
                reduce_down_to(0)
                if not pending:
                    raise _BadExpression("')' without '('")
                closed = min(unclosed, pending[-1])
                unclosed -= closed
                pending[-1] -= closed
                if not pending[-1]:
                    pending.pop()
        elif operator and operand_next:
            if operator in "*/":
                raise _BadExpression(f"no number before {operator!r}")
            signs = _SIGNS.match(text, position - 1)
            position = signs.end()
            if signs.group().count("-") % 2:
                pending.append("negate")
        elif operator:
            reduce_down_to(_BINDING[operator])
            pending.append(operator)
            operand_next = True
    else:
        raise _BadExpression(f"more than {_MAX_TOKENS} symbols")
    if operand_next:
        raise _BadExpression("a number is missing at the end" if literals else "no number")
    reduce_down_to(0)
    if pending:
        raise _BadExpression("'(' without ')'")
    return values[0]


def _reduce(values: list[tuple[int, int]], symbol: str, modulus: int | None) -> None:
    """Apply an operator to the top of the stack of (numerator, denominator)."""
    n, d = values.pop()
    if symbol == "negate":
        values.append((-n, d))
        return
    m, c = values.pop()  # the left operand, m / c
    if symbol == "+":
        n, d = m * d + n * c, c * d
    elif symbol == "-":
        n, d = m * d - n * c, c * d
    elif symbol == "*":
        n, d = m * n, c * d
    elif n == 0:
        raise _BadExpression("division by zero")
    else:
        n, d = m * d, c * n
    values.append((n, d) if modulus is None else (n % modulus, d % modulus))


def _integer(literal: str, modulus: int | None) -> int:
    if modulus is None:
        return int(literal)
    value = 0
    for i in range(0, len(literal), 300):  # int() is quadratic in the digits, so in pieces
        piece = literal[i : i + 300]
        value = (value * 10 ** len(piece) + int(piece)) % modulus
    return value


def _equal(a: tuple[int, int], b: tuple[int, int], modulus: int | None) -> bool:
    difference = a[0] * b[1] - b[0] * a[1]
    return (difference if modulus is None else difference % modulus) == 0


def _shown(value: tuple[int, int], modulus: int | None) -> str:
    return _shortened(str(Fraction(*value))) if modulus is None else "a number too long to show"


def _shortened(text: str, limit: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "…"
