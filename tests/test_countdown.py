"""The Countdown task: its puzzles and prompts, its solver and, above all, its checker.

The checker is tried by hand, rule by rule; against two oracles that share no code with it (trees
evaluated as they were built, and Python's own parser); and with texts that are meant to break it.
"""

import ast
import doctest
import inspect
import operator
import random
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import islice, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countdown_kd import countdown
from countdown_kd.countdown import (
    CORRECT,
    FAILURES,
    RULES,
    Puzzle,
    check,
    h4_prompt,
    is_held_out,
    public_puzzles,
    short_prompt,
    solve,
    tiny_puzzles,
)

ROOT = Path(__file__).parents[1]
GENERATORS = (tiny_puzzles, public_puzzles)
PUZZLES = [
    puzzle
    for puzzles in GENERATORS
    for held_out in (False, True)
    for puzzle in islice(puzzles(seed=0, held_out=held_out), 100)
]
SPELLINGS = {"+": ["+"], "-": ["-", "−"], "*": ["*", "×"], "/": ["/", "÷"]}
SPACES = ["", "", " ", "  ", "\n", "\t", "\r\n"]
property_test = settings(deadline=None, max_examples=300, database=None)


def label_of(answer, numbers=(34, 67, 73), target=40, rule="exactly_once"):
    return check(f"<answer>{answer}</answer>", numbers, target, rule).label


# ------------------------------------------------------------------------------------------------
# The module


def test_importing_the_task_imports_no_torch():
    code = "import sys, countdown_kd.countdown; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_examples_in_the_docstrings_hold():
    results = doctest.testmod(countdown)
    assert results.attempted and not results.failed


# ------------------------------------------------------------------------------------------------
# Puzzles and prompts


@pytest.mark.parametrize("puzzles", GENERATORS)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_seed_fixes_the_puzzles(puzzles, held_out):
    first, again, other = (list(islice(puzzles(seed, held_out), 50)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("puzzles", GENERATORS)
def test_puzzles_are_distinct_whatever_the_order_of_their_numbers(puzzles):
    some = list(islice(puzzles(seed=3), 2_000))
    assert len({(tuple(sorted(puzzle.numbers)), puzzle.target) for puzzle in some}) == len(some)
    assert len({puzzle.key for puzzle in some}) == len(some)


def test_tiny_puzzles_are_what_their_docstring_says():
    training, held_out = (list(tiny_puzzles(seed=4, held_out=flag)) for flag in (False, True))
    numbers = {n for puzzle in training for n in puzzle.numbers}
    targets = {puzzle.target for puzzle in training}
    claims = [
        f"three numbers of {min(numbers)}–{max(numbers)}",
        f"a target of {min(targets)}–{max(targets)}",
        f"{len(training):,} puzzles for training and {len(held_out):,} held out",
    ]
    docstring = " ".join(tiny_puzzles.__doc__.split())
    assert [claim for claim in claims if claim not in docstring] == []
    assert len({puzzle.key for puzzle in training + held_out}) == len(training + held_out)


def test_public_puzzles_are_in_range():
    puzzles = list(islice(public_puzzles(seed=4), 5_000))
    assert {len(puzzle.numbers) for puzzle in puzzles} == {3, 4}
    assert {n for puzzle in puzzles for n in puzzle.numbers} == set(range(1, 100))
    assert {puzzle.target for puzzle in puzzles} == set(range(10, 101))


def test_every_generated_puzzle_has_a_solution():
    assert all(solve(*puzzle) for puzzle in islice(public_puzzles(seed=5), 300))
    assert all(solve(*puzzle, operators="+-") for puzzle in islice(tiny_puzzles(seed=5), 2_000))


def test_no_numbers_are_both_trained_on_and_held_out_whatever_the_seeds():
    seen = {
        held_out: {
            tuple(sorted(puzzle.numbers))
            for puzzles, seed in product(GENERATORS, range(3))
            for puzzle in islice(puzzles(seed, held_out), 1_000)
        }
        for held_out in (False, True)
    }
    assert seen[True] and seen[False].isdisjoint(seen[True])


@given(st.lists(st.integers(1, 99), min_size=3, max_size=4), st.randoms())
@property_test
def test_whether_numbers_are_held_out_does_not_depend_on_their_order(numbers, rng):
    shuffled = rng.sample(numbers, len(numbers))
    assert is_held_out(numbers) == is_held_out(tuple(shuffled))


def test_the_h4_prompt_is_the_published_one_to_the_letter():
    system = (
        "You are a helpful assistant. You first think about the reasoning process in the mind"
        " and then provide the user with the answer."
    )
    user = (
        "Using the numbers [34, 67, 73], create an equation that equals 40. You can use basic"
        " arithmetic operations (+, -, *, /) and each number can only be used once. Show your"
        " work in <think> </think> tags. And return the final equation and answer in <answer>"
        " </answer> tags, for example <answer> (1 + 2) / 3 = 1 </answer>."
    )
    assert h4_prompt(Puzzle((34, 67, 73), 40)) == [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
    ]


def test_the_short_prompt_is_the_one_message_of_its_docstring():
    (message,) = short_prompt(Puzzle((3, 9, 14), 8))
    assert message["role"] == "user"
    assert f"``{message['content']}``" in short_prompt.__doc__


# ------------------------------------------------------------------------------------------------
# Solver


@pytest.mark.parametrize("numbers, target", [((1, 1, 1), 50), ((2, 4, 6), 7.5), ((3,), 4), ((), 0), ((1, 1, 1, 1), 10)])
def test_an_unsolvable_puzzle_has_no_answer(numbers, target):
    assert solve(numbers, target) is None


def test_the_solver_keeps_to_the_operators_it_is_given():
    assert solve((2, 3, 4), 24) is not None
    assert solve((2, 3, 4), 24, operators="+-") is None
    assert set(solve((2, 3, 4), 24, operators="*")) <= set("234*")


def test_with_signs_alone_the_solver_reaches_all_that_can_be_reached():
    # Any choice of signs but three minuses: a first number without a sign is one with a plus.
    reachable = {a * 3 + b * 8 + c * 20 for a, b, c in product((1, -1), repeat=3) if (a, b, c) != (-1,) * 3}
    targets = range(-40, 41)
    assert {t for t in targets if solve((3, 8, 20), t, operators="+-")} == reachable


def test_the_solver_finds_answers_that_pass_through_a_fraction():
    assert label_of(solve((3, 3, 8, 8), 24), (3, 3, 8, 8), 24) == CORRECT
    assert label_of(solve((1, 5, 5, 5), 24), (1, 5, 5, 5), 24) == CORRECT


def test_the_solver_brackets_what_it_subtracts_or_divides_by():
    assert label_of(solve((2, 4, 6), 4, operators="-"), (2, 4, 6), 4) == CORRECT
    assert label_of(solve((2, 4, 6), 3, operators="/"), (2, 4, 6), 3) == CORRECT


def test_the_solver_divides_by_no_zero():
    assert solve((0, 0, 5), 7) is None


def retold(expression, target, rng):
    """The same answer as a model might write it."""
    words = [rng.choice(SPELLINGS.get(w, [w])) for w in re.findall(r"\d+|\D", expression)]
    words = [f"({w})" if w.isdigit() and rng.random() < 0.2 else w for w in words]
    text = rng.choice(["{}", "({})", " (( {}) ) "]).format(rng.choice(SPACES).join(words))
    return text + rng.choice(["", "=", f"={target}", f" = {target}\n", f" = ({target})", " = +40-0"])


@given(st.sampled_from(PUZZLES), st.sampled_from(RULES), st.randoms())
@property_test
def test_the_solver_is_right_however_its_answer_is_written(puzzle, rule, rng):
    answer = retold(solve(*puzzle), puzzle.target, rng).replace("+40-0", f"+{puzzle.target}-0")
    assert label_of(answer, *puzzle, rule) == CORRECT


# ------------------------------------------------------------------------------------------------
# Checker, by hand


def test_the_labels_are_correct_and_the_six_failures():
    assert (CORRECT, *FAILURES) == (
        "correct",
        "missing_answer_tags",
        "lhs_parse_or_eval_error",
        "invalid_number_usage",
        "rhs_parse_or_eval_error",
        "equation_not_balanced",
        "wrong_value",
    )


@pytest.mark.parametrize(
    "answer",
    [
        "34 + 73 - 67 = 40",
        "34+73-67",
        "34+73-67=",
        "34 + 73 - 67 = \n",
        "\n34\t+ 73\r\n- 67\f=\v40 ",
        "((34)) + ((73 - 67)) = (40)",
        "+ 34 + 73 - 67",
        "- - 34 - - 73 + - 67 = -+-40",
        "-(67 - 73) + 34",
        "34 + 73 − 67 = 40",
        "34 + 73 - 67 = 8 × 10 ÷ 2",
        "34 + 73 - 67 = 99 * 40 / 99",
        " " * 1_000 + "34 + 73 - 67 = 40",
    ],
)
def test_a_correct_answer_is_told_however_it_is_spaced_signed_and_bracketed(answer):
    assert label_of(answer) == CORRECT


@pytest.mark.parametrize(
    "answer, value",
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("10-(4-3)", 9),
        ("24/4/3", 2),
        ("24/(4/3)", 18),
        ("24/4*3", 18),
        ("24/(4*3)", 2),
        ("100-2*3-4", 90),
        ("-2*3+10", 4),
        ("2*-3+10", 4),
        ("12/-3*2", -8),
        ("12/-(3*2)", -2),
        ("10--3", 13),
        ("10-+-3", 13),
        ("-(2+3)*4", -20),
        ("-2-3", -5),
        ("8/(3-8/3)", 24),
        ("1/3+2/3", 1),
        ("0*5", 0),
        ("0/5", 0),
        ("1000000000000000000000*7", 7 * 10**21),
    ],
)
def test_expressions_have_the_value_arithmetic_gives_them(answer, value):
    numbers = [int(n) for n in re.findall(r"\d+", answer)]
    assert label_of(f"{answer} = {value}", numbers, value) == CORRECT
    assert label_of(answer, numbers, value) == CORRECT
    assert label_of(answer, numbers, value + 1) == "wrong_value"


NOT_EXPRESSIONS = {
    "leading zero": "034 + 73 - 67",
    "two zeros": "00 + 34",
    "underscore": "3_4 + 73 - 67",
    "hexadecimal": "0x10",
    "octal": "0o7",
    "binary": "0b1",
    "decimal point": "3.0",
    "bare point": "34. + 73 - 67",
    "exponent": "1e3",
    "imaginary": "3j",
    "product without a sign": "2(3)",
    "product of a signed number": "2(-3)",
    "two brackets": "(34)(73)",
    "bracket then number": "(34) 73",
    "two numbers": "34 73",
    "caret": "2^3",
    "power": "2**3",
    "huge power": "9**9**9",
    "floor division": "3//2",
    "remainder": "73 % 67",
    "invert": "~34",
    "comma": "34, 73",
    "Python comment": "34 + 73 - 67 # 40",
    "C comment": "34 + 73 - 67 /* 40 */",
    "HTML comment": "34 + 73 - 67 <!-- 40 -->",
    "call": "abs(34)",
    "factorial": "3!",
    "words": "The answer is 34 + 73 - 67",
    "LaTeX": r"\frac{34}{67}",
    "markdown": "**34 + 73 - 67**",
    "quotes": "'34 + 73 - 67'",
    "square brackets": "[34 + 73] - 67",
    "ends in an operator": "34 +",
    "starts with an operator": "* 34",
    "sign before an operator": "34 + * 73",
    "two operators": "34 * / 73",
    "only a sign": "-",
    "unclosed bracket": "(34 + 73",
    "unopened bracket": "34 + 73)",
    "turned brackets": ")34(",
    "closed too often": "((34)))",
    "empty brackets": "34 + ()",
    "operator before a bracket closes": "(34 +) 73",
    "comparison": "34 > 73",
    "division by zero": "34 / 0",
    "division by nothing left": "34 / (67 - 67)",
    "division by minus zero": "1 / -0",
    "division by a fraction of zero": "1 / (0 / 5)",
    "NUL": "34\0+ 73 - 67",
    "Arabic digits": "٣٤ + 73 - 67",
    "Devanagari digits": "३४ + 73 - 67",
    "full-width digits": "３４ + 73 - 67",
    "mixed digits": "3４ + 73 - 67",
    "mathematical digits": "𝟛𝟜 + 73 - 67",
    "superscript": "34²",
    "one half": "½",
    "Roman numeral": "Ⅳ",
    "en dash": "73 – 67",
    "middle dot": "34 · 73",
    "full-width plus": "34 ＋ 73",
    "fraction slash": "34 ⁄ 67",
    "zero-width space": "34\u200b + 73 - 67",
    "no-break space": "34\u00a0+ 73 - 67",
    "lone surrogate": "34 + 73 - 67\ud800",
    "full-width equals sign": "34 + 73 - 67 ＝ 40",
}


@pytest.mark.parametrize("text", NOT_EXPRESSIONS.values(), ids=NOT_EXPRESSIONS.keys())
def test_what_is_no_expression_is_a_parse_error_on_either_side(text):
    assert label_of(text) == "lhs_parse_or_eval_error"
    assert label_of(f"{text} = 40") == "lhs_parse_or_eval_error"
    assert label_of(f"34 + 73 - 67 = {text}") == "rhs_parse_or_eval_error"


@pytest.mark.parametrize("answer", ["=", "= 40", "34+73-67=40=40", "34+73-67 == 40", "34 >= 73"])
def test_all_before_the_last_equals_sign_is_the_left_side(answer):
    assert label_of(answer) == "lhs_parse_or_eval_error"


@pytest.mark.parametrize(
    "completion, label",
    [
        ("34 + 73 - 67 = 40", "missing_answer_tags"),
        ("", "missing_answer_tags"),
        ("<answer></answer>", "missing_answer_tags"),
        ("<answer> \n\t</answer>", "missing_answer_tags"),
        ("<answer>34 + 73 - 67", "missing_answer_tags"),
        ("34 + 73 - 67</answer>", "missing_answer_tags"),
        ("</answer>34 + 73 - 67<answer>", "missing_answer_tags"),
        ("<answer 1>34 + 73 - 67</answer>", "missing_answer_tags"),
        ("<answer>34 + 73 - 67</ answer>", "missing_answer_tags"),
        ("<anſwer>34 + 73 - 67</anſwer>", "missing_answer_tags"),
        ("<ＡＮＳＷＥＲ>34 + 73 - 67</ＡＮＳＷＥＲ>", "missing_answer_tags"),
        ("&lt;answer&gt;34 + 73 - 67&lt;/answer&gt;", "missing_answer_tags"),
        ("<think>34 + 73?</think> <answer>34 + 73 - 67</answer> That's it.", CORRECT),
        ("<ANSWER>34 + 73 - 67</ANSWER>", CORRECT),
        ("<aNsWeR>34 + 73 - 67</Answer>", CORRECT),
        ("<answer>\n34 + 73\n- 67\n</answer>", CORRECT),
        ("İ\ud800 ſ <answer>34 + 73 - 67</answer>", CORRECT),
        ("<answer>1</answer> no: <answer>34 + 73 - 67</answer>", CORRECT),
        ("<answer>34 + 73 - 67</answer> no: <answer>34</answer>", "invalid_number_usage"),
        ("<answer>34 + 73 - 67</answer> no: <answer> </answer>", "missing_answer_tags"),
        ("<answer>34 + 73 - 67</answer> <answer>34 +", CORRECT),
        ("<answer>34 + 73 - 67</answer> </answer>", CORRECT),
        ("<answer>1 <answer>34 + 73 - 67</answer>", CORRECT),
        ("<answer><answer>34 + 73 - 67</answer></answer>", CORRECT),
        ("<answer>34 + 73 - 67<answer></answer>", "missing_answer_tags"),
        ("<answer><b>34 + 73 - 67</b></answer>", "lhs_parse_or_eval_error"),
        ("<answer>34 + 73 - 67</answer ></answer>", "lhs_parse_or_eval_error"),
    ],
)
def test_the_last_closed_block_is_the_answer(completion, label):
    assert check(completion, (34, 67, 73), 40).label == label


@pytest.mark.parametrize(
    "answer, numbers, exactly, at_most",
    [
        ("34 + 73 - 67", (34, 67, 73), CORRECT, CORRECT),
        ("73 - 67 + 34", (67, 34, 73), CORRECT, CORRECT),
        ("34 + 6", (34, 6, 73), "invalid_number_usage", CORRECT),
        ("34 + 6", (34, 67, 73), "invalid_number_usage", "invalid_number_usage"),
        ("40", (34, 40, 73), "invalid_number_usage", CORRECT),
        ("20 + 20", (20, 5), "invalid_number_usage", "invalid_number_usage"),
        ("20 + 20", (20, 20), CORRECT, CORRECT),
        ("20 + 20", (20, 20, 20), "invalid_number_usage", CORRECT),
        ("34 + 73 - 67 + 0", (34, 67, 73), "invalid_number_usage", "invalid_number_usage"),
        ("3467 / 1", (34, 67, 1), "invalid_number_usage", "invalid_number_usage"),
        ("34 + 73 - 67 = 20 + 20", (34, 67, 73), CORRECT, CORRECT),
    ],
)
def test_numbers_are_counted_under_both_rules(answer, numbers, exactly, at_most):
    assert label_of(answer, numbers, rule="exactly_once") == exactly
    assert label_of(answer, numbers, rule="at_most_once") == at_most


def test_exactly_once_is_the_rule_unless_told_otherwise():
    assert check("<answer>34 + 6</answer>", (34, 6, 1), 40).label == "invalid_number_usage"


@pytest.mark.parametrize(
    "faults, completion, label",
    [
        ("tags, left, numbers, right", "1 / 0 = 4x", "missing_answer_tags"),
        ("left, numbers, right", "<answer>1 / 0 = 4x</answer>", "lhs_parse_or_eval_error"),
        ("numbers, right", "<answer>34 + 1 = 4x</answer>", "invalid_number_usage"),
        ("numbers, balance", "<answer>34 + 1 = 40</answer>", "invalid_number_usage"),
        ("numbers, value", "<answer>34 + 1</answer>", "invalid_number_usage"),
        ("numbers alone", "<answer>41 - 1 = 40</answer>", "invalid_number_usage"),
        ("right, value", "<answer>34+73+67 = 4x</answer>", "rhs_parse_or_eval_error"),
        ("right alone", "<answer>34+73-67 = 1/0</answer>", "rhs_parse_or_eval_error"),
        ("balance, value", "<answer>34+73+67 = 40</answer>", "equation_not_balanced"),
        ("balance alone", "<answer>34+73-67 = 41</answer>", "equation_not_balanced"),
        ("balance by a little", "<answer>34+73-67 = 40+1/999</answer>", "equation_not_balanced"),
        ("value alone", "<answer>34+73+67 = 174</answer>", "wrong_value"),
        ("value, no right side", "<answer>34+73+67</answer>", "wrong_value"),
        ("value, empty right side", "<answer>34+73+67 = </answer>", "wrong_value"),
        ("none", "<answer>34+73-67 = 40</answer>", CORRECT),
    ],
)
def test_of_several_faults_the_first_is_told(faults, completion, label):
    assert check(completion, (34, 67, 73), 40).label == label


def test_the_detail_shows_what_was_seen():
    def detail_of(answer):
        return check(f"<answer>{answer}</answer>", (34, 67, 73), 40).detail

    assert detail_of("34 + 7e1") == "unexpected 'e' in 34 + 7e1"
    assert detail_of("34 / (67 - 67)") == "division by zero in 34 / (67 - 67)"
    assert detail_of("34 + 6") == "used 34, 6; given 34, 67, 73"
    assert detail_of("34 + 73 - 67 = 41") == "left side is 40, not 41"
    assert detail_of("34 / 67 * 73") == "is 2482/67, target is 40"
    assert detail_of("34 + \ud800").encode()  # so that a table of predictions can be written
    assert detail_of(" " * 500 + "34 + 73 - 67") == "34 + 73 - 67"
    assert all(len(detail_of(text)) < 300 for text in HOSTILE.values())


@pytest.mark.parametrize("completion", ["", "<answer>34 + 73 - 67</answer>"])
def test_an_unknown_rule_is_answered_with_the_valid_ones(completion):
    with pytest.raises(ValueError, match="at_least_once.*exactly_once, at_most_once"):
        check(completion, (34, 67, 73), 40, rule="at_least_once")


# ------------------------------------------------------------------------------------------------
# Checker, against oracles. A tree is an integer, (sign, tree) or (operator, tree, tree).

TREES = st.recursive(
    st.integers(0, 12) | st.integers(0, 10**25),
    lambda tree: st.tuples(st.sampled_from("+-*/"), tree, tree) | st.tuples(st.sampled_from("+-"), tree),
    max_leaves=8,
)


def value_of(tree):
    """The value of a tree, or None where it divides by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    symbol, *operands = tree
    a, b = [Fraction(0), *map(value_of, operands)][-2:]  # a sign is an operator after a zero
    if None in (a, b) or (symbol == "/" and b == 0):
        return None
    return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[symbol](b)


def literals_of(tree):
    return [tree] if isinstance(tree, int) else [n for t in tree[1:] for n in literals_of(t)]


def spelled(tree, rng, binding=0):
    """A text for a tree, in parentheses where it would bind less than ``binding``, or by chance."""
    space = rng.choice(SPACES)
    if isinstance(tree, int):
        own, text = 4, str(tree)
    elif len(tree) == 2:
        own, text = 3, rng.choice(SPELLINGS[tree[0]]) + space + spelled(tree[1], rng, 3)
    else:
        own = 1 if tree[0] in "+-" else 2
        symbol = space + rng.choice(SPELLINGS[tree[0]]) + rng.choice(SPACES)
        text = spelled(tree[1], rng, own) + symbol + spelled(tree[2], rng, own + 1)
    return f"({space}{text})" if own < binding or rng.random() < 0.2 else text


def expected_label(left, right, numbers, target, rule):
    surplus = Counter(literals_of(left)) - Counter(numbers)
    unused = Counter(numbers) - Counter(literals_of(left))
    if value_of(left) is None:
        return "lhs_parse_or_eval_error"
    if surplus or (unused and rule == "exactly_once"):
        return "invalid_number_usage"
    if right is not None and value_of(right) is None:
        return "rhs_parse_or_eval_error"
    if right is not None and value_of(right) != value_of(left):
        return "equation_not_balanced"
    return CORRECT if value_of(left) == target else "wrong_value"


@st.composite
def judged_answers(draw):
    """A left side, a right side or none, the numbers, the target: as likely as not they agree."""
    left = draw(TREES)
    value = value_of(left) or Fraction(0)
    equal = ("/", value.numerator, value.denominator)
    if value < 0:
        equal = ("-", ("/", -value.numerator, value.denominator))
    right = draw(st.sampled_from([None, equal, equal, ("+", equal, 0), ("*", 2, equal)]) | TREES)
    numbers = draw(st.permutations(literals_of(left)))
    numbers = draw(st.sampled_from([numbers, numbers, [*numbers, 7], numbers[1:]]))
    target = draw(st.sampled_from([value.numerator, value.numerator, value.numerator + 1]))
    return left, right, numbers, target


@given(judged_answers(), st.sampled_from(RULES), st.booleans(), st.randoms())
@settings(property_test, max_examples=1_000)
def test_the_checker_agrees_with_trees_evaluated_as_they_were_built(judged, rule, long, rng):
    left, right, numbers, target = judged
    answer = spelled(left, rng) + ("" if right is None else f" = {spelled(right, rng)}")
    answer += " " * 500 * long  # long answers are evaluated modulo a prime
    assert label_of(answer, numbers, target, rule) == expected_label(*judged, rule)


PYTHON_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def tree_value(node):
    match node:
        case ast.Expression(body=body):
            return tree_value(body)
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return tree_value(operand) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in PYTHON_OPERATORS:
            return PYTHON_OPERATORS[type(op)](tree_value(left), tree_value(right))
    raise SyntaxError(f"outside our grammar: {ast.dump(node)}")


def python_value(text):
    """What Python's own parser makes of a text, or None where it is outside our grammar."""
    if "#" in text or "_" in text or re.search(r"\b0\d", text):
        return None
    try:
        return tree_value(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, ZeroDivisionError):
        return None


SOUP = st.lists(
    st.sampled_from(["0", "1", "2", "7", "30", " ", "+", "-", "*", "/", "(", ")", "_", ".", "#"])
    | st.sampled_from(["1", "3", "(2+", "1)", "*(", ")-", "5/"]),
    max_size=12,
).map("".join)


@given(SOUP)
@settings(property_test, max_examples=1_500)
def test_the_checker_takes_and_values_what_pythons_parser_does(text):
    value, numbers = python_value(text), [int(n) for n in re.findall(r"\d+", text)]
    if not text.strip():
        assert label_of(text) == "missing_answer_tags"
    elif value is None:
        assert label_of(text, numbers) == "lhs_parse_or_eval_error"
    else:
        answer = f"{text} = {value}"
        assert label_of(answer, numbers, value) == CORRECT
        assert label_of(answer, numbers, value + 1) == "wrong_value"


# ------------------------------------------------------------------------------------------------
# Checker, against texts meant to break it

FRAGMENTS = [
    *("<answer>", "</answer>", "<ANSWER>", "</Answer>", "<answer", "answer>", "<", ">", "<think>"),
    *("0", "1", "34", "67", "73", "40", "007", "1_0", "0x1", "1e9", "3.0", "9" * 5_000),
    *("+", "-", "*", "/", "**", "//", "=", "==", "(", ")", "()", "^", "%", "!", "×", "÷", "−"),
    *(" ", "\n", "\t", "\0", "\x1c", "\x85", "\u00a0", "\u2028", "\u200b", "\ufeff", "\\", "#"),
    *("٣", "३", "３", "𝟛", "²", "½", "Ⅳ", "ſ", "İ", "ß", "K", "\ud800", "\udfff", "🙂", "e\u0301"),
    *("(" * 3_000, ")" * 3_000, "-" * 3_000, " " * 3_000, "1+" * 3_000, "(-" * 3_000, "import os"),
]
ANSWERS = st.lists(st.sampled_from(FRAGMENTS), max_size=15).map("".join)
SURROGATES_TOO = st.text(st.characters(exclude_categories=()))


@given(
    SURROGATES_TOO
    | SURROGATES_TOO.map("<answer>{}</answer>".format)
    | ANSWERS
    | ANSWERS.map("<answer>{}</answer>".format)
    | ANSWERS.map("<answer>34 + 73 - 67 = {}</answer>".format),
    st.sampled_from(RULES),
)
@settings(property_test, max_examples=1_000)
def test_every_text_gets_a_known_label(text, rule):
    assert check(text, (34, 67, 73), 40, rule).label in (CORRECT, *FAILURES)


def test_no_text_is_run(tmp_path):
    trace = tmp_path / "trace"
    for code in (
        f"open({str(trace)!r}, 'w')",
        f"__import__('pathlib').Path({str(trace)!r}).touch()",
    ):
        assert label_of(code) == label_of(f"1 {code}") == "lhs_parse_or_eval_error"
        assert label_of(f"34 + 73 - 67 = {code}") == "rhs_parse_or_eval_error"
    assert not trace.exists()


HOSTILE = {
    "opening parentheses": "(" * 100_000,
    "closing parentheses": ")" * 100_000,
    "nested parentheses": "(" * 100_000 + "34" + ")" * 100_000 + "+73-67",
    "nested, spaced parentheses": "( " * 100_000 + "34" + " )" * 100_000 + "+73-67",
    "parentheses with signs": "-(" * 100_000 + "34" + ")" * 100_000,
    "pairs of parentheses": "()" * 100_000,
    "nested sums": "(1+" * 100_000 + "1" + ")" * 100_000,
    "a million digits": "9" * 1_000_000,
    "a million zeros": "0" * 1_000_000,
    "a million digits on each side": "9" * 1_000_000 + "=" + "9" * 1_000_000,
    "many long numbers": ("9" * 199 + "*") * 4_900 + "1",
    "many long fractions": ("1/" + "7" * 399 + "+") * 2_400 + "1",
    "division by a long zero": "1/(" + "9" * 100_000 + "-" + "9" * 100_000 + ")",
    "powers": "9**9**9",
    "many powers": "9" + "**9" * 100_000,
    "factorials": "9" + "!" * 100_000,
    "exponent": "1e999999999",
    "a long sum": "1+" * 500_000 + "1",
    "a long product": "9*" * 500_000 + "9",
    "a long quotient": "1" + "/9" * 500_000,
    "pluses": "+" * 1_000_000 + "34",
    "minuses": "-" * 1_000_000 + "34+73-67",
    "spaced minuses": "- " * 500_000 + "34",
    "typographic minuses": "−" * 1_000_000,
    "stars": "*" * 1_000_000,
    "slashes": "/" * 1_000_000,
    "spaces": " " * 1_000_000,
    "spaces within": "34 + 73 - " + " " * 1_000_000 + "67",
    "no-break spaces": "\u00a0" * 1_000_000,
    "lines": "\n" * 1_000_000,
    "numbers without operators": "1 " * 500_000,
    "equals signs": "=" * 1_000_000,
    "equations": "1=" * 500_000,
    "opening tags": "<answer>" * 125_000,
    "closing tags": "</answer>" * 110_000,
    "pairs of tags": "<answer></answer>" * 60_000,
    "half tags": "<answer" * 140_000,
    "other half tags": "answer>" * 140_000,
    "NULs": "\0" * 1_000_000,
    "other scripts' digits": "٣" * 1_000_000,
    "surrogates": "\ud800" * 1_000_000,
    "emoji": "🙂" * 1_000_000,
}


@pytest.mark.parametrize("frame", ["<answer>{}</answer>", "<answer>34+73-67 = {}</answer>", "{}", "<answer>{}"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_is_slow_or_recurses(text, frame):
    completion, limit = frame.format(text), sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 20)
    started = time.thread_time()
    try:
        label = check(completion, (34, 67, 73), 40).label
    finally:
        seconds = time.thread_time() - started
        sys.setrecursionlimit(limit)
    assert label in (CORRECT, *FAILURES)
    assert seconds < 1


@pytest.mark.parametrize(
    "name, label",
    [
        ("nested parentheses", CORRECT),
        ("minuses", CORRECT),
        ("spaces within", CORRECT),
        ("opening parentheses", "lhs_parse_or_eval_error"),
        ("powers", "lhs_parse_or_eval_error"),
        ("NULs", "lhs_parse_or_eval_error"),
        ("other scripts' digits", "lhs_parse_or_eval_error"),
        ("division by a long zero", "lhs_parse_or_eval_error"),
        ("a million digits", "invalid_number_usage"),
        ("a million digits on each side", "invalid_number_usage"),
        ("many long fractions", "invalid_number_usage"),
        ("spaces", "missing_answer_tags"),
    ],
)
def test_a_hostile_text_gets_the_class_of_any_other(name, label):
    assert label_of(HOSTILE[name]) == label


def test_an_expression_may_have_ten_thousand_symbols():
    assert label_of("1+" * 4_999 + "1 ", [1] * 5_000, 5_000) == CORRECT
    assert label_of("1+" * 5_000 + "1", [1] * 5_001, 5_001) == "lhs_parse_or_eval_error"


def test_long_numbers_are_compared_in_full():
    long = random.Random(0).randrange(10**999, 10**1000)
    assert label_of(f"34+73-67 = 40 + {long} - {long}") == CORRECT
    assert label_of(f"34+73-67 = 40 + {long} - {long - 1}") == "equation_not_balanced"
    assert label_of(f"34+73-67 = 40 * {long} / {long}") == CORRECT
    high, low = divmod(long, 10**450)
    assert label_of(f"34+73-67 = 40 + {long} - {high} * {10**450} - {low}") == CORRECT
