"""How fast the checker is: completions a second on realistic text, milliseconds on hostile text.

    python benchmarks/checker.py

Realistic: 10,000 completions over public puzzles, a few hundred characters of thought and an
answer; a seventh of them is correct and a seventh falls into each failure class. Hostile: texts of
up to 1 MB, each made to be slow, deep or quadratic for some parser. Exits with code 1 if the
checker is slower than 20,000 completions a second or takes more than 50 ms for any hostile text.
Counts processor time, so that a busy machine is not taken for a slow checker. Takes about ten
seconds on one core.
"""

import random
import statistics
import sys
import time
from itertools import islice

from rich.console import Console
from rich.table import Table

from countdown_kd.countdown import CORRECT, FAILURES, Puzzle, check, public_puzzles, solve

COMPLETIONS, PUZZLES, PASSES = 10_000, 2_000, 7
MIN_PER_SECOND, MAX_HOSTILE_MS = 20_000, 50

# ------------------------------------------------------------------------------------------------
# Realistic text


def thought(puzzle: Puzzle, rng: random.Random) -> str:
    """What a model tries before it answers, 300 to 700 characters."""
    tries = []
    while sum(map(len, tries)) < rng.randrange(300, 600):
        a, b, *_ = rng.sample(puzzle.numbers, len(puzzle.numbers))
        tries.append(f"Let me try {a} + {b} = {a + b}, which is not {puzzle.target}.")
        tries.append(f"Or {a} × {b} − {puzzle.target} = {a * b - puzzle.target}? No.")
    return "<think>" + " ".join(tries) + "</think>\n"


def answer(puzzle: Puzzle, expression: str, label: str, rng: random.Random) -> str:
    """The end of a completion that the checker should give this label."""
    target = puzzle.target
    correct = f"{expression} = {target}"
    body = {
        CORRECT: [correct, expression, correct.replace("*", " × ").replace("-", " − ")],
        "missing_answer_tags": [correct],
        "lhs_parse_or_eval_error": [f"({correct}", f"{correct} = {target}", f"x = {correct}"],
        "invalid_number_usage": [f"{expression} + 1 - 1 = {target}", f"{target} = {target}"],
        "rhs_parse_or_eval_error": [f"{correct}.", f"{expression} = about {target}"],
        "equation_not_balanced": [f"{expression} = {target + 1}", f"-({expression}) = {target}"],
        "wrong_value": [f"-({expression})", f"-({expression}) = -{target}"],
    }
    text = rng.choice(body[label])
    return text if label == "missing_answer_tags" else f"<answer> {text} </answer>"


def realistic() -> list[tuple[str, Puzzle, str]]:
    """Completions, each with its puzzle and the label it was made for."""
    rng = random.Random(0)
    solved = [(p, solve(*p)) for p in islice(public_puzzles(seed=0), PUZZLES)]
    made = []
    for i in range(COMPLETIONS):
        puzzle, expression = solved[i % PUZZLES]
        label = (CORRECT, *FAILURES)[i % (1 + len(FAILURES))]
        text = thought(puzzle, rng) + answer(puzzle, expression, label, rng)
        made.append((text, puzzle, label))
    return made


def completions_per_second() -> float:
    completions = realistic()
    for text, puzzle, label in completions:
        seen = check(text, *puzzle)
        assert seen.label == label, f"{text!r} was made to be {label}, but is {seen}"
    seconds = []
    for _ in range(PASSES):
        started = time.process_time()
        for text, puzzle, _ in completions:
            check(text, puzzle.numbers, puzzle.target)
        seconds.append(time.process_time() - started)
    return len(completions) / statistics.median(seconds)


# ------------------------------------------------------------------------------------------------
# Hostile text


def filled(piece: str, size: int = 1_000_000) -> str:
    """A piece, repeated up to a number of bytes."""
    return piece * (size // len(piece.encode("utf-8", "surrogatepass")))


BLOCKS = {
    "opening parentheses": filled("("),
    "closing parentheses": filled(")"),
    "nested parentheses": "(" * 500_000 + "34" + ")" * 500_000 + "+73-67",
    "nested parentheses, one too many": "(" * 500_001 + "34" + ")" * 500_000,
    "nested parentheses with spaces": "( " * 250_000 + "34" + " )" * 250_000,
    "nested parentheses with signs": "-(" * 300_000 + "34" + ")" * 300_000,
    "nested sums": "(1+" * 200_000 + "1" + ")" * 200_000,
    "nested sums within the token limit": "(1+" * 3_000 + " " * 900_000 + "1" + ")" * 3_000,
    "pairs of parentheses": filled("()"),
    "numbers in parentheses": filled("(1)"),
    "a million digits": filled("9"),
    "a million digits on each side": "9" * 500_000 + "=" + "9" * 500_000,
    "right side of a million digits": "34+73-67=" + filled("9"),
    "right side that is right, in a million digits": ("34+73-67=40" + "*" + "9" * 500_000 + "/" + "9" * 500_000),
    "a million zeros": filled("0"),
    "long product of long numbers": ("9" * 199 + "*") * 4_900 + "1",
    "long product of short numbers": "99*" * 4_900 + " " * 900_000 + "1",
    "long sum of long fractions": ("1/" + "7" * 399 + "+") * 2_400 + "1",
    "tower of long fractions": ("1/(" + "7" * 300 + "+") * 1_900 + "1" + ")" * 1_900,
    "division by a long zero": "1/(" + "9" * 490_000 + "-" + "9" * 490_000 + ")",
    "power of powers": "9**9**9",
    "a million powers": "9" + filled("**9"),
    "factorials": "9" + filled("!"),
    "exponents": filled("1e999999999+"),
    "long sum": filled("1+"),
    "long product": filled("9*"),
    "long quotient": "1" + filled("/9"),
    "long quotient by zero": "1" + filled("/0"),
    "pluses": filled("+") + "34",
    "minuses": filled("-") + "34+73-67",
    "minuses with spaces": filled("- ") + "34",
    "typographic minuses": filled("−") + "34+73-67",
    "typographic products": filled("9×"),
    "stars": filled("*"),
    "slashes": filled("/"),
    "spaces": filled(" "),
    "spaces within": "34+73-" + filled(" ") + "67",
    "spaces on the right side": "34+73-67=" + filled(" "),
    "no-break spaces": filled("\u00a0"),
    "lines": filled("\r\n"),
    "numbers without operators": filled("1 "),
    "equals signs": filled("="),
    "equations": filled("1="),
    "opening tags": filled("<answer>"),
    "closing tags": filled("</answer>"),
    "pairs of tags": filled("<answer></answer>"),
    "pairs of tags with answers": filled("<answer>34+73-67=40</answer>"),
    "half tags": filled("<answer"),
    "half closing tags": filled("</answer"),
    "tag without its first letter": filled("answer>"),
    "angle brackets": filled("<"),
    "commas": filled("1,"),
    "quotes": filled('"'),
    "backslashes": filled("\\"),
    "comments": filled("#"),
    "lambdas": filled("lambda:"),
    "attributes": "a" + filled(".a"),
    "NULs": filled("\0"),
    "Arabic digits": filled("٣"),
    "long s": filled("ſ"),
    "letters that grow in lower case": filled("İ"),
    "combining accents": "e" + filled("\u0301"),
    "surrogates": filled("\ud800"),
    "emoji": filled("🙂"),
    "random bytes": random.Random(0).randbytes(1_000_000).decode("latin-1"),
    "random symbols": "".join(random.Random(0).choices("0123456789+-*/()=<> ", k=1_000_000)),
}
HOSTILE = {name: f"<answer>{block}</answer>" for name, block in BLOCKS.items()} | {
    "no tags": filled("34+73-67=40 "),
    "no tags, opening ones": filled("<answer>"),
    "no tags, closing ones": filled("</answer>"),
    "no tags, half ones": filled("<answer"),
    "no tags, closing ones first": filled("</answer>", 500_000) + filled("<answer>", 500_000),
    "opening tags far from the closing one": filled("<answer>34", 500_000) + "x" * 500_000,
    "long thought, short answer": filled("<think>34 × 2</think>") + "<answer>34+73-67</answer>",
}


def milliseconds(text: str) -> tuple[float, str]:
    """The best of three, and the label."""
    times = []
    for _ in range(3):
        started = time.process_time()
        verdict = check(text, (34, 67, 73), 40)
        times.append(time.process_time() - started)
    return 1000 * min(times), verdict.label


def main() -> None:
    console = Console()
    speed = completions_per_second()
    console.print(f"{COMPLETIONS:,} realistic completions: {speed:,.0f} a second")

    table = Table("hostile text", "kB", "ms", "label", title="Hostile texts, slowest first")
    table.columns[1].justify = table.columns[2].justify = "right"
    measured = {name: milliseconds(text) for name, text in HOSTILE.items()}
    for name, (ms, label) in sorted(measured.items(), key=lambda item: -item[1][0]):
        kilobytes = len(HOSTILE[name].encode("utf-8", "surrogatepass")) / 1000
        table.add_row(name, f"{kilobytes:,.0f}", f"{ms:.1f}", label)
    console.print(table)

    if speed < MIN_PER_SECOND:
        sys.exit(f"Too slow: {speed:,.0f} completions a second; at least {MIN_PER_SECOND:,} wanted.")
    slow = [f"{name} ({ms:.0f} ms)" for name, (ms, _) in measured.items() if ms > MAX_HOSTILE_MS]
    if slow:
        sys.exit(f"Too slow: more than {MAX_HOSTILE_MS} ms for {', '.join(slow)}.")


if __name__ == "__main__":
    main()
